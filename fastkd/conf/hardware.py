"""Models and their sharding: checkpoints, shapes, tensor and expert parallelism, nodes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fastkd.conf import models
from fastkd.conf.draft import Draft
from fastkd.conf.shell import read_shell


def convert_models(draft: Draft) -> None:
    root = draft.get("MODELS_ROOT")
    names = {}
    for role, key in (("STUDENT", "policy"), ("TEACHER", "teacher")):
        model = draft.get(f"{role}_MODEL_ENV") or draft.get(f"{role}_MODEL")
        names[role] = _model(draft, role, f"{key}.model_name", model, root)
    draft.student, draft.teacher = names["STUDENT"], names["TEACHER"]
    if root:
        draft.row("MODELS_ROOT", "ignored", "only where Hugging Face folders are looked for")
    tokenizer = draft.get("TOKENIZER_MODEL") or draft.get("HF_MODEL_CKPT")
    name = "TOKENIZER_MODEL" if draft.get("TOKENIZER_MODEL") else "HF_MODEL_CKPT"
    if tokenizer and tokenizer != draft.student:
        draft.map(name, "policy.tokenizer.name", tokenizer)
        draft.set("teacher.tokenizer.name", tokenizer)
    elif tokenizer:
        draft.row(name, "mapped", "the student's own tokenizer")
    _shapes(draft)


def _model(draft: Draft, role: str, key: str, model: str, root: str) -> str:
    variable = f"{role}_CKPT"
    checkpoint = draft.get(variable)
    named = (
        models.hugging_face(models.bare_name(checkpoint) if checkpoint else model, root)
        if (checkpoint or model)
        else ""
    )
    if model:
        note = (
            ""
            if not checkpoint or models.bare_name(checkpoint) in (model, Path(model).name)
            else (f"; {variable} is {models.bare_name(checkpoint)}, and that is what is taken")
        )
        draft.row(f"{role}_MODEL", "mapped", f"names the model of {key}{note}")
    if not checkpoint:
        if named and draft.take_hugging_face:
            draft.map(variable, key, named, "no checkpoint given")
            return named
        give = f"give {variable}={named}, or --hf" if named else f"give {variable}=a Hugging Face model"
        draft.row(variable, "error", f"is required; {give}")
        return named
    if models.is_megatron(checkpoint):
        if not draft.take_hugging_face:
            rule = "is a Megatron checkpoint, and fastkd reads Hugging Face models and quantises them itself"
            draft.row(variable, "error", f"{rule}: give {variable}={named}, or --hf to take that for it")
            return named
        draft.map(variable, key, named, "in place of the Megatron checkpoint")
        return named
    if models.is_quantised(checkpoint):
        why = "the student starts from weights that are not" if role == "STUDENT" else "the teacher must not be"
        draft.row(variable, "error", f"is quantised already; {why}: give {variable}={named}")
        return checkpoint
    there = Path(checkpoint).expanduser().exists() or not checkpoint.startswith(("/", "~", "."))
    draft.map(variable, key, checkpoint, "" if there else "not found on this machine")
    return checkpoint


def _shapes(draft: Draft) -> None:
    """GQA and the other sizes that Megatron is told, against what the model has."""
    for variable, model in (("TEACHER_MODEL_CONFIG", draft.teacher), ("STUDENT_CONFIG_FILE", draft.student)):
        path = draft.get(variable)
        if not path:
            continue
        try:
            settings = _settings(draft, path)
        except ValueError as error:
            draft.row(variable, "error", f"{error}; mend it or leave the variable out")
            continue
        wrong = models.mismatches(settings, model) if settings else []
        if settings and variable == "STUDENT_CONFIG_FILE":
            draft.sequence_length = str(settings.get("seq_length") or draft.sequence_length)
        for one in wrong:
            draft.row(variable, "error", f"shape mismatch: {one}. Mend it or leave the variable out")
        if not wrong:
            found = "agrees with it" if settings else "is not on this machine"
            draft.row(variable, "ignored", f"shapes come from the model's config.json; this file {found}")


def _settings(draft: Draft, path: str) -> dict[str, Any] | None:
    if not path.endswith(".sh"):
        return models.read_yaml(path)
    if not Path(path).expanduser().is_file():
        return None
    arguments = read_shell(Path(path).expanduser()).variables.get("MODEL_ARGS")
    return models.flags(arguments.value) if arguments else {}


def convert_sharding(draft: Draft) -> None:
    tensor = draft.number("TP_SIZE", least=1, required=True)
    pipeline = draft.number("PP_SIZE", "1", least=1)
    experts = draft.number("EP_SIZE", "1", least=1)
    per_node = draft.number("NUM_GPUS", "8")
    shape = models.shape_of(draft.student) if draft.student else None
    if tensor:
        draft.map("TP_SIZE", "policy.dtensor_cfg.tensor_parallel_size", tensor, "and of the teacher")
        if tensor > 1:
            draft.set("policy.dtensor_cfg.sequence_parallel", True)
        if shape and (shape.heads % tensor or max(tensor, shape.kv_heads) % min(tensor, shape.kv_heads)):
            rule = f"must divide the {shape.heads} heads, and the {shape.kv_heads} key/value heads or be a multiple"
            draft.row("TP_SIZE", "error", f"{rule} of them ({draft.student})")
    if pipeline == 1 and "PP_SIZE" in draft.values:
        draft.row("PP_SIZE", "ignored", "there are no pipeline stages; 1 is what there is")
    elif pipeline and pipeline > 1:
        whole = pipeline * (tensor or 1)
        draft.row(
            "PP_SIZE",
            "error",
            "there are no pipeline stages: weights are sharded over all GPUs (FSDP2), which takes their place. "
            f"Give PP_SIZE=1; if a layer does not fit, TP_SIZE={whole}",
        )
    _experts(draft, experts, shape)
    if per_node is None:
        return
    draft.map("NUM_GPUS", "cluster.gpus_per_node", per_node)
    given = "NNODES" if draft.get("NNODES") else "SLURM_NNODES"
    nodes = draft.number(given, least=1)
    need = math.ceil((tensor or 1) * (experts or 1) / max(per_node, 1))
    note = "" if nodes else f"TP × EP = {(tensor or 1) * (experts or 1)} GPUs; give NNODES for more"
    draft.map(given if nodes else "NNODES", "cluster.num_nodes", nodes or need, note)


def _experts(draft: Draft, experts: int | None, shape: models.Shape | None) -> None:
    declared = draft.get("IS_MOE")
    if experts is None:
        return
    if experts > 1 and shape and not shape.experts:
        draft.row("EP_SIZE", "error", f"{draft.student} has no experts; give EP_SIZE=1")
    elif experts > 1 and shape and shape.experts % experts:
        draft.row("EP_SIZE", "error", f"must divide the {shape.experts} experts of {draft.student}")
    elif experts > 1:
        note = f"{shape.experts // experts} experts per rank" if shape else ""
        if declared == "false":
            note += "; IS_MOE=false notwithstanding"
        draft.map("EP_SIZE", "policy.dtensor_cfg.expert_parallel_size", experts, note.strip("; "))
    elif "EP_SIZE" in draft.values:
        draft.row("EP_SIZE", "ignored", "experts are not sharded")
    if declared:
        draft.row("IS_MOE", "ignored", "the model's config.json says whether it has experts")
    draft.experts = bool(shape and shape.experts) or experts > 1 or declared == "true"

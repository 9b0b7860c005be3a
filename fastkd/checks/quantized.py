"""Rules about ``policy.quant_cfg``: what a quantised student cannot be combined with, told before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from fastkd.checks.finding import Finding
from fastkd.errors import RecipeError, UserError
from fastkd.recipe import LoadedRecipe

BLOCK = 16
"""Inputs that share a scale: ``kernels/nvfp4.py``, which imports torch."""
_KEY = "policy.quant_cfg"


def quantized(loaded: LoadedRecipe) -> Iterator[Finding]:
    """Adapters, a teacher that is the student itself, and blocks that tensor parallelism would cut."""
    recipe = loaded.recipe
    policy, context = recipe.policy, recipe.distillation.context_distillation
    config = policy.quantization
    if config is None:
        return
    if policy.dtensor_cfg.lora_cfg.enabled:
        yield RecipeError(
            _KEY,
            "adapters are trained over weights that stay as they are, and quantised weights are trained themselves",
            "Write policy.dtensor_cfg.lora_cfg.enabled=false, or leave quant_cfg out",
            value=policy.quant_cfg,
        )
    if context.enabled and context.shares_weights:
        where = "distillation.context_distillation.frozen_teacher_source"
        yield RecipeError(
            where,
            f"the teacher would be the student's own model, quantised by {_KEY}={policy.quant_cfg!r} like it",
            f"Write {where}=base_model",
            value=context.frozen_teacher_source,
        )
    yield from _blocks(loaded)


def _blocks(loaded: LoadedRecipe) -> Iterator[Finding]:
    from fastkd.plan import shapes
    from fastkd.plan.quantized import chosen

    policy = loaded.recipe.policy
    tp, exclude = policy.dtensor_cfg.tensor_parallel_size, "policy.quant_exclude_modules"
    try:
        shape = shapes.find("policy.model_name", loaded.locate(policy.model_name))
    except UserError:
        return  # its sizes are not known here; loading it tells
    layers = [one for one in chosen(shape, policy.quantization) if len(one.shape) == 2]
    for one in layers:
        name = one.name.removesuffix(".weight")
        if one.shape[1] % BLOCK:
            rule = f"{name} has {one.shape[1]} inputs, no multiple of NVFP4's block of {BLOCK}"
            yield RecipeError(_KEY, rule, f"Add {name.rpartition('.')[2]} to {exclude}", value=policy.quant_cfg)
            return
    split = {one.name.removesuffix(".weight"): one.shape[1] for one in layers if one.split == "rows"}
    for name, inputs in split.items():
        if tp > 1 and inputs % (BLOCK * tp):
            fits = [n for n in range(1, tp) if all(size % (BLOCK * n) == 0 for size in split.values())]
            yield RecipeError(
                "policy.dtensor_cfg.tensor_parallel_size",
                f"cuts the {inputs} inputs of {name} into parts that are no multiple of NVFP4's block of {BLOCK}",
                f"Use one of {', '.join(map(str, fits))}, or add {name.rpartition('.')[2]} to {exclude}",
                value=tp,
            )
            return

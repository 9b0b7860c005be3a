"""Giving a model quantisers, and whether it can be split with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastkd import experts
from fastkd._kernels.nvfp4 import BLOCK
from fastkd.config import Quantization
from fastkd.errors import UserError
from fastkd.quantization.layers import INPUT_SCALE, WEIGHT_SCALE, FusedQuantizer, QuantizedLinear, Quantizer, Quantizers
from fastkd.quantization.model import quantized_layers
from fastkd.quantization.scales import initialise
from fastkd.quantization_choice import choose, families
from fastkd.tensor_plan import plan_strings


def apply(causal_lm: Any, config: Quantization, dtype: torch.dtype) -> list[str]:
    """Give the chosen layers of ``causal_lm`` quantisers, in place, not in use yet. Call it before ``parallel.shard``.

    Experts in one tensor count as one layer.

    Scales of a materialised model are set. On meta, call :func:`scales.initialise` once there are values.

    Args:
        causal_lm: a transformers causal language model, not sharded.
        config: which layers, and whether their inputs too.
        dtype: of compute: weights are cast to it before they are quantised.

    Returns:
        Names of the quantised layers.

    Raises:
        ModelError: a name in the recipe matches nothing, no layer is left, or one cannot be quantised.
    """
    names = choose(causal_lm, config)
    shared = Quantizers(config, dtype)
    family_of = {name: family for family in families(names) for name in family}
    for name in names:
        layer: Any = causal_lm.get_submodule(name)
        if hasattr(layer, experts.FUSED[0]):
            experts.adopt(causal_lm)
            layer.quantizers = nn.ModuleDict()
            for own in experts.FUSED:
                layer.quantizers[own] = fused = FusedQuantizer(f"{name}.{own}", shared)
                weight = layer.get_parameter(own)
                _register(fused, (weight.shape[0],), config, weight.device)
            continue
        _register(layer, (), config, layer.weight.device)
        layer.quantizer = Quantizer(name, shared, family_of[name])
        layer.__class__ = QuantizedLinear
    causal_lm.fastkd_quantizers = shared
    if not any(parameter.is_meta for parameter in causal_lm.parameters()):
        initialise(causal_lm)
    return names


def _register(layer: nn.Module, weights: tuple[int, ...], config: Quantization, device: torch.device) -> None:
    layer.register_buffer(WEIGHT_SCALE, torch.full(weights, torch.nan, device=device))
    if config.activations:
        layer.register_buffer(INPUT_SCALE, torch.full((), torch.nan, device=device))


def check_shards(causal_lm: Any, tp: int, key: str) -> None:
    """Whether tensor parallelism leaves the blocks of 16 inputs whole. ``key`` is named in the error.

    Raises:
        UserError: with the layer, and every degree that would do.
    """
    if tp == 1:
        return
    prefix = f"{causal_lm.base_model_prefix}."
    strings = plan_strings(causal_lm)
    split = {
        name: layer.in_features
        for name, layer in quantized_layers(causal_lm)
        if strings.get(name.removeprefix(prefix), "").startswith("rowwise")
    }
    for name, inputs in split.items():
        if inputs % (BLOCK * tp):
            fits = [n for n in range(1, tp) if all(size % (BLOCK * n) == 0 for size in split.values())]
            raise UserError(
                key,
                f"cuts the {inputs} inputs of {name} into parts that are no multiple of NVFP4's block of {BLOCK}",
                f"Use one of {', '.join(map(str, fits))}, or add {name.rpartition('.')[2]} to "
                "policy.quant_exclude_modules",
                value=tp,
            )

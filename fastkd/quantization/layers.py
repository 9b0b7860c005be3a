"""Layers that multiply with NVFP4 values, and what those of one model share.

The scales are buffers of the layer. Layers quantise once ``Quantizers.on`` is set, by ``scales``.

Letters: E experts of a block, L those of them on this rank, M rows that go to them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd._kernels.nvfp4_ops import fake_quantize
from fastkd.config import Quantization
from fastkd.experts import compute_dtype, grouped_linear

WEIGHT_SCALE, INPUT_SCALE = "weight_scale_2", "input_scale"
"""Names of the buffers, as in a checkpoint."""


class Quantizers:
    """What the quantisers of one model share."""

    def __init__(self, config: Quantization, dtype: torch.dtype):
        self.config, self.dtype = config, dtype
        self.on = False
        """False: layers compute as ever."""
        self.activations = config.activations
        self.watched: dict[str, Tensor] | None = None
        """While calibrating: the largest input of each layer so far, a scalar on its device."""
        self.kept: dict[str, Tensor] | None = None
        """W̃ of each layer, while weights do not change."""
        self.inputs: dict[str, tuple[Tensor, Tensor, int]] = {}
        """By family: the input that its layers read, x̃, and how many of them have yet to ask for it."""


class Quantizer:
    """Of one layer: multiplies with NVFP4 values.

    Args:
        name: of the layer.
        shared: of its model.
        family: the layers that share global scales with this one, itself included.
    """

    def __init__(self, name: str, shared: Quantizers, family: list[str]):
        self.name, self.shared, self.family = name, shared, family

    def __call__(self, layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``F.linear`` of quantised values.

        Args:
            layer: holds the scales.
            x: [..., inputs] or a rank's part of them.
            weight: [outputs, inputs] or a rank's part.
            bias: [outputs].
        """
        shared = self.shared
        if shared.watched is not None:
            _watch(shared.watched, self.name, x)
        if not shared.on:
            return F.linear(x, weight, bias)
        x = self._input(layer, x) if shared.activations else x
        return F.linear(x, self._weight(layer, compute_dtype(weight)), bias)

    def _input(self, layer: Any, x: Tensor) -> Tensor:
        """x̃, computed and kept for backward once for the layers that read x."""
        alone = len(self.family) == 1 or torch.compiler.is_compiling()
        if alone:
            return fake_quantize(compute_dtype(x), layer.input_scale)
        inputs, key = self.shared.inputs, self.family[0]
        seen, quantized, left = inputs.get(key, (None, x, 0))
        if seen is not x:
            quantized, left = fake_quantize(compute_dtype(x), layer.input_scale), len(self.family)
        inputs[key] = (x, quantized, left - 1)
        if left == 1:
            del inputs[key]
        return quantized

    def _weight(self, layer: Any, weight: Tensor) -> Tensor:
        kept = self.shared.kept
        if kept is None:
            return fake_quantize(weight, layer.weight_scale_2)
        if self.name not in kept:
            kept[self.name] = fake_quantize(weight, layer.weight_scale_2)
        return kept[self.name]


class FusedQuantizer(nn.Module):
    """Of one tensor that holds the experts of a block: multiplies rows with NVFP4 values.

    Args:
        name: of the tensor.
        shared: of its model.
    """

    weight_scale_2: Tensor
    """[E] float32."""
    input_scale: Tensor

    def __init__(self, name: str, shared: Quantizers):
        super().__init__()
        self.name, self.shared = name, shared

    def forward(self, x: Tensor, weight: Tensor, sizes: Any, first: int = 0) -> Tensor:
        """``experts.grouped_linear`` of quantised values.

        Args:
            x: [M, inputs], sorted by expert.
            weight: [L, outputs, inputs].
            sizes: rows of each.
            first: number of the first of the L experts.
        """
        shared = self.shared
        if shared.watched is not None and x.numel():
            _watch(shared.watched, self.name, x)
        if not shared.on:
            return grouped_linear(x, weight, sizes)
        if shared.activations:
            x = fake_quantize(compute_dtype(x), self.input_scale)
        scales = self.weight_scale_2[first : first + weight.shape[0]]
        kept = shared.kept
        if kept is None:
            return grouped_linear(x, fake_quantize(compute_dtype(weight), scales), sizes)
        if self.name not in kept:
            kept[self.name] = fake_quantize(compute_dtype(weight), scales)
        return grouped_linear(x, kept[self.name], sizes)


def _watch(watched: dict[str, Tensor], name: str, x: Tensor) -> None:
    seen = x.detach().abs().amax().float()
    before = watched.get(name)
    watched[name] = seen if before is None else torch.maximum(before, seen)


class QuantizedLinear(nn.Linear):
    """A quantised linear layer, not split over ranks. ``apply`` makes an ``nn.Linear`` one."""

    quantizer: Quantizer
    weight_scale_2: Tensor
    input_scale: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """W̃ x̃ + bias."""
        return self.quantizer(self, input, self.weight, self.bias)

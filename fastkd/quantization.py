"""Quantisation-aware training: linear layers compute with NVFP4 values of their weights and inputs.

A chosen layer computes

    y = W̃ x̃ + bias,    W̃ = nvfp4(W, g_W),    x̃ = nvfp4(x, g_x),

with the straight-through gradient of ``fastkd._kernels.nvfp4_ops``. W stays in full precision and is trained. Block
scales follow the values; the two global scales are fixed before training: g_W by the largest weight (``initialise``),
g_x by the largest input on a data sample (``calibrating``: max calibration). q, k and v share theirs, as do gate and
up, because engines run them as one layer. All is ModelOpt's format and rule (``fastkd._kernels.nvfp4``), so what is
exported is what was trained.

The scales are buffers of the layer under their names in a checkpoint, ``weight_scale_2`` and ``input_scale``: training
states hold them. The layer's weight keeps its name, so tensor-parallel styles and FSDP cut it as ever.
``tensor_styles`` calls the quantiser on a rank's part of the layer. That is exact where no block of 16 inputs is cut
(``check_shards``), because a block's scale needs the block alone and g is that of the whole tensor.

Experts that lie in one tensor (``fastkd.experts``) have a g_W each, which gate and up share, and one g_x for all of a
block: engines that run them together use one, and an expert that no token of the sample reached has it too.

Rollouts without NVFP4 hardware are sampled from folded weights W̃ (``fold``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from fastkd import experts
from fastkd._kernels.nvfp4 import BLOCK, global_scale
from fastkd._kernels.nvfp4_ops import fake_quantize
from fastkd.config import Quantization
from fastkd.errors import UserError
from fastkd.experts import compute_dtype, grouped_linear
from fastkd.quantization_choice import choose, families
from fastkd.tensor_plan import plan_strings

WEIGHT_SCALE, INPUT_SCALE = "weight_scale_2", "input_scale"


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


# ---------------------------------------------------------------- adding them


def apply(causal_lm: Any, config: Quantization, dtype: torch.dtype) -> list[str]:
    """Give the chosen layers of ``causal_lm`` quantisers, in place, not in use yet. Call it before ``parallel.shard``.

    Experts in one tensor count as one layer.

    Scales of a materialised model are set. On meta, call :func:`initialise` once there are values.

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


@torch.no_grad()
def initialise(causal_lm: Any) -> None:
    """Set the weights' scales to what the weights are now. All ranks call it.

    Without quantised activations the layers quantise from here on.
    """
    shared = quantizers_of(causal_lm)
    tensors = quantized_tensors(causal_lm)
    amax = {name: _amax(causal_lm.get_parameter(name)) for name in tensors}
    device = _reduction_device(causal_lm, amax)
    # Rounded as the weights will be: rounding keeps their order, so this is the largest of the rounded ones.
    largest = {name: value.to(shared.dtype).float() for name, value in _everywhere(causal_lm, amax, device).items()}
    _set(causal_lm, tensors, WEIGHT_SCALE, largest)
    shared.on = not shared.config.activations


@contextmanager
def calibrating(causal_lm: Any) -> Iterator[None]:
    """Inside, layers compute as ever and their inputs are watched; afterwards they quantise. All ranks call it.

    Max calibration: a layer's g is made of its largest input on any rank. After an error the layers stay as they were.
    """
    shared = quantizers_of(causal_lm)
    before, shared.on, shared.watched = shared.on, False, {}
    try:
        with torch.no_grad():
            yield
        seen, shared.watched = shared.watched, None
        tensors = quantized_tensors(causal_lm)
        device = _reduction_device(causal_lm, seen)
        # A layer that no token reached on this rank: the other ranks know, or nobody.
        nothing = torch.zeros((), device=device)
        amax = {name: seen.get(name.removesuffix(".weight"), nothing) for name in tensors}
        if shared.config.activations:
            _set(causal_lm, tensors, INPUT_SCALE, _everywhere(causal_lm, amax, device))
        before = True
    finally:
        shared.on, shared.watched = before, None


def _set(causal_lm: Any, tensors: dict[str, Any], scale: str, amax: dict[str, Tensor]) -> None:
    for family in families(name.removesuffix(".weight") for name in tensors):
        members = [name if name in tensors else f"{name}.weight" for name in family]
        largest = torch.stack([amax[name] for name in members]).amax(0)
        for name in members:
            # Where the layer computes: `to_empty` may have put the buffer into host memory.
            device = _device(causal_lm, causal_lm.get_parameter(name))
            setattr(tensors[name], scale, global_scale(largest).to(device))


def _amax(weight: Tensor) -> Tensor:
    """The largest value of this rank's part: a scalar, or [E] with zeros for experts that lie elsewhere."""
    local, exact = _local(weight).detach(), torch.float32
    if weight.dim() < 3:
        return local.abs().amax().float() if local.numel() else local.new_zeros((), dtype=exact)
    found = local.new_zeros(weight.shape[0], dtype=exact)
    if local.numel():
        found[experts.held(weight)] = local.abs().amax((1, 2)).float()
    return found


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _mesh(causal_lm: Any) -> DeviceMesh | None:
    layout = getattr(causal_lm, "fastkd_layout", None)
    return None if layout is None else layout.mesh


def _device(causal_lm: Any, weight: Tensor) -> torch.device:
    mesh = _mesh(causal_lm)
    if mesh is None or mesh.device_type == "cpu":
        return weight.device
    return torch.device(mesh.device_type, torch.cuda.current_device())


def _reduction_device(causal_lm: Any, values: dict[str, Tensor]) -> torch.device:
    mesh = _mesh(causal_lm)
    if mesh is not None:
        return torch.device(mesh.device_type)
    return next((value.device for value in values.values()), torch.device("cpu"))


def _everywhere(causal_lm: Any, amax: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The largest over all ranks: one exchange for all layers."""
    values = torch.cat([value.to(device).reshape(-1) for value in amax.values()])
    mesh = _mesh(causal_lm)
    for name in () if mesh is None else mesh.mesh_dim_names or ():
        dist.all_reduce(values, dist.ReduceOp.MAX, group=mesh[name].get_group())  # pyright: ignore[reportOptionalSubscript]
    parts = values.split([value.numel() for value in amax.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(amax.items(), parts, strict=True)}


# ---------------------------------------------------------------- using them


def has_quantizers(causal_lm: Any) -> bool:
    """Whether :func:`apply` was called on this model."""
    return getattr(causal_lm, "fastkd_quantizers", None) is not None


def quantizers_of(causal_lm: Any) -> Quantizers:
    """What :func:`apply` left on the model."""
    return causal_lm.fastkd_quantizers


def quantized_layers(causal_lm: Any) -> Iterator[tuple[str, Any]]:
    """(name, layer) of every linear layer with a quantiser, sharded or not."""
    for name, module in causal_lm.named_modules():
        if isinstance(module, QuantizedLinear):
            yield name, module


def quantized_tensors(causal_lm: Any) -> dict[str, Any]:
    """Name of every quantised weight → what holds its scales: a layer, or the quantiser of experts in one tensor."""
    found: dict[str, Any] = {}
    for name, module in causal_lm.named_modules():
        if isinstance(module, QuantizedLinear):
            found[f"{name}.weight"] = module
        elif isinstance(module, FusedQuantizer):
            found[module.name] = module
    return found


def is_scale(name: str) -> bool:
    """Whether a buffer of this name is a quantiser's: the files of the base do not hold it."""
    return name.rpartition(".")[2] in (WEIGHT_SCALE, INPUT_SCALE)


def resume(causal_lm: Any) -> None:
    """Quantise with the scales that the buffers hold now: those of a training state."""
    quantizers_of(causal_lm).on = True


@contextmanager
def disabled(causal_lm: Any) -> Iterator[None]:
    """Inside, layers compute as ever. A model without quantisers stays as it is."""
    if not has_quantizers(causal_lm):
        yield
        return
    shared = quantizers_of(causal_lm)
    before, shared.on = shared.on, False
    try:
        yield
    finally:
        shared.on = before


@contextmanager
def weights_kept(causal_lm: Any) -> Iterator[None]:
    """Inside, W̃ is computed once per layer and kept: for many forwards without a change of the weights, not sharded."""
    if not has_quantizers(causal_lm) or _mesh(causal_lm) is not None:
        yield
        return
    shared = quantizers_of(causal_lm)
    before, shared.kept = shared.kept, {}
    try:
        yield
    finally:
        shared.kept = before


@contextmanager
def weights_alone(causal_lm: Any) -> Iterator[None]:
    """Inside, inputs are not quantised: what an engine with folded weights computes."""
    if not has_quantizers(causal_lm):
        yield
        return
    shared = quantizers_of(causal_lm)
    before, shared.activations = shared.activations, False
    try:
        yield
    finally:
        shared.activations = before


def fold(causal_lm: Any, layer: Any, weight: Tensor, held: slice = slice(None)) -> Tensor:
    """W̃ of a layer's weight or of a rank's part of it, in ``weight``'s dtype; as it is while layers do not quantise.

    Args:
        causal_lm: the model.
        layer: holds the scales (``quantized_tensors``).
        weight: all of it, or a part.
        held: which experts the part is of.
    """
    shared = quantizers_of(causal_lm)
    if not shared.on:
        return weight
    scale = layer.weight_scale_2.to(weight.device)
    scale = scale[held] if scale.dim() else scale
    return weight if not weight.numel() else fake_quantize(weight.detach().to(shared.dtype), scale).to(weight.dtype)

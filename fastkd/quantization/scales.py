"""The global scales: the weights' by the largest weight, the inputs' by the largest one on a data sample.

Both are max calibration, over all ranks: one exchange for all layers of a model. Layers that engines run as one share
the larger scale (``quantization_choice.families``).

Letters: E experts of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastkd import experts
from fastkd._kernels.nvfp4 import global_scale
from fastkd.quantization.layers import INPUT_SCALE, WEIGHT_SCALE
from fastkd.quantization.model import mesh_of, quantized_tensors, quantizers_of
from fastkd.quantization_choice import families


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


def _device(causal_lm: Any, weight: Tensor) -> torch.device:
    mesh = mesh_of(causal_lm)
    if mesh is None or mesh.device_type == "cpu":
        return weight.device
    return torch.device(mesh.device_type, torch.cuda.current_device())


def _reduction_device(causal_lm: Any, values: dict[str, Tensor]) -> torch.device:
    mesh = mesh_of(causal_lm)
    if mesh is not None:
        return torch.device(mesh.device_type)
    return next((value.device for value in values.values()), torch.device("cpu"))


def _everywhere(causal_lm: Any, amax: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The largest over all ranks: one exchange for all layers."""
    values = torch.cat([value.to(device).reshape(-1) for value in amax.values()])
    mesh = mesh_of(causal_lm)
    for name in () if mesh is None else mesh.mesh_dim_names or ():
        dist.all_reduce(values, dist.ReduceOp.MAX, group=mesh[name].get_group())  # pyright: ignore[reportOptionalSubscript]
    parts = values.split([value.numel() for value in amax.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(amax.items(), parts, strict=True)}

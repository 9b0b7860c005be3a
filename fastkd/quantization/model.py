"""The quantisers of a model: finding them, and how it computes inside a ``with``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fastkd._kernels.nvfp4_ops import fake_quantize
from fastkd.quantization.layers import INPUT_SCALE, WEIGHT_SCALE, FusedQuantizer, QuantizedLinear, Quantizers

# ---------------------------------------------------------------- finding them


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


def mesh_of(causal_lm: Any) -> DeviceMesh | None:
    """The mesh that the model is sharded over."""
    layout = getattr(causal_lm, "fastkd_layout", None)
    return None if layout is None else layout.mesh


# ---------------------------------------------------------------- using them


def resume(causal_lm: Any) -> None:
    """Quantise with the scales that the buffers hold now: those of a training state."""
    quantizers_of(causal_lm).on = True


def disabled(causal_lm: Any) -> AbstractContextManager[None]:
    """Inside, layers compute as ever. A model without quantisers stays as it is."""
    return _with(causal_lm, on=False)


def weights_kept(causal_lm: Any) -> AbstractContextManager[None]:
    """Inside, W̃ is computed once per layer and kept: for many forwards without a change of the weights, not sharded."""
    return nullcontext() if mesh_of(causal_lm) is not None else _with(causal_lm, kept={})


def weights_alone(causal_lm: Any) -> AbstractContextManager[None]:
    """Inside, inputs are not quantised: what an engine with folded weights computes."""
    return _with(causal_lm, activations=False)


@contextmanager
def _with(causal_lm: Any, **settings: Any) -> Iterator[None]:
    """Inside, the model's quantisers, if it has any, are set otherwise."""
    if not has_quantizers(causal_lm):
        yield
        return
    shared = quantizers_of(causal_lm)
    before = {name: getattr(shared, name) for name in settings}
    try:
        vars(shared).update(settings)
        yield
    finally:
        vars(shared).update(before)


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

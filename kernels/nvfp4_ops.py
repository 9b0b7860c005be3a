"""``fastkd::nvfp4_fake``: NVFP4 fake quantisation as an operator, with a straight-through gradient.

    forward     x̂ of ``nvfp4.fake_quantize``
    backward    ∂x = ∂x̂, also where x was clipped (Bengio et al. 2013, "Estimating or propagating gradients")

It saves nothing for backward. A compiler sees one opaque call with a known shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd._kernels import nvfp4
from fastkd._kernels.tuning import on_device, use_triton

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@torch.library.custom_op("fastkd::nvfp4_fake", mutates_args=())
def nvfp4_fake(x: Tensor, scale: Tensor) -> Tensor:
    """x̂ of ``x`` [..., K] with the global scale ``scale``: a scalar, or one for each first index of x."""
    if scale.numel() > 1:
        scale = scale.view(-1, *(1,) * (x.dim() - 1))
    if not use_triton(x.device, torch.float32):
        return nvfp4.fake_quantize(x, scale).contiguous()
    from fastkd._kernels import triton_nvfp4

    with on_device(x.device):
        return triton_nvfp4.fake_quantize(x, scale)


@nvfp4_fake.register_fake
def _(x, scale):
    return x.new_empty(x.shape)


def _keep_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def _straight_through(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return gradient, None


nvfp4_fake.register_autograd(_straight_through, setup_context=_keep_nothing)


def fake_quantize(x: Tensor, scale: Tensor) -> Tensor:
    """x̂ with a straight-through gradient.

    Args:
        x: [..., K] float32, bfloat16 or float16.
        scale: float32 global scale on x's device: one number, or E for x [E, ..., K].

    Returns:
        A tensor of x's shape and dtype.

    Raises:
        ValueError: K is no multiple of 16, or the dtype is another one.
    """
    if x.shape[-1] % nvfp4.BLOCK:
        raise ValueError(f"x has {x.shape[-1]} values in its last dimension: NVFP4 needs a multiple of {nvfp4.BLOCK}")
    if x.dtype not in _FLOATS:
        raise ValueError(f"x is {x.dtype}: use float32, bfloat16 or float16")
    return nvfp4_fake(x, scale)

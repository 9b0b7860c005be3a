"""NVFP4: the format, and its arithmetic in torch. The Triton program of ``triton_nvfp4`` computes the same bits.

Sixteen consecutive values along the last dimension share one scale; a whole tensor shares one more (NVIDIA 2025,
"Pretraining Large Language Models with NVFP4"):

    g    = amax / (6 · 448)                  float32, of the tensor (``global_scale``)
    s    = e4m3(blockamax / (6 g))           FP8 E4M3, of a block; 1 for a block of zeros, else in [2⁻⁹, 448]
    code = e2m1(x / (s g))                   FP4 E2M1: 0, ½, 1, 1½, 2, 3, 4, 6 and a sign
    x̂    = e2m1 value · (s g)

All of it is float32 arithmetic in this order, which fixes every bit; the result is rounded once more to x's dtype.
Both roundings go to the nearest value, ties to the even code, and both are bit masks and float32 additions: no FP8
hardware is needed. 4.5 bits per value, two codes to a byte, the even position in the low half.

x / (s g) beyond 6 becomes 6, so values beyond the amax that g was made of are clipped to it. A block that holds NaN or
an infinity becomes NaN as a whole: a run that has gone wrong must not look right. g = 0 (amax of a tensor of zeros)
counts as 1.

Letters: K values of a row, a multiple of 16.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 16
"""Values that share a scale."""
E2M1_MAX, E4M3_MAX, E4M3_MIN = 6.0, 448.0, 2.0**-9
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of the codes 0 … 7; code + 8 is the negative one, and 8 is 0 again."""

_TO_HALVES = 1.5 * 2.0**22
"""Added to a float32 in (−2²¹, 2²¹), it leaves no bits below ½."""
_TO_E4M3_MIN = 2.0**14
"""Added to one in [0, 2¹⁴), it leaves no bits below 2⁻⁹."""
_EXPONENT = 0x7F800000
"""Bits of a float32 that make the power of two below it."""


def global_scale(amax: Tensor) -> Tensor:
    """g of a tensor whose largest magnitude is ``amax``: float32, of amax's shape; 1 where amax is 0."""
    scale = amax.float() / (E2M1_MAX * E4M3_MAX)
    return torch.where(scale == 0, 1.0, scale)


def round_e4m3(x: Tensor) -> Tensor:
    """The nearest FP8 E4M3 value of float32 values in [0, 448], ties to even; NaN stays NaN."""
    bits = x.view(torch.int32)
    # Three bits of mantissa are left; a carry into the exponent is the right rounding too.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF).view(torch.float32)
    return torch.where(x >= 2.0**-6, normal, (x + _TO_E4M3_MIN) - _TO_E4M3_MIN)


def round_e2m1(x: Tensor) -> Tensor:
    """The nearest FP4 E2M1 value of float32 values, ties to the even code, at most 6; NaN stays NaN, −0 becomes 0."""
    x = x.clamp(-E2M1_MAX, E2M1_MAX)
    # Codes lie ½ apart below 2, 1 apart below 4, then 2: an addition rounds to that.
    power = (x.view(torch.int32) & _EXPONENT).view(torch.float32).clamp_(min=1.0)
    shift = power.mul_(_TO_HALVES)
    return x.add_(shift).sub_(shift)


def block_scales(x: Tensor, scale: Tensor) -> Tensor:
    """s of every block: [..., K / 16] float32 that are E4M3 values.

    Args:
        x: [..., K].
        scale: g, float32, broadcast against [..., K / 16].
    """
    amax = x.unflatten(-1, (-1, BLOCK)).abs().amax(-1).float()
    wanted = amax / (E2M1_MAX * scale)
    scales = round_e4m3(wanted.clamp(E4M3_MIN, E4M3_MAX))
    scales = torch.where(wanted == 0, 1.0, scales)
    return torch.where(amax.isinf(), torch.nan, scales)


def _in_steps(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x / (s g) [..., K / 16, 16], s [..., K / 16] and s g [..., K / 16, 1]."""
    scales = block_scales(x, scale)
    step = (scales * scale).unsqueeze(-1)
    return x.unflatten(-1, (-1, BLOCK)).float() / step, scales, step


def fake_quantize(x: Tensor, scale: Tensor) -> Tensor:
    """x̂, in x's shape and dtype.

    Args:
        x: [..., K].
        scale: g, float32: a scalar, or [E, 1, …] with one for each first index of x.
    """
    steps, _, step = _in_steps(x, scale)
    return round_e2m1(steps).mul_(step).flatten(-2).to(x.dtype)


def quantize(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Two codes per byte [..., K / 2] uint8, and the blocks' scales [..., K / 16] float8_e4m3fn.

    Arguments as of ``fake_quantize``.
    """
    steps, scales, _ = _in_steps(x, scale)
    magnitude = round_e2m1(steps).abs_()
    # From 1 on, exponent and first bit of the mantissa count the codes.
    codes = torch.where(magnitude < 1, (magnitude * 2).int(), (magnitude.view(torch.int32) >> 22) - 252)
    codes = (codes + 8 * (steps < 0)).flatten(-2).to(torch.uint8)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), scales.to(torch.float8_e4m3fn)


def dequantize(packed: Tensor, scales: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x̂ [..., K] in ``dtype``; equal to ``fake_quantize`` of what was packed, bit for bit.

    Args:
        packed: [..., K / 2] uint8.
        scales: [..., K / 16] float8_e4m3fn.
        scale: g, float32, as of ``fake_quantize``.
    """
    table = torch.tensor([*VALUES, 0.0, *(-value for value in VALUES[1:])], device=packed.device)
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    step = (scales.float() * scale).unsqueeze(-1)
    return (table[codes.int()].unflatten(-1, (-1, BLOCK)) * step).flatten(-2).to(dtype)

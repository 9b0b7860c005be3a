"""A running sum of matrices in 24 bits per number: the low-memory path's ∂loss/∂hidden.

A sum over dozens of slabs loses its digits in bfloat16, and in float32 it takes twice the memory of the result. Here
the upper 16 bits of each float32 lie in the place of the bfloat16 result and the next 8 in a byte beside it: 16 bits
of mantissa, 2⁻¹⁷ per addition, where the final rounding to bfloat16 is 2⁻⁹.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd._kernels.tuning import tile


@triton.jit
def _load24(high, low, place, inside):
    """float32 from its upper 16 and next 8 bits."""
    upper = tl.load(high + place, mask=inside, other=0).to(tl.int32)
    return ((upper << 16) | (tl.load(low + place, mask=inside, other=0).to(tl.int32) << 8)).to(tl.float32, bitcast=True)


@triton.jit
def add24_kernel(high, low, addend, count, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """(high, low) += addend, or = addend where FIRST."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    value = tl.load(addend + place, mask=inside, other=0.0)
    if not FIRST:
        value += _load24(high, low, place, inside)
    # Half of the last bit kept; a carry into the exponent is the right rounding too.
    bits = value.to(tl.int32, bitcast=True) + 0x80
    tl.store(high + place, (bits >> 16).to(tl.int16), mask=inside)
    tl.store(low + place, ((bits >> 8) & 0xFF).to(tl.uint8), mask=inside)


@triton.jit
def read24_kernel(high, low, out, count, BLOCK: tl.constexpr):
    """out = (high, low) in float32."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    tl.store(out + place, _load24(high, low, place, inside), mask=inside)


class Sum24:
    """Sums of [n, D] matrices; ``place`` [n, D] bfloat16, contiguous, holds the upper bits until ``read``."""

    def __init__(self, place: Tensor):
        self.high = place.view(torch.int16)
        self.low = place.new_empty(place.shape, dtype=torch.uint8)

    def add(self, rows: slice, values: Tensor, first: bool) -> None:
        """[rows] += values [c, D] float32, contiguous; ``first``: = values."""
        block, warps = tile("sum24", values.device)
        if count := values.numel():
            add24_kernel[(triton.cdiv(count, block),)](
                self.high[rows], self.low[rows], values, count, FIRST=first, BLOCK=block, num_warps=warps
            )

    def read(self, rows: slice, out: Tensor) -> Tensor:
        """``out`` [c, D] float32 = [rows]."""
        block, warps = tile("sum24", out.device)
        if count := out.numel():
            read24_kernel[(triton.cdiv(count, block),)](
                self.high[rows], self.low[rows], out, count, BLOCK=block, num_warps=warps
            )
        return out

"""NVFP4 fake quantisation as a Triton program: ``nvfp4.fake_quantize``, bit for bit, in one pass over memory.

E4M3 is rounded with integers, so it runs on chips without FP8. What fixes the bits: division rounds to nearest
(``div_rn``; Triton's ``/`` is an approximation), the amax is taken of bit patterns, which order as the magnitudes do
and put NaN on top, and bfloat16 is rounded here, because the interpreter truncates.

Letters: B blocks of 16 that a program handles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd._kernels import nvfp4
from fastkd._kernels.tuning import tile

BLOCK = tl.constexpr(nvfp4.BLOCK)
INFINITY = tl.constexpr(0x7F800000)


@triton.jit
def round_e4m3(x):
    """``nvfp4.round_e4m3`` of positive values."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    return tl.where(x >= 0.015625, normal, (x + 16384.0) - 16384.0)


@triton.jit
def round_e2m1(x):
    """``nvfp4.round_e2m1`` of values that are not NaN."""
    x = tl.minimum(tl.maximum(x, -6.0), 6.0)
    shift = tl.maximum((x.to(tl.int32, bitcast=True) & INFINITY).to(tl.float32, bitcast=True), 1.0) * 6291456.0
    return (x + shift) - shift


@triton.jit
def fake_quantize_kernel(x, scale, out, blocks, per_scale, BLOCKS: tl.constexpr):
    """out = x̂ for BLOCKS blocks.

    Args:
        x, out: [blocks, 16] of one dtype, contiguous.
        scale: float32; block b has g = scale[b / per_scale].
        blocks: of the tensor.
        per_scale: blocks that share a g.
    """
    block_B = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside_B = block_B < blocks
    place = block_B[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    value = tl.load(x + place, mask=inside_B[:, None], other=0.0).to(tl.float32)
    g_B = tl.load(scale + block_B // per_scale, mask=inside_B, other=1.0)

    magnitude = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    top_B = tl.max(magnitude, 1)
    amax_B = top_B.to(tl.float32, bitcast=True)
    wanted_B = tl.div_rn(amax_B, g_B * 6.0)
    s_B = round_e4m3(tl.minimum(tl.maximum(wanted_B, 0.001953125), 448.0))
    s_B = tl.where(wanted_B == 0.0, 1.0, s_B)
    step_B = tl.where(top_B >= INFINITY, float("nan"), s_B * g_B)

    step = tl.broadcast_to(step_B[:, None], value.shape)
    result = round_e2m1(tl.div_rn(value, step)) * step
    # minimum and maximum drop NaN.
    result = tl.where(step == step, result, float("nan"))
    if out.dtype.element_ty == tl.bfloat16:
        bits = result.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        result = tl.where(step == step, rounded, result)
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside_B[:, None])


def fake_quantize(x: Tensor, scale: Tensor) -> Tensor:
    """``nvfp4.fake_quantize`` of float32, bfloat16 or float16."""
    x = x.contiguous()
    out = torch.empty_like(x)
    blocks = x.numel() // nvfp4.BLOCK
    if blocks:
        size, warps = tile("nvfp4", x.device)
        fake_quantize_kernel[(triton.cdiv(blocks, size),)](
            x, scale.contiguous(), out, blocks, blocks // scale.numel(), BLOCKS=size, num_warps=warps
        )
    return out

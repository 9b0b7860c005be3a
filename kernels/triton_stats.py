"""The passes over a chunk of logits on a GPU: poison the kept ids, measure the rest in one read, write dlogits.

Bound by memory: ``tail_stats`` reads the chunk once, ``write_dlogits`` reads it once more and writes bfloat16 dlogits
over it. One program handles one row, so that a row's sums have a fixed order and its dlogits can be narrowed in place:
column j is written at byte 2j, behind the reading at byte 4j, with a barrier in between because the warps of a program
drift apart.

A running maximum per lane (each column of the program's block) makes the streaming logsumexp cost one power per
logit: with d the distance to the maximum so far, 2^−|d| rescales either the new term or the old sum.

Letters: c rows of one chunk, V columns of this shard or slab, K kept; [c] row scalars carry no suffix.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd._kernels import row_stats
from fastkd._kernels.rows import LOG_ZERO, LOG_ZERO_BOUND, Objective, RowGradient, Tail
from fastkd._kernels.tuning import tile

_LOG2_E = 1.4426950408889634
_LN_2 = tl.constexpr(0.6931471805599453)
_ZERO = tl.constexpr(LOG_ZERO)
_BOUND = tl.constexpr(LOG_ZERO_BOUND)
_LOWEST = tl.constexpr(-1e38)  # below every logit and LOG_ZERO; finite, so that no difference is NaN
_FAR = tl.constexpr(1e4)  # 2^−10000 is 0: distances are clamped here, so that 0 · distance is 0 and never NaN


@triton.jit
def soft_cap(logit, cap):
    """cap · tanh(logit / cap); what was poisoned stays so."""
    # tanh x = 1 − 2 / (e^2x + 1) has no overflow that is not harmless.
    capped = cap * (1.0 - 2.0 / (tl.exp(2.0 * logit / cap) + 1.0))
    return tl.where(logit < _BOUND, logit, capped)


@triton.jit
def poison_kernel(
    buffer, stride, ids, logits, picked, found, start, columns, kept, cap,
    PICK: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Columns of the kept ids (``columns`` where not held); with PICK their logits, which are overwritten."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < kept
    column = tl.load(ids + row * kept + k, mask=inside, other=0).to(tl.int64) - start
    held = inside & (column >= 0) & (column < columns)
    if logits is not None:
        teacher = tl.load(logits + row * kept + k, mask=inside, other=0.0).to(tl.float32)
        held = held & (teacher != float("-inf"))
    tl.store(found + row * kept + k, tl.where(held, column, columns).to(tl.int32), mask=inside)
    if PICK:
        place = buffer + row * stride + column
        logit = tl.load(place, mask=held, other=_ZERO)
        if CAP:
            logit = soft_cap(logit, cap)
        tl.store(picked + row * kept + k, logit, mask=inside)
        # A row's ids differ, so no other program has read or will read what is overwritten here.
        tl.store(place, tl.full((BLOCK,), _ZERO, tl.float32), mask=held)


@triton.jit
def tail_kernel(
    buffer, stride, lse, highest, mean, lse_raw, columns, scale, cap, CAP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Row statistics of z = logit / T over the poisoned row; ``scale`` is log2(e) / T. See ``row_stats.tail_stats``."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    source = buffer + row * stride
    top = tl.full((BLOCK,), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)  # Σ 2^((x − top) scale)
    weighted = tl.zeros((BLOCK,), tl.float32)  # Σ 2^((x − top) scale) · (x − top) scale
    total_raw = tl.zeros((BLOCK,), tl.float32)  # Σ e^(x − top)
    for first in range(0, columns, BLOCK):
        x = tl.load(source + first + lane, mask=first + lane < columns, other=_ZERO)
        if CAP:
            x = soft_cap(x, cap)
        higher = x > top
        d = tl.minimum(tl.maximum((x - top) * scale, -_FAR), _FAR)
        power = tl.exp2(-tl.abs(d))
        if mean is not None:
            weighted = tl.where(higher, power * (weighted - d * total), weighted + power * d)
        total = tl.where(higher, power * total + 1.0, total + power)
        if lse_raw is not None:
            power = tl.exp(-tl.abs(x - top))
            total_raw = tl.where(higher, power * total_raw + 1.0, total_raw + power)
        top = tl.maximum(top, x)
    best = tl.max(top, 0)
    d = tl.maximum((top - best) * scale, -_FAR)
    power = tl.exp2(d)
    sum_ = tl.sum(total * power, 0)
    some = best > _BOUND
    best_z = best * scale * _LN_2
    tl.store(highest + row, best_z)
    tl.store(lse + row, tl.where(some, best_z + tl.log(sum_), _ZERO))
    if mean is not None:
        weighted = tl.sum(power * (weighted + d * total), 0)
        tl.store(mean + row, tl.where(some, best_z + weighted / sum_ * _LN_2, 0.0))
    if lse_raw is not None:
        sum_ = tl.sum(total_raw * tl.exp(tl.maximum(top - best, -_FAR)), 0)
        tl.store(lse_raw + row, tl.where(some, best + tl.log(sum_), _ZERO))


@triton.jit
def dlogits_kernel(
    buffer, stride, out, out_stride, found, complete, alpha, beta, lse_tail, columns, kept, per_temperature, cap,
    DENSE: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """exp(z − lse_tail)(α + β z) of a row, then its complete values at the kept ids; ``out`` may be ``buffer``."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    source = buffer + row * stride
    target = out + row * out_stride
    if DENSE:
        a = tl.load(alpha + row)
        lse = tl.load(lse_tail + row)
        # An empty tail has no id outside S: α is 0, but the power of a poisoned id would be 1.
        a = tl.where(lse < _BOUND, 0.0, a)
    for first in range(0, columns, BLOCK):
        column = first + lane
        inside = column < columns
        if DENSE:
            x = tl.load(source + column, mask=inside, other=_ZERO)
            slope = 1.0
            if CAP:
                x = soft_cap(x, cap)
                tanh = tl.maximum(x / cap, -1.0)
                slope = 1.0 - tanh * tanh
            z = x * per_temperature
            factor = a
            if beta is not None:
                factor = a + tl.load(beta + row) * tl.maximum(z, -_FAR)
            value = tl.exp(tl.minimum(z - lse, 0.0)) * factor * slope
        else:
            value = tl.zeros((BLOCK,), tl.float32)
        # Every warp has read its part of this block before any warp writes over what may be another's part.
        tl.debug_barrier()
        tl.store(target + column, value.to(out.dtype.element_ty), mask=inside)
    tl.debug_barrier()
    for first in range(0, kept, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        column = tl.load(found + row * kept + k, mask=k < kept, other=columns)
        value = tl.load(complete + row * kept + k, mask=k < kept, other=0.0)
        tl.store(target + column, value.to(out.dtype.element_ty), mask=column < columns)


@triton.jit
def scale_kernel(values, factor, count, BLOCK: tl.constexpr):
    """values *= factor, unless that is 1: then nothing is read."""
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(values + place, mask=place < count, other=0.0).to(tl.float32)
        tl.store(values + place, (value * by).to(values.dtype.element_ty), mask=place < count)


# ---------------------------------------------------------------- the same calls as row_stats


def cap(logits: Tensor, softcap: float | None) -> None:
    """Nothing: the kernels apply the soft-cap as they read."""


def exponents(logits: Tensor, shift: Tensor, o: Objective) -> None:
    """Nothing: ``write_dlogits`` takes logits."""


def _capped(values: Tensor, softcap: float | None) -> Tensor:
    if softcap is None:
        return values
    return torch.where(values < LOG_ZERO_BOUND, values, softcap * torch.tanh(values / softcap))


def pick(buffer: Tensor, ids: Tensor, start: int, columns: int, o: Objective) -> Tensor:
    """See ``row_stats.pick``."""
    return _capped(row_stats.pick(buffer, ids, start, columns, o), o.softcap)


def _find(
    buffer: Tensor, ids_K: Tensor, logits_K: Tensor | None, start: int, columns: int, softcap: float | None, pick: bool
) -> tuple[Tensor, Tensor]:
    c, kept = ids_K.shape
    picked_K = buffer.new_empty((c, kept) if pick else (0,))
    found_K = ids_K.new_empty((c, kept), dtype=torch.int32)
    block, warps = tile("poison", buffer.device)
    block = min(block, triton.next_power_of_2(kept))
    if c:
        poison_kernel[(c, triton.cdiv(kept, block))](
            buffer, buffer.stride(0), ids_K.contiguous(), None if logits_K is None else logits_K.contiguous(),
            picked_K, found_K, start, columns, kept, softcap or 0.0,
            PICK=pick, CAP=softcap is not None, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return picked_K, found_K


def pick_poison(
    buffer: Tensor, ids_K: Tensor, logits_K: Tensor | None, start: int, columns: int, o: Objective
) -> tuple[Tensor, Tensor]:
    """See ``row_stats.pick_poison``; logits are soft-capped on the way out, columns are int32."""
    return _find(buffer, ids_K, logits_K, start, columns, o.softcap, pick=True)


def find_columns(buffer: Tensor, ids_K: Tensor, logits_K: Tensor | None, start: int, columns: int) -> Tensor:
    """See ``row_stats.find_columns``."""
    return _find(buffer, ids_K, logits_K, start, columns, None, pick=False)[1]


def tail_stats(logits: Tensor, o: Objective, *, raw: bool = False) -> Tail:
    """See ``row_stats.tail_stats``; the logits stay."""
    c, columns = logits.shape
    lse, highest, mean, lse_raw = logits.new_empty((4, c)).unbind(0)
    block, warps = tile("tail_stats", logits.device)
    if c:
        tail_kernel[(c,)](
            logits, logits.stride(0), lse, highest, mean if o.needs_tail_mean else None, lse_raw if raw else None,
            columns, _LOG2_E / o.temperature, o.softcap or 0.0, CAP=o.softcap is not None, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return Tail(lse, highest, mean if o.needs_tail_mean else None, lse_raw if raw else None)


def write_dlogits(
    buffer: Tensor,
    columns: int,
    columns_K: Tensor,
    shift: Tensor | None,
    lse_tail: Tensor | None,
    gradient: RowGradient,
    o: Objective,
    dtype: torch.dtype,
) -> Tensor:
    """See ``row_stats.write_dlogits``: from poisoned logits; the result lies in the buffer, in ``dtype``."""
    c, kept = columns_K.shape
    out = buffer if dtype == buffer.dtype else buffer.view(dtype)  # bfloat16: two columns where one was
    dense = gradient.alpha is not None and lse_tail is not None
    block, warps = tile("write_dlogits", buffer.device)
    if c:
        dlogits_kernel[(c,)](
            buffer, buffer.stride(0), out, out.stride(0), columns_K, gradient.complete_K.contiguous(), gradient.alpha,
            gradient.beta, lse_tail, columns, kept, 1.0 / o.temperature, o.softcap or 0.0,
            DENSE=dense, CAP=o.softcap is not None, BLOCK=block, BLOCK_K=min(1024, triton.next_power_of_2(kept)),
            num_warps=warps,
        )  # fmt: skip
    return out[:, :columns]


def scale_unless_one(values: Tensor, factor: Tensor) -> None:
    """values *= factor (a scalar on the device); the factor 1 costs a launch, not a pass over ``values``."""
    if values.dtype == torch.float64 or not values.is_contiguous():
        values.mul_(factor)
    elif values.numel():
        block = 4096
        scale_kernel[(triton.cdiv(values.numel(), block),)](values, factor, values.numel(), BLOCK=block, num_warps=8)

"""The dense passes over a chunk of logits: poison the kept ids, measure the rest, write dlogits.

These are the memory-bound sweeps between the GEMMs, and the functions a GPU kernel replaces one for one. On the CPU
they walk over blocks of rows that fit a core's cache, so that the sweeps of one pass cost one trip to memory, and the
measuring pass leaves its exponentials in place of the logits: the writing pass is then a single multiplication.
Powers are of two: x = logit · log2(e) / T − max is one fused multiply-add, and torch's exp2 keeps its speed where exp
drops to a tenth of it, on arguments that underflow, which every poisoned id is.

Letters: c rows of one chunk, V columns of this shard or slab, K kept; [c] row scalars carry no suffix.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastkd._kernels.rows import LOG_ZERO, LOG_ZERO_BOUND, RowGradient, Tail

# Bytes of a block of rows: with its scratch it should stay in the second-level caches of a few cores.
_BLOCK_BYTES = 1 << 21
_LOG2_E = 1.0 / math.log(2.0)


def blocks(rows: int, columns: int, itemsize: int, device: torch.device) -> list[slice]:
    """Slices of rows that fit a core's cache; one slice on accelerators, where launches cost more than memory."""
    step = max(1, _BLOCK_BYTES // max(1, columns * itemsize)) if device.type == "cpu" else max(1, rows)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def gather_poison(buffer: Tensor, columns_K: Tensor) -> Tensor:
    """Take the K logits of each row aside and overwrite them with LOG_ZERO. ``buffer`` [c, ≥ V + 1]."""
    picked_K = buffer.gather(1, columns_K)
    buffer.scatter_(1, columns_K, LOG_ZERO)
    return picked_K


def pick(chunk: Tensor, columns: Tensor, trash: int) -> Tensor:
    """One logit per row, LOG_ZERO where its id is not held here (column ``trash``)."""
    values = chunk.gather(1, columns[:, None]).squeeze(1)
    return values.masked_fill(columns == trash, LOG_ZERO)


def tail_stats(
    logits: Tensor,
    temperature: float,
    *,
    mean: bool = False,
    raw: bool = False,
    linear: bool = False,
    top: Tensor | None = None,
) -> Tail:
    """Logsumexp, maximum and (on request) mean of a chunk of poisoned logits [c, V], which is used up.

    Instead of the logits it holds exp(z − max) afterwards, or with ``linear`` (z − max) · log2(e), as
    ``write_dlogits`` expects.
    ``raw`` asks for the logsumexp at T = 1 too; ``top`` [c] is the maximum where it is known already. An empty tail
    (all poisoned) comes out as LOG_ZERO.
    """
    c, columns = logits.shape
    if columns == 0 or c == 0:
        empty = logits.new_full((c,), LOG_ZERO)
        return Tail(empty, empty, empty if mean else None, empty if raw else None)
    total, total_raw, weighted, measured = logits.new_empty((4, c))
    parts = blocks(c, columns, logits.element_size(), logits.device)
    scratch = logits.new_empty((parts[0].stop, columns))
    known = None if top is None else _origin(top, temperature)
    for rows in parts:
        block = logits[rows]
        other = scratch[: block.shape[0]]
        if known is None:
            torch.amax(block, 1, out=measured[rows])
            origin = _origin(measured[rows], temperature)
        else:
            origin = known[rows]
        # Exponents in one place, powers in the other; which of them replaces the logits is the caller's choice.
        x, powers = (block, other) if linear else (other, block)
        if raw:
            torch.add(origin * temperature, block, alpha=_LOG2_E, out=other)
            torch.sum(other.exp2_(), 1, out=total_raw[rows])
        torch.add(origin, block, alpha=_LOG2_E / temperature, out=x)
        torch.sum(torch.exp2(x, out=powers), 1, out=total[rows])
        if mean:
            torch.sum(torch.mul(x, powers, out=other), 1, out=weighted[rows])
    top = measured if top is None else top
    top_z = top / temperature
    some = total > 0
    return Tail(
        lse=torch.where(some, top_z + total.log(), LOG_ZERO),
        max=top_z,
        mean=torch.where(some, top_z + weighted / total / _LOG2_E, 0.0) if mean else None,
        lse_raw=torch.where(some, top + total_raw.log(), LOG_ZERO) if raw else None,
    )


def _origin(highest: Tensor, temperature: float) -> Tensor:
    """What is added to logits · log2(e) / T so that the highest becomes 0, as a column; 0 for an empty tail."""
    return (highest * (-_LOG2_E / temperature)).masked_fill_(highest < LOG_ZERO_BOUND, 0.0)[:, None]


def exponents(logits: Tensor, temperature: float, shift: Tensor, linear: bool) -> None:
    """Turn logits [c, V] into what ``tail_stats`` leaves, for a known ``shift`` [c] in units of z."""
    origin = _origin(shift, 1.0)
    for rows in blocks(len(logits), logits.shape[1], logits.element_size(), logits.device):
        block = logits[rows]
        torch.add(origin[rows], block, alpha=_LOG2_E / temperature, out=block)
        if not linear:
            block.exp2_()


def write_dlogits(chunk: Tensor, shift: Tensor | None, lse_tail: Tensor | None, gradient: RowGradient) -> None:
    """Overwrite a chunk [c, V] with exp(z − lse_tail)(α + β z); the kept ids are written afterwards.

    ``chunk`` holds exp(z − shift), or (z − shift) · log2(e) when there is a β. Kept ids may hold anything.
    Without α (or a tail that was measured) there is no dense part.
    """
    if gradient.alpha is None or shift is None or lse_tail is None:
        chunk.zero_()
        return
    rescale = torch.exp(shift - lse_tail)
    alpha = gradient.alpha * rescale
    if gradient.beta is None:
        chunk.mul_(alpha[:, None])
        return
    beta = gradient.beta * rescale
    alpha = alpha + beta * shift
    beta = beta / _LOG2_E
    parts = blocks(len(chunk), chunk.shape[1], chunk.element_size(), chunk.device)
    scratch = chunk.new_empty((parts[0].stop, chunk.shape[1])) if parts else chunk
    for rows in parts:
        block = chunk[rows]
        factor = torch.addcmul(alpha[rows, None], block, beta[rows, None], out=scratch[: len(block)])
        block.exp2_().mul_(factor)

"""The dense passes over a chunk of logits: poison the kept ids, measure the rest, write dlogits.

These are the memory-bound sweeps between the GEMMs, and the functions a GPU kernel replaces one for one. On the CPU
they walk over blocks of rows that fit a core's cache, so that the two to four sweeps of each cost one trip to memory.

Letters: c rows of one chunk, V columns of this shard or slab, K kept; [c] row scalars carry no suffix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd._kernels.rows import LOG_ZERO, RowGradient, Tail

# Bytes of a block of rows that the dense passes work on at a time, so that its 2-4 sweeps hit the cache.
_BLOCK_BYTES = 1 << 21


def gather_poison(buffer: Tensor, columns_K: Tensor) -> Tensor:
    """Take the K logits of each row aside and overwrite them with LOG_ZERO. ``buffer`` [c, ≥ V + 1]."""
    picked_K = buffer.gather(1, columns_K)
    buffer.scatter_(1, columns_K, LOG_ZERO)
    return picked_K


def blocks(rows: int, columns: int, itemsize: int, device: torch.device) -> list[slice]:
    """Slices of rows that fit a core's cache; one slice on accelerators, where launches cost more than memory."""
    if rows == 0 or columns == 0:
        return []
    step = max(1, _BLOCK_BYTES // (columns * itemsize)) if device.type == "cpu" else rows
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def tail_stats(logits: Tensor, temperature: float, mean: bool, raw: bool) -> Tail:
    """Logsumexp, maximum and (on request) mean of a chunk of poisoned logits [c, V].

    An empty tail (all poisoned) comes out as LOG_ZERO-sized lse and max. ``raw``: also the logsumexp at T = 1.
    """
    c, columns = logits.shape
    shape = (4, c)
    top, total, total_raw, weighted = logits.new_empty(shape)
    if columns == 0:
        empty = logits.new_full((c,), LOG_ZERO)
        return Tail(empty, empty, empty if mean else None, empty if raw else None)
    parts = blocks(c, columns, logits.element_size(), logits.device)
    step = parts[0].stop - parts[0].start if parts else 0
    shifted = logits.new_empty((step, columns))
    powers = logits.new_empty((step, columns)) if mean or raw else shifted
    for rows in parts:
        block = logits[rows]
        torch.amax(block, 1, out=top[rows])
        x, e = shifted[: len(block)], powers[: len(block)]
        torch.sub(block, top[rows, None], out=x)
        if raw:
            torch.sum(torch.exp(x, out=e), 1, out=total_raw[rows])
        if temperature != 1.0:
            x.mul_(1.0 / temperature)
        torch.sum(torch.exp(x, out=e), 1, out=total[rows])
        if mean:
            torch.sum(e.mul_(x), 1, out=weighted[rows])
    top_z = top / temperature
    return Tail(
        lse=top_z + total.log(),
        max=top_z,
        mean=top_z + weighted / total if mean else None,
        lse_raw=top + total_raw.log() if raw else None,
    )


def write_dlogits(logits: Tensor, lse_tail: Tensor, temperature: float, gradient: RowGradient) -> None:
    """Overwrite a chunk of logits [c, V] with exp(z − lse_tail)(α + β z); kept ids are written afterwards."""
    if gradient.alpha is None:
        logits.zero_()
        return
    c, columns = logits.shape
    shift = lse_tail[:, None]
    for rows in blocks(c, columns, logits.element_size(), logits.device):
        block = logits[rows]
        if temperature != 1.0:
            block.mul_(1.0 / temperature)
        # The block may hold logits of kept ids above lse_tail; their result is overwritten, inf or not.
        if gradient.beta is None:
            block.sub_(shift[rows]).exp_().mul_(gradient.alpha[rows, None])
        else:
            factor = torch.addcmul(gradient.alpha[rows, None], block, gradient.beta[rows, None])
            block.sub_(shift[rows]).exp_().mul_(factor)


def pick(chunk: Tensor, columns: Tensor, trash: int) -> Tensor:
    """One logit per row, LOG_ZERO where its id is not held here (column ``trash``)."""
    values = chunk.gather(1, columns[:, None]).squeeze(1)
    return values.masked_fill(columns == trash, LOG_ZERO)

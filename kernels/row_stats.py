"""The dense passes over a chunk of logits: poison the kept ids, measure the rest, write dlogits.

These are the memory-bound sweeps between the GEMMs, and the functions a GPU kernel replaces one for one. On the CPU
they walk over blocks of rows that fit a core's cache, so that the sweeps of one pass cost one trip to memory, and the
measuring pass leaves its exponentials in place of the logits: the writing pass is then a single multiplication.

Letters: c rows of one chunk, V columns of this shard or slab, K kept; [c] row scalars carry no suffix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd._kernels.rows import LOG_ZERO, LOG_ZERO_BOUND, RowGradient, Tail

# Bytes of a block of rows: with its scratch it should stay in the second-level caches of a few cores.
_BLOCK_BYTES = 1 << 21


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

    Instead of the logits it holds exp(z − max) afterwards, or with ``linear`` z − max, as ``write_dlogits`` expects.
    ``raw`` asks for the logsumexp at T = 1 too; ``top`` [c] is the maximum where it is known already. An empty tail
    (all poisoned) comes out as LOG_ZERO.
    """
    c, columns = logits.shape
    if columns == 0 or c == 0:
        empty = logits.new_full((c,), LOG_ZERO)
        return Tail(empty, empty, empty if mean else None, empty if raw else None)
    found = logits.new_empty((4, c))
    if top is None:
        top = found[3]
        measure = True
    else:
        measure = False
    total, total_raw, weighted = found[0], found[1], found[2]
    parts = blocks(c, columns, logits.element_size(), logits.device)
    scratch = logits.new_empty((parts[0].stop, columns))
    for rows in parts:
        block = logits[rows]
        other = scratch[: block.shape[0]]
        if measure:
            torch.amax(block, 1, out=top[rows])
        # Exponents in one place, powers in the other; which of them replaces the logits is the caller's choice.
        x, powers = (block, other) if linear else (other, block)
        torch.sub(block, top[rows, None], out=x)
        if raw:
            torch.sum(torch.exp(x, out=powers), 1, out=total_raw[rows])
        if temperature != 1.0:
            x.mul_(1.0 / temperature)
        torch.sum(torch.exp(x, out=powers), 1, out=total[rows])
        if mean:
            torch.sum(torch.mul(x, powers, out=other), 1, out=weighted[rows])
    top_z = top / temperature
    lse = top_z + total.log()
    return Tail(
        lse=torch.where(lse < LOG_ZERO_BOUND, LOG_ZERO, lse),
        max=top_z,
        mean=top_z + weighted / total if mean else None,
        lse_raw=top + total_raw.log() if raw else None,
    )


def exponents(logits: Tensor, temperature: float, shift: Tensor, linear: bool) -> None:
    """Turn logits [c, V] into what ``tail_stats`` leaves, for a known ``shift`` [c] in units of z."""
    for rows in blocks(*logits.shape, logits.element_size(), logits.device):
        block = logits[rows]
        if temperature != 1.0:
            block.mul_(1.0 / temperature)
        block.sub_(shift[rows, None])
        if not linear:
            block.exp_()


def write_dlogits(chunk: Tensor, shift: Tensor, lse_tail: Tensor, gradient: RowGradient) -> None:
    """Overwrite a chunk [c, V] with exp(z − lse_tail)(α + β z); the kept ids are written afterwards.

    ``chunk`` holds exp(z − shift), or z − shift when there is a β. Entries of kept ids may be anything.
    """
    if gradient.alpha is None:
        chunk.zero_()
        return
    rescale = torch.exp(shift - lse_tail)
    alpha = gradient.alpha * rescale
    if gradient.beta is None:
        chunk.mul_(alpha[:, None])
        return
    beta = gradient.beta * rescale
    alpha = alpha + beta * shift
    for rows in blocks(*chunk.shape, chunk.element_size(), chunk.device):
        block = chunk[rows]
        factor = torch.addcmul(alpha[rows, None], block, beta[rows, None])
        block.exp_().mul_(factor)

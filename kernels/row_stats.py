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

from fastkd._kernels.rows import LOG_ZERO, LOG_ZERO_BOUND, Objective, RowGradient, Tail, columns_of, on_host

# Bytes of a block of rows: with its scratch it should stay in the second-level caches of a few cores.
_BLOCK_BYTES = 1 << 21
_LOG2_E = 1.0 / math.log(2.0)


def blocks(rows: int, columns: int, itemsize: int, device: torch.device) -> list[slice]:
    """Slices of rows that fit a core's cache; one slice on accelerators, where launches cost more than memory."""
    if not on_host(device):
        return [slice(0, rows)] if rows else []
    # A multiple of the threads: sums go by rows, and one row too many makes all threads but one wait.
    threads = torch.get_num_threads()
    step = -(-max(1, _BLOCK_BYTES // max(1, columns * itemsize)) // threads) * threads
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def cap(logits: Tensor, softcap: float | None) -> None:
    """logits [c, V] → softcap · tanh(logits / softcap), in place; nothing without a soft-cap."""
    if softcap is None:
        return
    for rows in blocks(len(logits), logits.shape[1], logits.element_size(), logits.device):
        logits[rows].div_(softcap).tanh_().mul_(softcap)


def pick(buffer: Tensor, ids: Tensor, start: int, columns: int, o: Objective) -> Tensor:
    """One logit per row [c], LOG_ZERO where its id [c] is not held here. Arguments as of ``pick_poison``."""
    column = columns_of(ids, start, columns)
    return buffer.gather(1, column[:, None]).squeeze(1).masked_fill_(column == columns, LOG_ZERO)


def pick_poison(
    buffer: Tensor, ids_K: Tensor, logits_K: Tensor | None, start: int, columns: int, o: Objective
) -> tuple[Tensor, Tensor]:
    """Take the logits of each row's kept ids aside, and overwrite them with LOG_ZERO.

    Args:
        buffer: [c, ≥ V + 1] logits of the ids from ``start`` on, and the trash column ``columns``.
        ids_K: [c, K] ids.
        logits_K: [c, K] the teacher's, where some may be −inf: those entries are ignored (None: all count).
        start: id of column 0.
        columns: V.
        o: the objective (its soft-cap has been applied by ``cap`` here).

    Returns:
        (logits [c, K], LOG_ZERO for ids that are ignored or not held here; their columns [c, K], else ``columns``).
    """
    columns_K = find_columns(buffer, ids_K, logits_K, start, columns)
    buffer[:, columns] = LOG_ZERO
    picked_K = buffer.gather(1, columns_K)
    poison(buffer, columns_K)
    return picked_K, columns_K


def poison(buffer: Tensor, columns_K: Tensor) -> None:
    """Overwrite the logits in columns [c, K] of each row with LOG_ZERO."""
    # A tensor of values, not a scalar: torch's scatter of a scalar is some six times slower on the CPU.
    buffer.scatter_(1, columns_K, buffer.new_full((1, 1), LOG_ZERO).expand_as(columns_K))


def find_columns(buffer: Tensor, ids_K: Tensor, logits_K: Tensor | None, start: int, columns: int) -> Tensor:
    """The columns [c, K] that ``pick_poison`` reports, without touching the buffer."""
    return columns_of(ids_K, start, columns, None if logits_K is None else ~torch.isneginf(logits_K))


def tail_stats(
    logits: Tensor, o: Objective, *, raw: bool = False, top: Tensor | None = None, keep: bool = True
) -> Tail:
    """Logsumexp, maximum and (where ``o`` needs it) mean of a chunk of poisoned logits [c, V], which is used up.

    Instead of the logits it holds exp(z − max) afterwards, or (z − max) · log2(e) where ``o.keeps_exponents``, as
    ``write_dlogits`` expects.
    Without ``keep`` (and without a mean) the logits stay, which spares their memory a write.
    ``raw`` asks for the logsumexp at T = 1 too; ``top`` [c] is the maximum where it is known already. An empty tail
    (all poisoned) comes out as LOG_ZERO.
    """
    c, columns = logits.shape
    temperature, mean, linear = o.temperature, o.needs_tail_mean, o.keeps_exponents
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
        x, powers = (block, other) if linear else (other, block if keep or mean else other)
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


def exponents(logits: Tensor, shift: Tensor, o: Objective) -> None:
    """Turn logits [c, V] into what ``tail_stats`` leaves, for a known ``shift`` [c] in units of z."""
    origin = _origin(shift, 1.0)
    for rows in blocks(len(logits), logits.shape[1], logits.element_size(), logits.device):
        block = logits[rows]
        torch.add(origin[rows], block, alpha=_LOG2_E / o.temperature, out=block)
        if not o.keeps_exponents:
            block.exp2_()


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
    """∂loss/∂logits [c, V] in the logits' place: exp(z − lse_tail)(α + β z), and the complete values at S.

    Args:
        buffer: [c, ≥ V + 1], holding exp(z − shift), or (z − shift) · log2(e) where ``o.keeps_exponents``.
        columns: V.
        columns_K: [c, K] where the kept ids are.
        shift: [c] in units of z.
        lse_tail: [c] the tail's logsumexp; without it, or without α, there is no dense part.
        gradient: of the logits; the soft-cap's slope is already in its complete values, and applied to the rest here.
        o: the objective.
        dtype: of the result.
    """
    chunk = buffer[:, :columns]
    if gradient.alpha is None or shift is None or lse_tail is None:
        chunk.zero_()
    else:
        _write_tail(chunk, shift, torch.exp(shift - lse_tail), gradient.alpha, gradient.beta, o)
    buffer.scatter_(1, columns_K, gradient.complete_K.to(buffer.dtype))
    return chunk.to(dtype)


def _write_tail(
    chunk: Tensor, shift: Tensor, rescale: Tensor, alpha: Tensor, beta: Tensor | None, o: Objective
) -> None:
    alpha = alpha * rescale
    if not o.keeps_exponents:
        chunk.mul_(alpha[:, None])
        return
    if beta is not None:
        beta = beta * rescale
        alpha, beta = alpha + beta * shift, beta / _LOG2_E
    parts = blocks(len(chunk), chunk.shape[1], chunk.element_size(), chunk.device)
    scratch = chunk.new_empty((2 if o.softcap is not None else 1, parts[0].stop, chunk.shape[1])) if parts else chunk
    for rows in parts:
        block = chunk[rows]
        factor = scratch[0, : len(block)]
        if beta is None:
            factor.copy_(alpha[rows, None].expand_as(factor))
        else:
            torch.addcmul(alpha[rows, None], block, beta[rows, None], out=factor)
        if o.softcap is not None:
            # z · T / c is the tanh; its slope 1 − tanh². Poisoned ids lie far outside of [−1, 1].
            tanh, scale = scratch[1, : len(block)], o.temperature / o.softcap
            torch.add(shift[rows, None] * scale, block, alpha=scale / _LOG2_E, out=tanh).clamp_(-1.0, 1.0)
            factor.addcmul_(factor, tanh.square_(), value=-1.0)
        block.exp2_().mul_(factor)

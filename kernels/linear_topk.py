"""The teacher's head: exact top-K of hidden · weightᵀ per row, a chunk of logits at a time, none kept.

A chunk is some rows, whole; on a CPU, where few of them fit, a strided part of many rows (``strided_topk``).

With a group, every rank selects exactly among its own ids, rows are dealt out over the ranks (all-to-all) so that
each merges N / R of them, and the merged rows are gathered. Dropped candidates join the tail, so its logsumexp stays
a sum of positive terms.

Letters: N tokens, c rows of a chunk, D hidden, V valid vocabulary rows of this shard, K kept, R ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fastkd._kernels import row_stats, strided_topk
from fastkd._kernels.gemm import HeadGemms
from fastkd._kernels.row_topk import padded_columns, row_topk, select
from fastkd._kernels.rows import (
    LOG_ZERO,
    LOG_ZERO_BOUND,
    Objective,
    TopK,
    chunks,
    compute_dtype,
    leading_dimension,
    on_host,
)
from fastkd._kernels.tuning import use_triton
from fastkd._kernels.vocab_parallel import Shards

# Logits that are selected from at a time on the CPU: enough for all threads, and for calls on small vocabularies.
_SELECT_BYTES = 40 << 20


def linear_topk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    *,
    temperature: float,
    softcap: float | None,
    columns: int,
    vocab_start: int,
    chunk_bytes: int,
    shards: Shards,
) -> TopK:
    """Top-K of N rows; see ``fastkd.kernels.vocab_topk`` for the checked, public form."""
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        bias = None if bias is None else bias[:columns]
        local = _local_topk(hidden, weight[:columns], bias, min(k, columns), temperature, softcap, chunk_bytes)
        local.indices.add_(vocab_start)
        merged = _merge(local, k, temperature, softcap, shards) if shards.parallel else local
        merged = merged._replace(logits=_capped(merged.logits, softcap))
    tail = merged.tail_logsumexp
    assert tail is not None
    return merged._replace(tail_logsumexp=tail.masked_fill(tail == LOG_ZERO, -torch.inf))


def _local_topk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    temperature: float,
    softcap: float | None,
    chunk_bytes: int,
) -> TopK:
    """Top-K among the ids held here: local ids, logits before the soft-cap, logsumexps after it."""
    n, columns = hidden.shape[0], weight.shape[0]
    dtype = compute_dtype(weight.dtype)
    make = hidden.new_empty
    result = TopK(
        make((n, k), dtype=torch.int32), make((n, k), dtype=dtype), make(n, dtype=dtype), make(n, dtype=dtype)
    )
    gemms = HeadGemms(weight, chunk_bytes // 4)
    blocks = None
    if on_host(hidden.device) and softcap is None and not use_triton(hidden.device, dtype):
        blocks = strided_topk.arrange(n, columns, k, dtype.itemsize, chunk_bytes)
    if blocks is None:
        _whole_rows(result, hidden, gemms, bias, temperature, softcap, chunk_bytes)
        return result
    left = []
    for start in range(0, n, blocks.rows):
        rows = slice(start, min(start + blocks.rows, n))
        found, settled = strided_topk.strided_topk(gemms.activations(hidden[rows]), gemms, bias, k, temperature, blocks)
        _store(result, rows, found)
        left.append((~settled).nonzero().squeeze(1) + start)
    rest = torch.cat(left)
    if len(rest):
        again = result.map(lambda whole: whole[rest])
        _whole_rows(again, hidden[rest], gemms, bias, temperature, softcap, chunk_bytes)
        _store(result, rest, again)
    return result


def _whole_rows(
    result: TopK,
    hidden: Tensor,
    gemms: HeadGemms,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    chunk_bytes: int,
) -> None:
    """Fill ``result`` [n, K], selecting from whole rows of logits."""
    (n, k), columns, dtype = result.indices.shape, len(gemms.weight), gemms.dtype
    leading = leading_dimension(padded_columns(columns, k))
    by_triton = use_triton(hidden.device, dtype)
    buffer = None
    for part in chunks(n, leading * dtype.itemsize, chunk_bytes - gemms.scratch_bytes):
        c = part.stop - part.start
        if buffer is None:
            buffer = hidden.new_empty((c, leading), dtype=dtype)
            buffer[:, columns:] = -torch.inf  # the lanes' padding; GEMMs write in front of it
        chunk, logits = buffer[:c], buffer[:c, :columns]
        gemms.logits(gemms.activations(hidden[part]), logits)
        if bias is not None:
            logits.add_(bias).clamp_(min=LOG_ZERO)  # a bias of −inf masks an id
        if by_triton:
            from fastkd._kernels.triton_topk import topk_rows

            _store(result, part, topk_rows(chunk, columns, k, temperature, softcap))
            continue
        # A selection needs about a sixth of the logits' memory again: a block of rows at a time it hardly counts.
        step = max(1, _SELECT_BYTES // (leading * dtype.itemsize)) if on_host(hidden.device) else c
        for first in range(0, c, step):
            rows = slice(first, min(first + step, c))
            found = _select(chunk[rows], columns, k, temperature, softcap)
            _store(result, slice(part.start + rows.start, part.start + rows.stop), found)


def _store(result: TopK, rows: slice | Tensor, found: TopK) -> None:
    for whole, part in zip(result, found, strict=True):
        whole[rows] = part  # type: ignore[index]


def _select(buffer: Tensor, columns: int, k: int, temperature: float, softcap: float | None) -> TopK:
    """The same of one chunk of logits, which is used up."""
    logits = buffer[:, :columns]
    chosen_K, runner_up = row_topk(buffer, columns, k)
    picked_K = logits.gather(1, chosen_K)
    # The cap preserves order, so the selection stands; where it makes logits equal, the uncapped ones have decided.
    if softcap is not None:
        masked = logits < LOG_ZERO_BOUND
        row_stats.cap(logits, softcap)
        logits.masked_fill_(masked, LOG_ZERO)
        runner_up = None
    capped_K = picked_K if softcap is None else logits.gather(1, chosen_K)
    row_stats.poison(logits, chosen_K)
    tail = row_stats.tail_stats(logits, Objective(temperature=temperature, stats=False), top=runner_up, keep=False).lse
    return TopK(chosen_K, picked_K, torch.logaddexp((capped_K / temperature).logsumexp(1), tail), tail)


def _merge(local: TopK, k: int, temperature: float, softcap: float | None, shards: Shards) -> TopK:
    """Exact top-K over all ranks' candidates, for all rows, on every rank."""
    assert local.tail_logsumexp is not None
    n, dtype, size = local.logits.shape[0], local.logits.dtype, shards.size
    # Every rank sends k candidates per row (−inf where its shard is smaller) and its tail: equal blocks of rows.
    each = -(-n // size)
    values_K = local.logits.new_full((each * size, k), -torch.inf)
    values_K[:n, : local.logits.shape[1]] = local.logits
    ids_K = local.indices.new_full((each * size, k), torch.iinfo(torch.int32).max)
    ids_K[:n, : local.indices.shape[1]] = local.indices
    tails = local.logits.new_full((each * size,), LOG_ZERO)
    tails[:n] = local.tail_logsumexp

    def deal(rows: Tensor) -> Tensor:
        """[R, each, …]: this rank's block of rows, from every rank."""
        received = torch.empty_like(rows)
        dist.all_to_all_single(received, rows, group=shards.group)
        return received.unflatten(0, (size, each))

    ids_M = deal(ids_K).movedim(0, 1).flatten(1)
    values_M = deal(values_K).movedim(0, 1).flatten(1)
    tail = deal(tails).logsumexp(0)
    # By id, so that a tie goes to the lower id however the shards are ordered among the ranks.
    ids_M, order_M = ids_M.sort(1)
    values_M = values_M.gather(1, order_M)
    places_K = select(values_M, k)
    ids_K, values_K = ids_M.gather(1, places_K), values_M.gather(1, places_K)
    z_M = _capped(values_M, softcap) / temperature
    tail = torch.logaddexp(tail, z_M.scatter(1, places_K, -torch.inf).logsumexp(1).clamp(min=LOG_ZERO))
    lse = torch.logaddexp(z_M.gather(1, places_K).logsumexp(1), tail)

    def collect(rows: Tensor) -> Tensor:
        return shards.gather_blocks(rows)[:n]

    return TopK(collect(ids_K), collect(values_K.to(dtype)), collect(lse), collect(tail))


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits after the soft-cap; masked ids and padding are −inf."""
    masked = logits < LOG_ZERO_BOUND
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.masked_fill(masked, -torch.inf)

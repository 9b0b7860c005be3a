"""The teacher's head: exact top-K of hidden · weightᵀ per row, a chunk of rows at a time, logits never kept.

With a group, every rank selects exactly among its own ids, rows are dealt out over the ranks (all-to-all) so that
each merges N / R of them, and the merged rows are gathered. Dropped candidates join the tail, so its logsumexp stays
a sum of positive terms.

Letters: N tokens, c rows of a chunk, D hidden, V valid vocabulary rows of this shard, K kept, R ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fastkd._kernels.gemm import HeadGemms
from fastkd._kernels.row_stats import gather_poison, tail_stats
from fastkd._kernels.row_topk import padded_columns, row_topk, select
from fastkd._kernels.rows import LOG_ZERO, TopK, chunks, compute_dtype, leading_dimension
from fastkd._kernels.vocab_parallel import Shards


def linear_topk(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    temperature: float,
    columns: int,
    vocab_start: int,
    chunk_bytes: int,
    shards: Shards,
) -> TopK:
    """Top-K of N rows; see ``fastkd.kernels.vocab_topk`` for the checked, public form."""
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        local = _local_topk(hidden, weight[:columns], min(k, columns), temperature, chunk_bytes)
        local.indices.add_(vocab_start)
        merged = _merge(local, k, temperature, shards) if shards.parallel else local
    tail = merged.tail_logsumexp
    assert tail is not None
    return merged._replace(tail_logsumexp=tail.masked_fill(tail == LOG_ZERO, -torch.inf))


def _local_topk(hidden: Tensor, weight: Tensor, k: int, temperature: float, chunk_bytes: int) -> TopK:
    n, columns = hidden.shape[0], weight.shape[0]
    dtype = compute_dtype(weight.dtype)
    make = hidden.new_empty
    result = TopK(
        make((n, k), dtype=torch.int32), make((n, k), dtype=dtype), make(n, dtype=dtype), make(n, dtype=dtype)
    )
    assert result.logsumexp is not None and result.tail_logsumexp is not None
    scratch = chunk_bytes // 4 if weight.dtype != dtype and not weight.is_cuda else 0
    gemms = HeadGemms(weight, scratch)
    leading = leading_dimension(padded_columns(columns, k))
    buffer = None
    for part in chunks(n, leading * dtype.itemsize, chunk_bytes - scratch):
        c = part.stop - part.start
        if buffer is None:
            buffer = make((c, leading), dtype=dtype)
            buffer[:, columns:] = -torch.inf  # the lanes' padding; GEMMs write in front of it
        chunk, logits = buffer[:c], buffer[:c, :columns]
        gemms.logits(gemms.activations(hidden[part]), logits)
        chosen_K, runner_up = row_topk(chunk, columns, k)
        picked_K = gather_poison(chunk, chosen_K)
        tail = tail_stats(logits, temperature, top=runner_up).lse
        result.indices[part] = chosen_K
        result.logits[part] = picked_K
        result.tail_logsumexp[part] = tail
        result.logsumexp[part] = torch.logaddexp((picked_K / temperature).logsumexp(1), tail)
    return result


def _merge(local: TopK, k: int, temperature: float, shards: Shards) -> TopK:
    """Exact top-K over all ranks' candidates, for all rows, on every rank."""
    assert local.tail_logsumexp is not None
    n, dtype, size = local.logits.shape[0], local.logits.dtype, shards.size
    device = local.logits.device
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
    dropped_M = values_M.scatter(1, places_K, -torch.inf)
    tail = torch.logaddexp(tail, (dropped_M / temperature).logsumexp(1).clamp(min=LOG_ZERO))
    lse = torch.logaddexp((values_K / temperature).logsumexp(1), tail)

    def collect(rows: Tensor) -> Tensor:
        whole = torch.empty((each * size, *rows.shape[1:]), dtype=rows.dtype, device=device)
        dist.all_gather(list(whole.chunk(size)) if each else [whole] * size, rows.contiguous(), group=shards.group)
        return whole[:n]

    return TopK(collect(ids_K), collect(values_K.to(dtype)), collect(lse), collect(tail))

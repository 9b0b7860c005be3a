"""Context parallelism: one packed batch over several ranks, each with a share of the tokens of every layer.

The N tokens are cut into 2·R equal chunks, and rank r holds chunks r and 2·R-1-r. A token's causal work grows with its
position, so a low and a high chunk together make about the same work on every rank (exactly, for one long sequence).
Everything but attention works on tokens alone. Attention gathers the keys and values of all ranks, few heads under
grouped-query attention (Llama 3 technical report, section 3.3.2), and each rank attends with its own queries.

A *piece* is what a chunk holds of one sequence. Its last query sees keys up to itself, so it attends to the keys from
its sequence's start to the piece's end, aligned at the lower right. The keys of one chunk's pieces lie one after
another in the batch: at most the first piece began in an earlier chunk. Two runs of keys, one for each chunk, are all
that a rank copies, and no mask of [N, N] exists.

Positions, labels and active rows were made before the split; a rank keeps the active rows in its chunks.

Letters: N tokens of the whole batch, R ranks, n = N / R tokens of this rank, S pieces, A active rows, Hkv key/value
heads, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.batch import Batch
from fastkd.collectives import gather, scatter


@dataclass(frozen=True, slots=True)
class Context:
    """What a rank must know of the whole batch: ``Batch.context`` of its share."""

    group: Any
    """The R ranks."""
    rank: int
    """Of this process in the group."""
    active: tuple[int, ...]
    """[2·R + 1] cumulative numbers of active rows in the chunks."""
    runs: tuple[tuple[int, int], ...]
    """Slices of the gathered tokens (chunks in the order of the ranks) that make the keys of the pieces, in order."""
    lengths: tuple[int, ...]
    """[S] keys of each piece, its own tokens the last of them."""
    cu_seqlens: Tensor
    """[S + 1] int32, their cumulative sums."""

    def keys(self, key_nHd: Tensor, value_nHd: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the pieces, from those of this rank's tokens; differentiable.

        Args:
            key_nHd: [n, Hkv, d]; value_nHd: [n, Hkv, d'].

        Returns:
            [sum of ``lengths``, Hkv, d] and the same with d'.
        """
        both = torch.cat((key_nHd, value_nHd), -1)  # one collective
        gathered: Any = _Keys.apply(both, self.runs, self.group)
        key, value = gathered.split((key_nHd.shape[-1], value_nHd.shape[-1]), -1)
        return key, value

    def take(self, x_A: Tensor) -> Tensor:
        """This rank's entries of something that has one for every active row of the whole batch."""
        low, high = self.rank, len(self.active) - 2 - self.rank
        return torch.cat([x_A[self.active[chunk] : self.active[chunk + 1]] for chunk in (low, high)])

    def join(self, x_A: Tensor) -> Tensor:
        """The inverse of :meth:`take`, on all ranks: entries for every active row of the whole batch; no gradient."""
        chunks = len(self.active) - 1
        counts = [end - start for start, end in pairwise(self.active)]
        most = max(counts[chunk] + counts[chunks - 1 - chunk] for chunk in range(chunks // 2))
        if most == 0:
            return x_A
        padded = F.pad(x_A, (0, 0) * (x_A.dim() - 1) + (0, most - len(x_A)))
        gathered = gather(padded, self.group)
        parts = []
        for chunk, count in enumerate(counts):
            owner, second = _owner(chunk, chunks)
            start = owner * most + (counts[owner] if second else 0)
            parts.append(gathered[start : start + count])
        return torch.cat(parts)


def _owner(chunk: int, chunks: int) -> tuple[int, bool]:
    """The rank that holds a chunk, and whether it is the second of its two."""
    return min(chunk, chunks - 1 - chunk), chunk >= chunks // 2


class _Keys(torch.autograd.Function):
    """All ranks' rows, then slices of them. Backward adds the slices up and sums over the ranks.

    Slices, not an index: their gradients are added without atomics, in the same order every time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, runs: Sequence[tuple[int, int]], group: Any) -> Tensor:
        gathered = gather(x, group)
        ctx.runs, ctx.group, ctx.rows = runs, group, len(gathered)
        return torch.cat([gathered[start:end] for start, end in runs])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        total = gradient.new_zeros((ctx.rows, *gradient.shape[1:]))
        for (start, end), part in zip(ctx.runs, gradient.split([b - a for a, b in ctx.runs]), strict=True):
            total[start:end] += part
        return scatter(total, ctx.group), None, None


def split(batch: Batch, ranks: int, rank: int, group: Any = None) -> Batch:
    """The share of one rank, itself a packed batch: its sequences are pieces, its ``context`` says of what.

    Only lengths on the host decide; nothing waits for the device.

    Args:
        batch: the same on all ranks, on its device; 2·R divides its N tokens (``fastkd.batch.pad``).
        ranks: R.
        rank: of this process in ``group``.

    Raises:
        ValueError: 2·R does not divide N.
    """
    tokens, chunks = len(batch.tokens_N), 2 * ranks
    if tokens % chunks:
        raise ValueError(f"split: {tokens} tokens do not make {chunks} equal chunks; pad the batch first")
    size = tokens // chunks
    ends = list(accumulate(batch.lengths))
    sequences = list(zip([0, *ends], ends, batch.responses, strict=False))
    active = tuple(
        # The active rows of a sequence are its last ones.
        sum(min(max(chunk * size - (end - responses), 0), responses) for _, end, responses in sequences)
        for chunk in range(chunks + 1)
    )
    lengths: list[int] = []
    key_lengths: list[int] = []
    responses: list[int] = []
    runs: list[tuple[int, int]] = []
    parts: list[slice] = []
    actives: list[Tensor] = []
    for place, chunk in enumerate((rank, chunks - 1 - rank)):
        low, high = chunk * size, (chunk + 1) * size
        here = [one for one in sequences if one[0] < high and one[1] > low]
        for start, end, count in here:
            first, last = max(start, low), min(end, high)
            lengths.append(last - first)
            key_lengths.append(last - start)
            responses.append(max(last - max(first, end - count), 0))
        runs += _gathered(here[0][0], high, size, chunks)
        parts.append(slice(low, high))
        actives.append(batch.active_A[active[chunk] : active[chunk + 1]] - (low - place * size))
    device = batch.cu_seqlens.device
    context = Context(group, rank, active, tuple(runs), tuple(key_lengths), _cumulative(key_lengths, device))
    return replace(
        batch,
        tokens_N=torch.cat([batch.tokens_N[part] for part in parts]),
        positions_N=torch.cat([batch.positions_N[part] for part in parts]),
        cu_seqlens=_cumulative(lengths, device),
        max_seqlen=max(lengths),
        active_A=torch.cat(actives),
        labels_A=context.take(batch.labels_A),
        lengths=tuple(lengths),
        responses=tuple(responses),
        context=context,
    )


def _gathered(start: int, end: int, size: int, chunks: int) -> list[tuple[int, int]]:
    """Where the tokens from ``start`` to ``end`` of the batch are in the gathered ones."""
    found = []
    while start < end:
        chunk = start // size
        stop = min(end, (chunk + 1) * size)
        owner, second = _owner(chunk, chunks)
        shift = (2 * owner + second - chunk) * size
        found.append((start + shift, stop + shift))
        start = stop
    return found


def _cumulative(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)

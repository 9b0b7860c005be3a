"""The exact K largest of each row on a CPU, a strided part of the vocabulary at a time.

Whole rows of 150,000 logits fill memory: each pass over them goes there and back, and every call asks the system for
their pages anew. Here block j of B holds the ids j, j + B, j + 2B, … of many rows, small enough to stay in the last
cache. Dealt out like this all blocks are alike, however ids are ordered, so the first one shows where a row's K
largest begin: θ, a little below the first block's share of them. Logits from θ on are candidates and are put aside
as they come, the others add exp(z − θ), at most 1, to the tail.

Candidates are looked for among lanes, as in ``row_topk``: only lanes whose largest term reaches 1 are read again.

Exactness is checked, not assumed: a row is *settled* if more than K candidates were found and the K best lie strictly
above the others. The rest (ties at the border, few finite logits, NaN) is for the caller to select from whole rows.

Letters: c rows, V columns, B blocks, L lanes of a block, K kept, M lanes that are read again, H candidates of a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastkd._kernels import row_stats
from fastkd._kernels.gemm import HeadGemms
from fastkd._kernels.rows import LOG_ZERO, TopK

_ENOUGH_ROWS = 512
"""Of whole logits: beyond these a weight that is read more often hardly counts."""
_SHARE = 5
"""A block takes a fifth of ``chunk_bytes``, by default 32 MiB: what a server's last cache holds, and malloc keeps."""
_MOST_ROWS = 1024
"""More rows make blocks of a size too narrow; fewer read the weight more often."""
_PER_LANE = 10
_LANE_MULTIPLE = 8
"""So that rows of the buffer start on a cache line."""
_LANE_BYTES = 32 * _PER_LANE
"""What reading a lane again takes, places and terms of its values included."""
_LOG2_E = 1.0 / math.log(2.0)
# Terms are exp(z − θ) with a rounded exponent: a little below 1 counts, and a θ whose rounding is more is not settled.
_NEARLY_ONE = 0.99
_LARGEST_THRESHOLD = 1e4


@dataclass(frozen=True, slots=True)
class Blocks:
    """How columns are dealt out."""

    rows: int
    """c, of a chunk."""
    count: int
    """B."""
    sample: int
    """θ is the so-manieth largest of the first block: the share of K, and four standard deviations more."""
    lanes: int
    """L."""

    @property
    def width(self) -> int:
        """Columns of the buffer: full lanes."""
        return self.lanes * _PER_LANE

    @property
    def capacity(self) -> int:
        """Candidates that a row has places for: twice as many as expected."""
        return 2 * self.sample * self.count

    @property
    def crowded(self) -> int:
        """Lanes of one block with candidates, beyond which a row is not settled: eight times as many as expected."""
        return 8 * self.sample


def arrange(rows: int, columns: int, k: int, itemsize: int, chunk_bytes: int) -> Blocks | None:
    """Blocks for ``rows`` rows [N], or None where whole rows are as good.

    That is where all of them, or enough for the GEMM to run at its rate, fit into ``chunk_bytes``; and where a block
    would be too small a sample.
    """
    if chunk_bytes // max(1, columns * itemsize) >= min(rows, _ENOUGH_ROWS):
        return None
    block_bytes = max(1, chunk_bytes // _SHARE)
    most = _MOST_ROWS
    while most and k:
        chunk = -(-rows // -(-rows // most))
        count = -(-chunk * columns * itemsize // block_bytes)
        share = k / count
        sample = math.ceil(share + 4 * math.sqrt(share)) + 4
        if count < 2 or 8 * sample > columns // count:
            return None
        lanes = -(-columns // (count * _PER_LANE * _LANE_MULTIPLE)) * _LANE_MULTIPLE
        blocks = Blocks(chunk, count, sample, lanes)
        if chunk * (sample * _LANE_BYTES + blocks.capacity * 8) <= 2 * block_bytes:
            return blocks
        most = chunk // 2
    return None


class _Candidates:
    """Logits from θ on, side by side per row, with their ids."""

    def __init__(self, rows: int, capacity: int, like: Tensor):
        self.values = like.new_full((rows, capacity), -torch.inf)
        self.ids = torch.zeros((rows, capacity), dtype=torch.int32)
        self.filled = torch.zeros(rows, dtype=torch.int64)

    def add(self, rows_H: Tensor, ids_H: Tensor, values_H: Tensor) -> None:
        """Append candidates, sorted by row; what a row has no place for is only counted."""
        count, capacity = self.values.shape
        added = torch.bincount(rows_H, minlength=count)
        slots_H = torch.arange(len(rows_H)) + (self.filled - (added.cumsum(0) - added))[rows_H]
        self.filled += added
        if int(self.filled.max()) > capacity:
            fits = slots_H < capacity
            rows_H, ids_H, values_H, slots_H = rows_H[fits], ids_H[fits], values_H[fits], slots_H[fits]
        places_H = slots_H.add_(rows_H, alpha=capacity)
        self.values.view(-1)[places_H] = values_H
        self.ids.view(-1)[places_H] = ids_H.int()


def strided_topk(
    hidden: Tensor, gemms: HeadGemms, bias: Tensor | None, k: int, temperature: float, blocks: Blocks
) -> tuple[TopK, Tensor]:
    """Top-K of c rows [c, D] by blocks, and which rows are settled [c] bool; the others' values mean nothing.

    ``gemms`` and ``bias`` are of the valid vocabulary alone, as ``linear_topk`` has them.
    """
    c, columns = len(hidden), len(gemms.weight)
    lanes, width, scale = blocks.lanes, blocks.width, _LOG2_E / temperature
    buffer = hidden.new_empty((c, width))
    lane_sums, lane_tops = buffer.new_empty((2, c, lanes))
    parts = row_stats.blocks(c, width, buffer.element_size(), buffer.device)
    scratch = buffer.new_empty((parts[0].stop, width))
    found = _Candidates(c, blocks.capacity, buffer)
    total = buffer.new_zeros(c)
    settled = torch.ones(c, dtype=torch.bool)
    threshold = origin = total
    for j in range(blocks.count):
        here = slice(j, columns, blocks.count)
        size = len(range(columns)[here])
        buffer[:, size:] = LOG_ZERO
        logits = buffer[:, :size]
        gemms.logits(hidden, logits, here)
        if bias is not None:
            logits.add_(bias[here]).clamp_(min=LOG_ZERO)
        if j == 0:
            tops = buffer.unflatten(1, (_PER_LANE, lanes)).amax(1)  # in different lanes, but for a few
            threshold = tops.topk(blocks.sample, dim=1, sorted=False).values.amin(1)
            settled = threshold.abs() < _LARGEST_THRESHOLD
            threshold = threshold.where(settled, 0.0)
            origin = (threshold * -scale)[:, None]
        for rows in parts:
            terms = scratch[: rows.stop - rows.start]
            torch.add(origin[rows], buffer[rows], alpha=scale, out=terms).exp2_()
            grid = terms.unflatten(1, (_PER_LANE, lanes))
            torch.sum(grid, 1, out=lane_sums[rows])
            torch.amax(grid, 1, out=lane_tops[rows])
        rows_M, lanes_M = (lane_tops >= _NEARLY_ONE).nonzero(as_tuple=True)
        settled &= torch.bincount(rows_M, minlength=c) <= blocks.crowded
        if not settled.all():
            rows_M, lanes_M = rows_M[settled[rows_M]], lanes_M[settled[rows_M]]
        rows_H, columns_H, values_H = _candidates(buffer, rows_M, lanes_M, threshold, scale, lane_sums)
        found.add(rows_H, columns_H * blocks.count + j, values_H)
        total += lane_sums.sum(1)
    settled &= (found.filled > k) & (found.filled <= blocks.capacity) & total.isfinite()
    return _best(found, k, threshold / temperature + total.log(), temperature, settled)


def _candidates(
    buffer: Tensor, rows_M: Tensor, lanes_M: Tensor, threshold: Tensor, scale: float, lane_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, columns, values) [H] of the logits from ``threshold`` [c] on in lanes ``lanes_M`` of rows ``rows_M``.

    ``lane_sums`` [c, L] keep the terms of the other logits of these lanes, added up anew: a difference would cancel.
    """
    lanes, width = lane_sums.shape[1], buffer.shape[1]
    places = (rows_M * width + lanes_M)[:, None] + torch.arange(0, width, lanes)  # [M, ids of a lane]
    values = buffer.view(-1).take(places)
    threshold_M = threshold[rows_M][:, None]
    chosen = values >= threshold_M
    others = (values - threshold_M).mul_(scale).exp2_().masked_fill_(chosen, 0.0)
    lane_sums[rows_M, lanes_M] = others.sum(1)
    chosen_H = chosen.view(-1).nonzero().squeeze(1)
    places_H = places.view(-1)[chosen_H]
    rows_H = places_H.div(width, rounding_mode="floor")
    return rows_H, places_H - rows_H * width, values.view(-1)[chosen_H]


def _best(found: _Candidates, k: int, tail: Tensor, temperature: float, settled: Tensor) -> tuple[TopK, Tensor]:
    """The K largest candidates; the others join the tail [c], a logsumexp of what was no candidate."""
    width = max(int(found.filled.clamp(max=found.values.shape[1]).max()), k + 1)
    values, ids = found.values[:, :width], found.ids[:, :width]
    best, places = values.topk(k + 1, dim=1)
    settled &= best[:, k - 1] > best[:, k]
    places_K = places[:, :k]
    ids_K, order_K = ids.gather(1, places_K).sort(1)
    picked_K = best[:, :k].gather(1, order_K)
    values.scatter_(1, places_K, values.new_full((1, 1), -torch.inf).expand_as(places_K))
    tail = torch.logaddexp(tail, (values / temperature).logsumexp(1))
    return TopK(ids_K, picked_K, torch.logaddexp((picked_K / temperature).logsumexp(1), tail), tail), settled

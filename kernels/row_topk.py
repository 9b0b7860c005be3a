"""The exact K largest of each row, found among a few per cent of it.

Sorting or selecting among 150,000 logits costs about as much as computing them. Instead: let lane l of a row be the
ids l, l + L, l + 2L, …. K lanes have a maximum of at least θ, the K-th largest lane maximum, so θ is a lower bound of
the K-th largest logit, and a lane whose maximum is below θ holds none of the K: the K best lanes hold them all. Lanes
are strided because neighbouring ids have similar logits, which would crowd into few contiguous ones.

Exactness is checked, not assumed: the result stands only if the K logits found lie strictly above every other one;
rows with a tie at the border are selected from all of their logits, the lower id winning.

Letters: c rows, V columns, L lanes of B ids each, K kept.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def lanes_for(columns: int, k: int) -> tuple[int, int]:
    """(ids per lane, lanes): selection among L maxima and K · V / L candidates costs least near L = √(2 K V)."""
    per_lane = int(columns / math.sqrt(2.0 * k * columns))
    return (1, columns) if per_lane < 4 else (per_lane, -(-columns // per_lane))


def padded_columns(columns: int, k: int) -> int:
    """Columns a buffer needs so that its lanes are full; those behind ``columns`` must hold −inf."""
    per_lane, lanes = lanes_for(columns, k)
    return per_lane * lanes


def select(values: Tensor, k: int) -> Tensor:
    """Columns [c, K] int64, ascending, of the K largest of each row [c, M]; of equal values the leftmost are taken."""
    c, width = values.shape
    if k == width:
        return torch.arange(width, device=values.device).expand(c, width).contiguous()
    threshold = values.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    chosen = (values >= threshold).nonzero()
    if len(chosen) != c * k:  # more ties than places in some row
        above = values > threshold
        level = values == threshold
        level &= level.cumsum(1) <= k - above.sum(1, keepdim=True)
        chosen = (above | level).nonzero()
        if len(chosen) != c * k:
            raise ValueError("the logits hold NaN, so they have no K largest; check hidden and weight for NaN or inf")
    return chosen[:, 1].view(c, k)


def row_topk(buffer: Tensor, columns: int, k: int) -> Tensor:
    """Columns [c, K] int64, ascending, of the K largest of buffer[:, :columns]; of equal logits the lower id is kept.

    ``buffer`` [c, ≥ padded_columns] holds −inf behind ``columns``.
    """
    c = buffer.shape[0]
    logits = buffer[:, :columns]
    per_lane, lanes = lanes_for(columns, k)
    if per_lane == 1 or c == 0:
        return select(logits, k)
    grid = buffer[:, : per_lane * lanes].unflatten(1, (per_lane, lanes))
    best = grid.amax(1).topk(k + 1, dim=1, sorted=False)
    lane_K1 = best.indices[:, None, :].expand(c, per_lane, k + 1)
    candidates = grid.gather(2, lane_K1).flatten(1)
    # The largest logit that is not among the K, provided there is no tie: a candidate, or in a lane left out.
    border = torch.maximum(candidates.topk(k + 1, dim=1, sorted=False).values.amin(1), best.values.amin(1))
    above = candidates > border[:, None]
    found = above.nonzero()
    exact = None
    if len(found) != c * k:
        exact = above.sum(1) == k
        found = found[exact[found[:, 0]]]
    row, place = found.unbind(1)
    block = place // (k + 1)
    chosen = block * lanes + best.indices[row, place - block * (k + 1)]
    chosen = chosen.view(-1, k).sort(1).values
    if exact is None:
        return chosen
    result = chosen.new_empty((c, k))
    result[exact] = chosen
    result[~exact] = select(logits[~exact], k)
    return result

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

# Lanes come in multiples of this, so that the lanes of lanes need no padding.
_MULTIPLE = 12


def lanes_for(columns: int, k: int) -> tuple[int, int]:
    """(ids per lane, lanes): a selection among L maxima and K · V / L candidates costs least near L = √(2 K V)."""
    per_lane = math.isqrt(columns // (2 * k)) if k else 1
    if per_lane < 2 or columns < 4 * _MULTIPLE:
        return 1, columns
    lanes = -(-columns // per_lane)
    return per_lane, -(-lanes // _MULTIPLE) * _MULTIPLE


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


def row_topk(buffer: Tensor, columns: int, k: int) -> tuple[Tensor, Tensor | None]:
    """The K largest of buffer[:, :columns]: their columns [c, K] int64, ascending; ties go to the lower column.

    Also the largest logit of each row that was not taken [c], where it was seen on the way (else None).
    ``buffer`` [c, ≥ padded_columns] holds −inf behind ``columns``.
    """
    c = buffer.shape[0]
    logits = buffer[:, :columns]
    if k == columns or c == 0:
        return select(logits, k), None
    per_lane, lanes = lanes_for(columns, k)
    if per_lane == 1:
        values, chosen = _largest(logits, k + 1)
        border = values.amin(1)
    else:
        grid = buffer[:, : per_lane * lanes].unflatten(1, (per_lane, lanes))
        lane_values, lane_columns = _largest(grid.amax(1), k + 1)
        candidates = grid.gather(2, lane_columns[:, None, :].expand(c, per_lane, k + 1)).flatten(1)
        values, places = _largest_above(candidates, lane_values.amin(1), k + 1)
        block = places // (k + 1)
        chosen = block * lanes + lane_columns.gather(1, places - block * (k + 1))
        # What is not among the K + 1 found is a lesser candidate or in a lesser lane.
        border = torch.maximum(values.amin(1), lane_values.amin(1))
    above = values > border[:, None]
    exact = above.sum(1) == k  # without a tie the K are above all others
    everywhere = bool(exact.all())
    if not everywhere:
        above &= exact[:, None]
    chosen = chosen[above].view(-1, k).sort(1).values
    if everywhere:
        return chosen, border
    result = chosen.new_empty((c, k))
    result[exact] = chosen
    result[~exact] = select(logits[~exact], k)
    return result, None


def _largest_above(values: Tensor, bound: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same as ``_largest``, where ``bound`` [c] is a lower bound of each row's k-th largest value."""
    above = values >= bound[:, None]
    counts = above.sum(1)
    rows, places = above.nonzero(as_tuple=True)
    # Values above the bound side by side, some 6 % more than k as a rule; shorter rows end in −inf.
    slots = torch.arange(len(rows), device=values.device) - (counts.cumsum(0) - counts)[rows]
    width = max(int(counts.max()), k)
    few = values.new_full((len(values), width), -torch.inf)
    few[rows, slots] = values[rows, places]
    origin = places.new_zeros((len(values), width))
    origin[rows, slots] = places
    best, found = torch.topk(few, k, dim=1, sorted=False)
    return best, origin.gather(1, found)


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values, columns) [c, k] of the k largest of each row, in no order; of equal values any may be taken."""
    c, width = values.shape
    per_lane, lanes = lanes_for(width, k)
    if per_lane == 1:
        return torch.topk(values, k, dim=1, sorted=False)
    padding = per_lane * lanes - width
    if padding:
        values = torch.nn.functional.pad(values, (0, padding), value=-torch.inf)
    grid = values.unflatten(1, (per_lane, lanes))
    lane_columns = torch.topk(grid.amax(1), k, dim=1, sorted=False).indices
    candidates = grid.gather(2, lane_columns[:, None, :].expand(c, per_lane, k)).flatten(1)
    best, places = torch.topk(candidates, k, dim=1, sorted=False)
    block = places // k
    return best, block * lanes + lane_columns.gather(1, places - block * k)

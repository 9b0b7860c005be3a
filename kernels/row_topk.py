"""The exact K largest of each row, with the logsumexp of the row and of what was not kept.

Sorting or selecting among 150,000 logits costs about as much as computing them. Instead: let lane l of a row be the
ids l, l + L, l + 2L, …; the K-th largest lane maximum is a lower bound θ of the K-th largest logit (K distinct logits
reach it), and no lane whose maximum is below θ holds a survivor. So the K best lanes, K · V/L candidates, contain the
answer. Lanes are strided because neighbouring ids have similar logits, and contiguous ones would fill up unevenly.
Ties: the lower id wins. If a lane that was not taken ties θ, the row is selected from all of its logits instead.

Letters: c rows, V columns, L lanes, B = ceil(V / L) ids per lane, M candidates, K kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

# More lanes give fewer candidates (K · V / L) but a dearer selection among the lanes themselves.
LANES = 4096


def select(values: Tensor, k: int) -> Tensor:
    """Columns [c, K] int64, ascending, of the K largest of each row [c, M]; of equal values the leftmost are taken."""
    c, width = values.shape
    if k == width:
        return torch.arange(width, device=values.device).expand(c, width).contiguous()
    threshold = values.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    above = values > threshold
    level = values == threshold
    room = k - above.sum(1, keepdim=True)
    if not torch.equal(level.sum(1, keepdim=True), room):  # more ties than places
        level &= level.cumsum(1) <= room
    chosen = (above | level).nonzero()
    if len(chosen) != c * k:
        raise ValueError("the logits hold NaN, so they have no K largest; check hidden and weight for NaN or inf")
    return chosen[:, 1].view(c, k)


def row_topk(logits: Tensor, k: int) -> Tensor:
    """Columns [c, K] int64, ascending, of the K largest logits of each row [c, V]; ties go to the lower column."""
    c, width = logits.shape
    per_lane = -(-width // LANES)
    if per_lane < 4 or k > LANES // 2:
        return select(logits, k)
    return _by_lanes(logits, k, width // LANES)


def _by_lanes(logits: Tensor, k: int, whole: int) -> Tensor:
    c, width = logits.shape
    rest = width - whole * LANES
    grid = logits[:, : whole * LANES].unflatten(1, (whole, LANES))
    lane_max = grid.amax(1)
    if rest:
        head = lane_max[:, :rest]
        torch.maximum(head, logits[:, whole * LANES :], out=head)
    best = lane_max.topk(k + 1, dim=1)  # one more, to see a tie at the border
    lanes = best.indices[:, :k].sort(1).values
    # [c, B, K]: ids ascend along (block, lane), the order ties are decided by.
    columns = lanes[:, None, :] + LANES * torch.arange(whole + 1, device=logits.device)[:, None]
    columns = columns.flatten(1)
    candidates = logits.gather(1, columns.clamp(max=width - 1))
    candidates.masked_fill_(columns >= width, -torch.inf)
    chosen = columns.gather(1, select(candidates, k))
    tied = best.values[:, k - 1] == best.values[:, k]
    if tied.any():
        rows = tied.nonzero().squeeze(1)
        chosen[rows] = select(logits[rows], k)
    return chosen

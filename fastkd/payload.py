"""What crosses the network for a token: its teacher's top-K in four bytes per entry.

* Values: the gap to the row's largest logit in 16 bits, linear between 0 and the row's widest gap w. The error of a
  logit is at most w / 131,068 (1.2e-4 for w = 16), where a bfloat16 logit of 16 to 32 is off by up to 0.06; a KL of
  such rows is off by some 1e-9, against 4e-3 with bfloat16.
* Ids: ascending, as 16-bit differences; a difference that does not fit is written beside. Exact.
* Both logsumexps as they are, in float32: the tail's mass is never the difference of two rounded numbers.

So K = 512 makes 2,064 bytes per token, where int64 ids and float32 logits make 6,152.

Letters: N rows, K kept, E differences of 65,535 or more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastkd.kernels import TopK

_WIDE = 0xFFFF
"""In ``steps``: the difference is in ``wide``. In ``gaps``: the logit is −inf."""
_LEVELS = _WIDE - 1


class Payload(NamedTuple):
    """Compressed rows; ``steps`` and ``gaps`` are unsigned numbers in int16, which every torch operator knows."""

    steps: Tensor
    """[N, K] int16: the first id, then differences of ascending ids."""
    gaps: Tensor
    """[N, K] int16: (largest − logit) / scale."""
    wide: Tensor
    """[E] int32: differences of 65,535 and more, in the order they occur."""
    largest: Tensor
    """[N] float32 largest logit."""
    scale: Tensor
    """[N] float32 unit of the gaps."""
    logsumexp: Tensor | None
    """[N] float32."""
    tail_logsumexp: Tensor | None
    """[N] float32."""

    @property
    def nbytes(self) -> int:
        """Bytes of all fields."""
        return sum(field.numel() * field.element_size() for field in self if field is not None)


def compress(rows: TopK) -> Payload:
    """Pack N rows of a teacher; entries come out in the order of their ids.

    Args:
        rows: [N, K] ids (distinct in a row) and logits; −inf marks entries that do not count.

    Raises:
        ValueError: a logit is NaN or +inf: the row has no scale.
    """
    ids, order = rows.indices.sort(1)
    logits = rows.logits.float().gather(1, order)
    if logits.numel() and not bool((logits < torch.inf).all()):
        raise ValueError("compress: a logit is NaN or +inf; check the teacher's weights and inputs")
    ignored = torch.isneginf(logits)
    largest = logits.amax(1) if logits.shape[1] else logits.new_zeros(len(logits))
    largest = largest.masked_fill(torch.isneginf(largest), 0.0)
    gaps = (largest[:, None] - logits).masked_fill(ignored, 0.0)
    scale = gaps.amax(1) / _LEVELS if logits.shape[1] else largest
    levels = (gaps / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round().clamp(max=_LEVELS).int()
    steps = ids.int().diff(dim=1, prepend=ids.new_zeros((len(ids), 1), dtype=torch.int32))
    wide = steps >= _WIDE
    return Payload(
        _unsigned(steps.masked_fill(wide, _WIDE)),
        _unsigned(levels.masked_fill(ignored, _WIDE)),
        steps[wide],
        largest,
        scale,
        None if rows.logsumexp is None else rows.logsumexp.float(),
        None if rows.tail_logsumexp is None else rows.tail_logsumexp.float(),
    )


def expand(payload: Payload) -> TopK:
    """The rows again: int32 ids, exact and ascending; float32 logits, within ``scale`` / 2."""
    steps = payload.steps.int() & _WIDE
    steps[steps == _WIDE] = payload.wide
    levels = payload.gaps.int() & _WIDE
    logits = payload.largest[:, None] - levels * payload.scale[:, None]
    return TopK(
        steps.cumsum(1, dtype=torch.int32),
        logits.masked_fill_(levels == _WIDE, -torch.inf),
        payload.logsumexp,
        payload.tail_logsumexp,
    )


def _unsigned(values: Tensor) -> Tensor:
    return torch.where(values > 0x7FFF, values - 0x10000, values).to(torch.int16)

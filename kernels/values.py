"""What only the values of the arguments can tell: mistakes in them, rows of weight 0, entries that are ignored.

Looking at values is free on the CPU and waits for the device elsewhere, so accelerators do it on request alone
(``validate``). It happens inside the registered operators: a compiler sees shapes and dtypes, never values.

Letters: N tokens, n tokens that count, K kept.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from fastkd._kernels.rows import TopK

_ORDER = (
    "teacher.indices row {} does not ascend strictly: ids must be unique and sorted; sort each row by id (and logits "
    "with it), and merge duplicates"
)
_warned_about_logsumexp = False


def check_active(active: Tensor, tokens: int) -> None:
    """Token ids that count: ascending, without repeats, in range."""
    if len(active):
        first, last = int(active[0]), int(active[-1])
        if first < 0 or last >= tokens or bool((active[1:] <= active[:-1]).any()):
            raise ValueError(f"active runs from {first} to {last}: must ascend without repeats within 0 … {tokens - 1}")


def drop_zeros(
    rows: Tensor | None, teacher: TopK, by_token: bool, weights: Tensor, labels: Tensor | None
) -> tuple[Tensor | None, TopK, bool, Tensor, Tensor | None]:
    """Leave out tokens of weight 0."""
    live = weights != 0
    if bool(live.all()):
        return rows, teacher, by_token, weights, labels
    places = live.nonzero().squeeze(1)
    if not by_token:  # the teacher's rows follow ``rows``, which gets shorter
        teacher = teacher.map(lambda field: field.index_select(0, places))
    rows = places if rows is None else rows.index_select(0, places)
    return rows, teacher, by_token, weights[places], None if labels is None else labels[places]


def check_rows(teacher: TopK, rows: Tensor | None, labels: Tensor | None, valid: int) -> bool:
    """Check ids and logits of the rows that count; True when some logit is −inf."""
    indices, logits = teacher.indices, teacher.logits
    if rows is not None:
        indices, logits = indices.index_select(0, rows), logits.index_select(0, rows)
    if labels is not None and len(labels):
        low, high = (int(x) for x in labels.aminmax())
        if low < 0 or high >= valid:
            raise ValueError(
                f"labels hold {low if low < 0 else high}: must be ids from 0 to {valid - 1}; give tokens without a "
                "label weight 0"
            )
    if indices.numel() == 0:
        return False
    low, high = (int(x) for x in indices.aminmax())
    if low < 0 or high >= valid:
        raise ValueError(f"teacher.indices hold {low if low < 0 else high}: must be from 0 to {valid - 1}")
    ascending = indices[:, 1:] > indices[:, :-1]
    finite = torch.isfinite(logits)
    if bool(finite.all()):
        if not bool(ascending.all()):
            raise ValueError(_ORDER.format(int((~ascending).any(1).nonzero()[0])))
        return False
    wrong = ~finite & ~torch.isneginf(logits)
    if bool(wrong.any()):
        row = int(wrong.any(1).nonzero()[0])
        raise ValueError(f"teacher.logits row {row} holds NaN or +inf: only finite values and −inf (ignored) are legal")
    empty = ~finite.any(1)
    if bool(empty.any()):
        row = int(empty.nonzero()[0])
        raise ValueError(f"teacher.logits row {row} has no finite entry: give that token weight 0")
    # The largest finite id so far, before each entry; a finite entry must exceed it.
    seen = torch.where(finite, indices.long(), -1).cummax(1).values
    wrong = finite[:, 1:] & (indices[:, 1:] <= seen[:, :-1])
    if bool(wrong.any()):
        raise ValueError(_ORDER.format(int(wrong.any(1).nonzero()[0])))
    return True


def warn_about_logsumexp() -> None:
    """Once per process: a tail from a difference is a poor one."""
    global _warned_about_logsumexp
    if not _warned_about_logsumexp:
        _warned_about_logsumexp = True
        warnings.warn(
            "teacher.tail_logsumexp is missing: the mass outside the kept ids is taken from a difference, which "
            "float32 cannot resolve below about 1e-6 and which is clamped there. Ship tail_logsumexp if you can.",
            stacklevel=2,
        )

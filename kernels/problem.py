"""One call of the fused divergence: all of it that is not differentiated, and the place its results go to.

Letters: N tokens of the caller, n rows that count, c rows of a chunk, K kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastkd._kernels.rows import Objective, TopK, TopKLoss
from fastkd._kernels.vocab_parallel import Shards


@dataclass(frozen=True)
class Problem:
    """Everything but the differentiable inputs; tensors already on their device.

    ``rows`` [n] int64: which of the N tokens count (None: all). ``weights`` and ``labels`` are [n]; the teacher's
    fields are [n, ...], or [N, ...] when ``teacher_by_token``.
    """

    teacher: TopK
    teacher_by_token: bool
    rows: Tensor | None
    weights: Tensor
    labels: Tensor | None
    objective: Objective
    vocab_start: int
    columns: int  # valid ids held here
    whole_vocabulary: bool  # K is the valid vocabulary
    may_ignore: bool  # some teacher logit may be −inf
    chunk_bytes: int
    low: bool
    shards: Shards

    def teacher_at(self, part: slice) -> TopK:
        """Teacher rows of a chunk."""
        if self.rows is not None and self.teacher_by_token:
            index = self.rows[part]
            return self.teacher.map(lambda field: field.index_select(0, index))
        return self.teacher.map(lambda field: field[part])

    def kept(self, teacher: TopK) -> Tensor | None:
        """Which entries of the rows count (None: all)."""
        return ~torch.isneginf(teacher.logits) if self.may_ignore else None

    @property
    def by_slabs(self) -> bool:
        """Whether a linear head goes slab by slab: asked for, or because only the kept columns are needed."""
        return self.low or not self.objective.needs_tail

    @property
    def wants_labels(self) -> bool:
        """Whether label_logprob is reported: it is not where it alone would need a pass over the vocabulary."""
        o = self.objective
        return self.labels is not None and o.needs_tail and (o.temperature == 1.0 or o.stats)

    @property
    def wants_raw(self) -> bool:
        """Whether a second logsumexp, at temperature 1, is measured for the labels."""
        return self.wants_labels and self.objective.temperature != 1.0

    @property
    def fields(self) -> list[str]:
        """Names of the per-token fields this problem fills."""
        names = ["per_token"]
        if self.whole_vocabulary or self.teacher.logsumexp is not None or self.teacher.tail_logsumexp is not None:
            names.append("teacher_mass")
        if self.objective.needs_tail:
            names.append("student_mass")
        if self.objective.stats:
            names += ["entropy", "top1_agree"]
        if self.wants_labels:
            names.append("label_logprob")
        return names


class Outputs:
    """Collects the per-row results of one call into [N] tensors, 0 where no row reports."""

    def __init__(self, tokens: int, problem: Problem, dtype: torch.dtype, device: torch.device):
        self.rows, self.dtype = problem.rows, dtype
        self.fields = {
            name: torch.zeros(tokens, dtype=torch.bool if name == "top1_agree" else dtype, device=device)
            for name in problem.fields
        }
        # In float64, so that the rounding of the sum does not show how rows were packed or chunked.
        self.loss = torch.zeros((), dtype=torch.float64, device=device)

    def put(self, part: slice, name: str, values: Tensor) -> None:
        """Store the values of a chunk."""
        self.fields[name][part if self.rows is None else self.rows[part]] = values

    def result(self) -> TopKLoss:
        """The record of the call."""
        return TopKLoss(self.loss.to(self.dtype), **self.fields)

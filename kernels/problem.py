"""One call of the fused divergence: all of it that is not differentiated, and the place its results go to.

Letters: N tokens of the caller, n rows that count, c rows of a chunk, K kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastkd._kernels.rows import Objective, TopK, TopKLoss, on_host
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
    valid: int  # valid ids of all ranks
    may_ignore: bool  # some teacher logit may be −inf
    chunk_bytes: int
    low: bool
    sequence_parallel: bool  # hidden holds this rank's block of the rows
    shards: Shards

    @property
    def whole_vocabulary(self) -> bool:
        """Whether K is the valid vocabulary, so that nothing is outside S."""
        return self.teacher.indices.shape[1] == self.valid

    @property
    def even_columns(self) -> int:
        """An even share of the valid ids: what a row is counted with, so that all ranks cut the same chunks.

        Every chunk is an exchange between the ranks; asking for the widest shard would wait for the device.
        """
        return -(-self.valid // self.shards.size)

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
        """Whether a linear head goes slab by slab: asked for, or because only some columns are needed."""
        return self.low or self.kept_columns_only

    @property
    def kept_columns_only(self) -> bool:
        """Whether only the ids that occur are projected. Finding them waits for an accelerator, so only on the CPU."""
        return not self.objective.needs_tail and on_host(self.weights.device)

    @property
    def wants_labels(self) -> bool:
        """Whether label_logprob is reported."""
        return self.labels is not None and reports_labels(self.objective)

    @property
    def wants_raw(self) -> bool:
        """Whether a second logsumexp, at temperature 1, is measured for the labels."""
        return self.wants_labels and self.objective.temperature != 1.0

    @property
    def fields(self) -> list[str]:
        """Names of the per-token fields this problem fills."""
        teacher = self.teacher
        knows_mass = self.whole_vocabulary or teacher.logsumexp is not None or teacher.tail_logsumexp is not None
        return field_names(self.objective, knows_mass, self.labels is not None)


def reports_labels(objective: Objective) -> bool:
    """Whether label_logprob is reported: it is not where it alone would need a pass over the vocabulary."""
    return objective.needs_tail and (objective.temperature == 1.0 or objective.stats)


def field_names(objective: Objective, knows_mass: bool, with_labels: bool) -> list[str]:
    """Names of the fields of ``TopKLoss`` beside the loss that are reported."""
    names = ["per_token"]
    if knows_mass:
        names.append("teacher_mass")
    if objective.needs_tail:
        names.append("student_mass")
    if objective.stats:
        names += ["entropy", "top1_agree"]
    if with_labels and reports_labels(objective):
        names.append("label_logprob")
    return names


def new_field(name: str, tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A field of ``TopKLoss`` [N], 0 (False)."""
    return torch.zeros(tokens, dtype=torch.bool if name == "top1_agree" else dtype, device=device)


class Outputs:
    """Collects the per-row results of one call into [N] tensors, 0 where no row reports."""

    def __init__(self, tokens: int, problem: Problem, dtype: torch.dtype, device: torch.device):
        self.rows, self.dtype = problem.rows, dtype
        self.fields = {name: new_field(name, tokens, dtype, device) for name in problem.fields}
        self.weights = problem.weights

    def put(self, part: slice, name: str, values: Tensor) -> None:
        """Store the values of a chunk."""
        self.fields[name][part if self.rows is None else self.rows[part]] = values

    def result(self) -> TopKLoss:
        """The record of the call."""
        per_token = self.fields["per_token"]
        losses = per_token if self.rows is None else per_token.index_select(0, self.rows)
        # In float64, so that the rounding of the sum does not show how rows were packed or chunked. Rows of weight 0
        # that could not be dropped report 0, but their weight may not be a number to multiply with.
        weights = self.weights.double()
        loss = torch.where(weights != 0, losses.double() * weights, 0.0).sum()
        return TopKLoss(loss.to(self.dtype), **self.fields)

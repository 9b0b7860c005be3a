"""What follows the statistics of a chunk: merge over the ranks, row mathematics, results, ∂loss/∂logits at S.

This is the torch form, for the CPU and for float64; ``triton_finish`` is the same in one launch.

Letters: c rows of a chunk, K kept; [c] row scalars carry no suffix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd._kernels.problem import Outputs, Problem
from fastkd._kernels.rows import RowGradient, Tail, TopK
from fastkd._kernels.sparse_kl import row_math, student_rows, teacher_rows


def finish_rows(
    problem: Problem,
    outputs: Outputs,
    part: slice,
    teacher: TopK,
    held_K: Tensor | None,
    picked_K: Tensor,
    tail: Tail | None,
    label_logit: Tensor | None,
) -> tuple[RowGradient, Tensor | None]:
    """∂loss/∂logits (token weights and 1/T applied) and the tail's logsumexp, of a chunk that was measured.

    Args:
        problem: the call.
        outputs: takes the results of the rows.
        part: which of the n rows these are.
        teacher: their teacher rows.
        held_K: [c, K] which kept ids are held here; None without other ranks.
        picked_K: [c, K] logits at the kept ids, LOG_ZERO where not held.
        tail: of the ids held here outside S; None where the objective does not need it.
        label_logit: [c] of the label, LOG_ZERO where not held.
    """
    o, shards = problem.objective, problem.shards
    z_K = picked_K if o.temperature == 1.0 else picked_K / o.temperature
    sides = teacher_rows(teacher, problem.kept(teacher), o, z_K.dtype, problem.whole_vocabulary)
    lse_kept = z_K.logsumexp(1)
    top_logit = highest = None
    if o.stats and tail is not None:
        top_logit = z_K.gather(1, sides.log_p_K.argmax(1, keepdim=True)).squeeze(1)
        highest = torch.maximum(tail.max, z_K.amax(1))
    if tail is not None and tail.lse_raw is not None:
        tail = tail._replace(lse_raw=torch.logaddexp(tail.lse_raw, picked_K.logsumexp(1)))
    lse_kept, tail, top_logit, highest, label_logit = shards.merge(lse_kept, tail, top_logit, highest, label_logit)
    student = student_rows(z_K, tail, lse_kept)
    loss, gradient, entropy = row_math(student, sides, o, held_K, shards.sum)

    # A row of weight 0 that could not be dropped without a device synchronisation may hold anything: where, not ×.
    weights = problem.weights[part]
    live = weights != 0
    results = {"per_token": loss, "teacher_mass": sides.mass, "entropy": entropy}
    if student.tail is not None:
        results["student_mass"] = torch.exp(student.lse_kept - student.lse)
        if label_logit is not None:
            normaliser = student.lse if student.tail.lse_raw is None else student.tail.lse_raw
            results["label_logprob"] = label_logit - normaliser
    for name, values in results.items():
        if values is not None:
            values = values.clamp(max=1.0) if name.endswith("mass") else values
            outputs.put(part, name, torch.where(live, values, 0.0))
    if top_logit is not None and highest is not None:
        outputs.put(part, "top1_agree", (top_logit >= highest) & live)

    scale = weights / o.temperature
    alpha, beta = (None if x is None else torch.where(live, x * scale, 0.0) for x in gradient[:2])
    complete_K = torch.where(live[:, None], gradient.complete_K * scale[:, None], 0.0)
    if o.softcap is not None:
        complete_K = complete_K * (1.0 - (picked_K / o.softcap).clamp(min=-1.0).square())
    return RowGradient(alpha, beta, complete_K), None if student.tail is None else student.tail.lse

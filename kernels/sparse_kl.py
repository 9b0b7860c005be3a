"""The row mathematics of a top-K divergence: from K student logits and a few row scalars to loss and gradient.

With z the student logits / T, l their logsumexp, q = softmax(z), p the teacher, S the kept ids and "t" the rest,
every divergence here has a gradient that needs only two dense scalars per row,

    ∂L/∂z_j = exp(z_j − l_t) · (α + β z_j)   for j outside S,      a complete value g_k   for k in S,

where l_t is the logsumexp of the ids outside S. (α = q_t A, β = q_t B for the q_j (A + B z_j) form of the papers;
dividing by the tail's own mass keeps forward "bucket" exact, α = q_t − p_t, where 1 − p_t/q_t would cancel.)

    forward  L = Σ_S p (log p − log q) [+ p_t log(p_t/q_t)]
             g: bucket q − p · drop qP − p · zero q − p̃ · renormalize q̃ − p̃
             α: bucket q_t − p_t · drop P q_t · zero q_t · renormalize 0
    reverse  L = Σ_S q (log q − log p) [+ q_t r_t], r = log q − log p
             g: bucket q (r − L) · drop q (r + 1 − L − Q) · zero q (log q − log p̃ − L) · renormalize q̃ (r̃ − L)
             α: bucket q_t (r_t − L) · drop −q_t (L + Q) · zero q_t (100 − l − L) with β = q_t · renormalize 0
    jsd      m = b p + (1 − b) q, u = (1 − b) log(q/m), U = Σ q u over the cells;  g = q (u − U), α = q_t (u_t − U)
    mixed    w · forward + (1 − w) · reverse

The tail is never 1 − Q: the K logits are gathered and overwritten ("poisoned") before the dense pass, which then
measures the complement directly. log 0 is the finite LOG_ZERO, so 0 · log 0 is 0 without a mask.

Letters: c rows, K kept, V columns of this shard; [c] row scalars carry no suffix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd._kernels.rows import LOG_ZERO, LOG_ZERO_BOUND, Objective, RowGradient, Tail, TopK

# log-probability a teacher gives to what it never listed ("zero", reverse) and the floor of an empty tail ("bucket").
TEACHER_FLOOR = -100.0


class TeacherRows(NamedTuple):
    """The teacher's side; log-probabilities LOG_ZERO at ignored entries."""

    log_p_K: Tensor
    log_p_tail: Tensor | None
    mass: Tensor | None  # the true P, when the teacher shipped a logsumexp


class StudentRows(NamedTuple):
    """The student's side: z at S (LOG_ZERO where not held here), row scalars over all ranks.

    ``lse`` is over the whole vocabulary, or over S where the rest was not measured (``tail`` None).
    """

    z_K: Tensor
    lse_kept: Tensor
    tail: Tail | None
    lse: Tensor


# ---------------------------------------------------------------- the two sides of a row


def teacher_rows(
    teacher: TopK, keep_K: Tensor | None, objective: Objective, dtype: torch.dtype, whole_vocabulary: bool
) -> TeacherRows:
    """Log-probabilities of the teacher from what was received, rounded or not.

    With ``tail_logsumexp`` the normaliser is formed from the received values themselves, so P ≤ 1 and log p_t is
    exact. With ``logsumexp`` alone the tail is a difference: clamped at 2⁻²³ · max(1, |logsumexp|), the rounding
    error of that difference. ``whole_vocabulary``: K is the vocabulary, so that nothing is outside.
    """
    t_K = teacher.logits.to(dtype)
    if objective.temperature != 1.0:
        t_K = t_K / objective.temperature
    if keep_K is not None:
        t_K = t_K.masked_fill(~keep_K, LOG_ZERO)
    lse_kept = t_K.logsumexp(1)
    lse, log_tail = lse_kept, None
    if whole_vocabulary:
        log_tail = torch.full_like(lse_kept, LOG_ZERO)
    elif teacher.tail_logsumexp is not None:
        log_tail = teacher.tail_logsumexp.to(dtype).clamp(min=LOG_ZERO)
        lse = torch.logaddexp(lse_kept, log_tail)
    elif teacher.logsumexp is not None:
        lse = teacher.logsumexp.to(dtype)
        if objective.outside == "bucket":
            rounding = 2.0**-23 * lse.abs().clamp(min=1.0)
            log_tail = lse + torch.log(torch.maximum(-torch.expm1(lse_kept - lse), rounding))
            lse = torch.logaddexp(lse_kept, log_tail)
    known = whole_vocabulary or teacher.tail_logsumexp is not None or teacher.logsumexp is not None
    normaliser = lse_kept if objective.outside in ("renormalize", "zero") else lse
    log_p_K = t_K - normaliser[:, None]
    if keep_K is not None:
        log_p_K = log_p_K.masked_fill(~keep_K, LOG_ZERO)
    return TeacherRows(
        log_p_K,
        (log_tail - lse).clamp(min=LOG_ZERO) if log_tail is not None else None,
        torch.exp(lse_kept - lse) if known else None,
    )


def student_rows(z_K: Tensor, tail: Tail | None, lse_kept: Tensor) -> StudentRows:
    """Join the kept ids and the rest; a tail that is empty on every rank is LOG_ZERO exactly: its mass is 0."""
    if tail is None:
        return StudentRows(z_K, lse_kept, None, lse_kept)
    tail = tail._replace(lse=torch.where(tail.lse < LOG_ZERO_BOUND, LOG_ZERO, tail.lse))
    return StudentRows(z_K, lse_kept, tail, torch.logaddexp(lse_kept, tail.lse))


# ---------------------------------------------------------------- loss and gradient of a row

Reduce = Callable[[Tensor], Tensor]


def row_math(
    student: StudentRows, teacher: TeacherRows, objective: Objective, held_K: Tensor | None, reduce: Reduce
) -> tuple[Tensor, RowGradient, Tensor | None]:
    """L [c], ∂L/∂z, and the entropy of q (when wanted) of a chunk of rows.

    ``held_K``: which kept ids this rank holds (None: all); ``reduce`` sums a stack of row scalars [m, c] over the
    ranks. Ids held elsewhere count 0 here: their z is LOG_ZERO, so q = 0, and their p is masked.
    """
    o = objective
    renormalize = o.outside == "renormalize"
    forward, reverse = o.kl in ("forward", "mixed"), o.kl in ("reverse", "mixed")
    normaliser = student.lse_kept if renormalize else student.lse
    log_q_K = student.z_K - normaliser[:, None]
    q_K = log_q_K.exp()
    p_K = teacher.log_p_K.exp()
    if held_K is not None:
        p_K = p_K.masked_fill(~held_K, 0.0)
    ratio_K = log_q_K - teacher.log_p_K

    sums = []
    u_K = None
    if forward:
        sums.append(-(p_K * ratio_K).sum(1))
    if reverse:
        sums.append((q_K * ratio_K).sum(1))
    if o.kl == "jsd":
        log_m_K = _log_mix(teacher.log_p_K, log_q_K, o.jsd_beta)
        u_K = (1.0 - o.jsd_beta) * (log_q_K - log_m_K)
        student_side = (q_K * u_K).sum(1)
        sums += [o.jsd_beta * (p_K * (teacher.log_p_K - log_m_K)).sum(1) + student_side, student_side]
    if o.stats:
        sums.append((q_K * log_q_K).sum(1))
    totals = list(reduce(torch.stack(sums)).unbind(0))

    entropy = _entropy(totals.pop(), student, renormalize) if o.stats else None
    if o.kl == "jsd":
        assert u_K is not None
        return *_jsd(totals, student, teacher, o, q_K, u_K), entropy
    loss_f = gradient_f = loss_r = gradient_r = None
    if forward:
        loss_f, gradient_f = _forward(totals.pop(0), student, teacher, o, q_K, p_K)
    if reverse:
        loss_r, gradient_r = _reverse(totals.pop(0), student, teacher, o, q_K, ratio_K)
    if loss_r is None or gradient_r is None:
        assert loss_f is not None and gradient_f is not None
        return loss_f, gradient_f, entropy
    if loss_f is None or gradient_f is None:
        return loss_r, gradient_r, entropy
    w = o.mixed_weight
    return torch.lerp(loss_r, loss_f, w), _mix(gradient_f, gradient_r, w), entropy


def _forward(loss: Tensor, student: StudentRows, teacher: TeacherRows, o: Objective, q_K: Tensor, p_K: Tensor):
    if o.outside == "renormalize":
        return loss, RowGradient(None, None, q_K - p_K)
    q_tail, log_q_tail = _tail_of(student)
    if o.outside == "zero":
        return loss, RowGradient(q_tail, None, q_K - p_K)
    if o.outside == "drop":
        assert teacher.mass is not None
        return loss, RowGradient(teacher.mass * q_tail, None, q_K * teacher.mass[:, None] - p_K)
    assert teacher.log_p_tail is not None
    p_tail = teacher.log_p_tail.exp()
    loss = loss + p_tail * (teacher.log_p_tail - log_q_tail)
    return loss, RowGradient(q_tail - p_tail, None, q_K - p_K)


def _reverse(loss: Tensor, student: StudentRows, teacher: TeacherRows, o: Objective, q_K: Tensor, ratio_K: Tensor):
    if o.outside == "renormalize":
        return loss, RowGradient(None, None, q_K * (ratio_K - loss[:, None]))
    q_tail, log_q_tail = _tail_of(student)
    if o.outside == "drop":
        level = loss + torch.exp(student.lse_kept - student.lse)
        return loss, RowGradient(-level * q_tail, None, q_K * (ratio_K + (1.0 - level)[:, None]))
    if o.outside == "bucket":
        assert teacher.log_p_tail is not None
        ratio_tail = log_q_tail - teacher.log_p_tail.clamp(min=TEACHER_FLOOR)
        loss = loss + q_tail * ratio_tail
        return loss, RowGradient(q_tail * (ratio_tail - loss), None, q_K * (ratio_K - loss[:, None]))
    assert student.tail is not None and student.tail.mean is not None
    loss = loss + q_tail * (student.tail.mean - student.lse - TEACHER_FLOOR)
    return loss, RowGradient(q_tail * (-TEACHER_FLOOR - student.lse - loss), q_tail, q_K * (ratio_K - loss[:, None]))


def _jsd(totals: list[Tensor], student: StudentRows, teacher: TeacherRows, o: Objective, q_K: Tensor, u_K: Tensor):
    loss, level = totals
    alpha = None
    if o.outside == "bucket":
        q_tail, log_q_tail = _tail_of(student)
        assert teacher.log_p_tail is not None
        log_m_tail = _log_mix(teacher.log_p_tail, log_q_tail, o.jsd_beta)
        u_tail = (1.0 - o.jsd_beta) * (log_q_tail - log_m_tail)
        p_tail = teacher.log_p_tail.exp()
        loss = loss + o.jsd_beta * p_tail * (teacher.log_p_tail - log_m_tail) + q_tail * u_tail
        level = level + q_tail * u_tail
        alpha = q_tail * (u_tail - level)
    return loss, RowGradient(alpha, None, q_K * (u_K - level[:, None]))


def _tail_of(student: StudentRows) -> tuple[Tensor, Tensor]:
    """q_t and log q_t."""
    assert student.tail is not None
    log_q_tail = student.tail.lse - student.lse
    return log_q_tail.exp(), log_q_tail


def _entropy(kept: Tensor, student: StudentRows, renormalize: bool) -> Tensor:
    """Entropy of q from Σ_S q log q (or Σ q̃ log q̃) and the tail's mean logit."""
    assert student.tail is not None and student.tail.mean is not None
    if renormalize:
        log_mass = student.lse_kept - student.lse
        kept = log_mass.exp() * (kept + log_mass)
    q_tail = torch.exp(student.tail.lse - student.lse)
    return -(kept + q_tail * (student.tail.mean - student.lse))


def _log_mix(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """log(β p + (1 − β) q)."""
    log_beta, log_rest = torch.tensor([beta, 1.0 - beta], dtype=torch.float64).log().tolist()
    return torch.logaddexp(log_p + log_beta, log_q + log_rest)


def _mix(a: RowGradient, b: RowGradient, w: float) -> RowGradient:
    """w·a + (1 − w)·b, absent dense parts counting 0."""

    def mix(x: Tensor | None, y: Tensor | None) -> Tensor | None:
        if x is None:
            return None if y is None else (1.0 - w) * y
        return w * x if y is None else w * x + (1.0 - w) * y

    return RowGradient(mix(a.alpha, b.alpha), mix(a.beta, b.beta), w * a.complete_K + (1.0 - w) * b.complete_K)

"""``row_finish`` on a GPU: everything between the statistics and the dlogits of a row in one launch.

One program handles one row: it loads K student and K teacher logits once, and writes the row's loss, its per-token
figures, α, β and the complete gradient at the kept ids. With other ranks it is launched three times, with exchanges of
row scalars in between: ``MEASURE`` (what has to be merged), ``SUM`` (what has to be summed), ``WRITE``.

Letters: c rows of a chunk, K kept; [c] row scalars carry no suffix.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd._kernels import row_finish
from fastkd._kernels.problem import Outputs, Problem
from fastkd._kernels.rows import RowGradient, Tail, TopK
from fastkd._kernels.triton_math import (
    BOUND,
    BUCKET,
    DROP,
    FORWARD,
    JSD,
    LSE,
    MIXED,
    NEITHER,
    RENORMALIZE,
    REVERSE,
    TAIL,
    WHOLE,
    ZERO,
    ZERO_OUTSIDE,
    forward,
    jsd,
    logaddexp,
    logsumexp,
    reverse,
    row_sums,
    teacher_side,
)
from fastkd._kernels.tuning import Tile, tile

EVERYTHING, MEASURE, SUM, WRITE = (tl.constexpr(i) for i in range(4))
_KL = {"forward": FORWARD, "reverse": REVERSE, "mixed": MIXED, "jsd": JSD}
_OUTSIDE = {"renormalize": RENORMALIZE, "zero": ZERO_OUTSIDE, "bucket": BUCKET, "drop": DROP}
# A program holds its row in registers: about ten vectors of K. Longer rows take the torch form.
_MOST_KEPT = 8192


# Row numbers change from call to call: one program for all of them.
@triton.jit(do_not_specialize=["first_row", "count"])
def finish_kernel(
    # the chunk
    picked, held, teacher_logits, shipped, weights, rows, tail_lse, tail_max, tail_mean, tail_raw, label_logit,
    # row scalars of this rank (written by MEASURE, SUM) or of all (read by SUM, WRITE)
    kept_lse, top_logit, highest, sums,
    # results: per token, and the gradient
    per_token, teacher_mass, student_mass, entropy, label_logprob, top1_agree, alpha, beta, complete, lse_tail,
    # settings
    first_row, count, kept, per_temperature, cap, mixed_weight, jsd_beta, log_beta, log_rest,
    KL: tl.constexpr, OUTSIDE: tl.constexpr, SHIPPED: tl.constexpr, MAY_IGNORE: tl.constexpr, CAP: tl.constexpr,
    PHASE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """See the module. Absent inputs and results are None, and their code with them."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    inside = k < kept
    raw_K = tl.load(picked + row * kept + k, mask=inside, other=ZERO)
    z_K = raw_K * per_temperature
    t_K = tl.load(teacher_logits + row * kept + k, mask=inside, other=float("-inf")).to(tl.float32)
    keep_K = inside
    if MAY_IGNORE:
        keep_K = keep_K & (t_K != float("-inf"))
    t_K = tl.where(keep_K, t_K * per_temperature, ZERO)
    extra = 0.0
    if shipped is not None:
        extra = tl.load(shipped + row)
    log_p_K, log_p_t, mass = teacher_side(t_K, keep_K, extra, OUTSIDE, SHIPPED)

    # ---- the student's side, over the ids of this rank or of all
    if PHASE == EVERYTHING or PHASE == MEASURE:  # noqa: SIM109 (programs know no `in`)
        lse_kept = logsumexp(z_K)
        if highest is not None:
            # The teacher's likeliest id, the lowest in a tie.
            best = tl.min(tl.where(t_K == tl.max(t_K, 0), k, BLOCK), 0)
            top = tl.sum(tl.where(k == best, z_K, 0.0), 0)
            high = tl.maximum(tl.load(tail_max + row), tl.max(z_K, 0))
        if tail_raw is not None:
            lse_raw = logaddexp(tl.load(tail_raw + row), logsumexp(raw_K))
        if PHASE == MEASURE:
            tl.store(kept_lse + row, lse_kept)
            if highest is not None:
                tl.store(top_logit + row, top)
                tl.store(highest + row, high)
            if tail_raw is not None:
                tl.store(tail_raw + row, lse_raw)
            return
    else:
        lse_kept = tl.load(kept_lse + row)
        if highest is not None:
            top = tl.load(top_logit + row)
            high = tl.load(highest + row)
        if tail_raw is not None:
            lse_raw = tl.load(tail_raw + row)
    lse = lse_kept
    lse_t = lse_kept * 0.0 + ZERO
    if tail_lse is not None:
        lse_t = tl.load(tail_lse + row)
        lse_t = tl.where(lse_t < BOUND, ZERO, lse_t)
        lse = logaddexp(lse_kept, lse_t)
    log_q_t = lse_t - lse
    q_t = tl.exp(log_q_t)
    normaliser = lse
    if OUTSIDE == RENORMALIZE:
        normaliser = lse_kept
    log_q_K = z_K - normaliser
    q_K = tl.exp(log_q_K)
    p_K = tl.exp(log_p_K)
    if held is not None:  # p counts where q does: each id on one rank
        p_K = tl.where(tl.load(held + row * kept + k, mask=inside, other=0) != 0, p_K, 0.0)

    # ---- sums over S
    if PHASE == WRITE:
        first = tl.load(sums + row)
        second = tl.load(sums + count + row)
        if entropy is not None:
            self_information = tl.load(sums + 2 * count + row)
    else:
        first, second = row_sums(log_p_K, p_K, log_q_K, q_K, jsd_beta, log_beta, log_rest, KL)
        if entropy is not None:
            self_information = tl.sum(q_K * log_q_K, 0)
        if PHASE == SUM:
            tl.store(sums + row, first)
            tl.store(sums + count + row, second)
            if entropy is not None:
                tl.store(sums + 2 * count + row, self_information)
            return

    # ---- loss and gradient
    student_share = tl.exp(lse_kept - lse)
    mean = 0.0
    if tail_mean is not None:
        mean = tl.load(tail_mean + row)
    p_t = tl.exp(log_p_t)
    b = q_t * 0.0
    if KL == JSD:
        loss, a, g_K = jsd(
            first, second, log_p_K, log_q_K, q_K, p_t, log_p_t, q_t, log_q_t, jsd_beta, log_beta, log_rest, OUTSIDE
        )
    elif KL == FORWARD:
        loss, a, g_K = forward(first, p_K, q_K, p_t, log_p_t, q_t, log_q_t, mass, OUTSIDE)
    elif KL == REVERSE:
        loss, a, b, g_K = reverse(
            second, q_K, log_q_K - log_p_K, log_p_t, q_t, log_q_t, student_share, mean, lse, OUTSIDE
        )
    else:
        loss_f, a_f, g_f_K = forward(first, p_K, q_K, p_t, log_p_t, q_t, log_q_t, mass, OUTSIDE)
        loss_r, a_r, b_r, g_r_K = reverse(
            second, q_K, log_q_K - log_p_K, log_p_t, q_t, log_q_t, student_share, mean, lse, OUTSIDE
        )
        w = mixed_weight
        loss = w * loss_f + (1.0 - w) * loss_r
        a = w * a_f + (1.0 - w) * a_r
        b = (1.0 - w) * b_r
        g_K = w * g_f_K + (1.0 - w) * g_r_K

    # ---- results. A row of weight 0 that could not be dropped may hold anything: where, not ×.
    weight = tl.load(weights + row)
    live = weight != 0.0
    place = first_row + row
    if rows is not None:
        place = tl.load(rows + first_row + row)
    tl.store(per_token + place, tl.where(live, loss, 0.0))
    if teacher_mass is not None:
        tl.store(teacher_mass + place, tl.where(live, tl.minimum(mass, 1.0), 0.0))
    if student_mass is not None:
        tl.store(student_mass + place, tl.where(live, tl.minimum(student_share, 1.0), 0.0))
    if entropy is not None:
        if OUTSIDE == RENORMALIZE:
            self_information = student_share * (self_information + lse_kept - lse)
        bits = -(self_information + q_t * (mean - lse))
        tl.store(entropy + place, tl.where(live, bits, 0.0))
    if label_logprob is not None:
        of = lse
        if tail_raw is not None:
            of = lse_raw
        tl.store(label_logprob + place, tl.where(live, tl.load(label_logit + row) - of, 0.0))
    if highest is not None:
        tl.store(top1_agree + place, (live & (top >= high)).to(tl.int8))
    scale = weight * per_temperature
    if alpha is not None:
        tl.store(alpha + row, tl.where(live, a * scale, 0.0))
        tl.store(lse_tail + row, lse_t)
    if beta is not None:
        tl.store(beta + row, tl.where(live, b * scale, 0.0))
    if CAP:
        tanh_K = tl.maximum(raw_K / cap, -1.0)
        g_K = g_K * (1.0 - tanh_K * tanh_K)
    tl.store(complete + row * kept + k, tl.where(live, g_K * scale, 0.0), mask=inside)


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
    """See ``row_finish.finish_rows``."""
    c, kept = picked_K.shape
    if kept > _MOST_KEPT:
        return row_finish.finish_rows(problem, outputs, part, teacher, held_K, picked_K, tail, label_logit)
    o, shards, make = problem.objective, problem.shards, picked_K.new_empty
    wants_top = o.stats and tail is not None
    top_logit, highest = make((2, c)).unbind(0) if wants_top else (None, None)
    lse_kept, alpha, beta, lse_tail = make((4, c)).unbind(0)
    sums, complete_K = make((3, c)), make((c, kept))
    fields = outputs.fields
    agree = fields.get("top1_agree")
    shipped, kind = _shipped(problem, teacher)
    dense = o.dense_gradient and tail is not None

    def launch(phase: tl.constexpr, tail: Tail | None, top_logit, highest, lse_kept, sums, label_logit) -> None:
        lse_t, max_t, mean_t, raw_t = tail or (None,) * 4
        finish_kernel[(c,)](
            picked_K, held_K, teacher.logits.contiguous(), shipped, problem.weights[part], problem.rows, lse_t, max_t,
            mean_t, raw_t, label_logit, lse_kept, top_logit, highest, sums,
            fields["per_token"], fields.get("teacher_mass"), fields.get("student_mass"), fields.get("entropy"),
            fields.get("label_logprob"), None if agree is None else agree.view(torch.int8),
            alpha if dense else None, beta if dense and o.linear_term else None, complete_K, lse_tail,
            part.start, c, kept, 1.0 / o.temperature, o.softcap or 0.0, o.mixed_weight, o.jsd_beta,
            math.log(o.jsd_beta), math.log1p(-o.jsd_beta),
            KL=_KL[o.kl].value, OUTSIDE=_OUTSIDE[o.outside].value, SHIPPED=kind.value, MAY_IGNORE=problem.may_ignore,
            CAP=o.softcap is not None, PHASE=phase.value, BLOCK=block, num_warps=warps,
        )  # fmt: skip

    block, warps = triton.next_power_of_2(kept), warps_for(kept, tile("finish_rows", picked_K.device))
    if c and not shards.parallel:
        launch(EVERYTHING, tail, top_logit, highest, lse_kept, sums, label_logit)
    elif c:
        launch(MEASURE, tail, top_logit, highest, lse_kept, sums, label_logit)
        lse_kept, tail, top_logit, highest, label_logit = shards.merge(lse_kept, tail, top_logit, highest, label_logit)
        launch(SUM, tail, top_logit, highest, lse_kept, sums, label_logit)
        launch(WRITE, tail, top_logit, highest, lse_kept, shards.sum(sums), label_logit)
    gradient = RowGradient(alpha if dense else None, beta if dense and o.linear_term else None, complete_K)
    return gradient, lse_tail if dense else None


def warps_for(kept: int, tile: Tile) -> int:
    """Warps of a program for K kept, in proportion to the tuned size."""
    return max(1, min(16, tile.warps * triton.next_power_of_2(kept) // tile.block))


def _shipped(problem: Problem, teacher: TopK) -> tuple[Tensor | None, tl.constexpr]:
    """The logsumexp that the teacher sent, in float32, and which one it is."""
    if problem.whole_vocabulary:
        return None, WHOLE
    if teacher.tail_logsumexp is not None:
        return teacher.tail_logsumexp.float().contiguous(), TAIL
    if teacher.logsumexp is not None:
        return teacher.logsumexp.float().contiguous(), LSE
    return None, NEITHER

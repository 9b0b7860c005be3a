"""The row mathematics of ``sparse_kl`` as functions of a Triton program that holds one row of K entries.

Same definitions and same names as there; see that file for the formulas. Entries behind K and ignored entries have
log-probability LOG_ZERO on the teacher's side and logit LOG_ZERO on the student's: they count 0 everywhere.

Letters: K kept (padded to a power of two); names without a suffix are scalars of the row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastkd._kernels.rows import LOG_ZERO, LOG_ZERO_BOUND
from fastkd._kernels.sparse_kl import TEACHER_FLOOR

ZERO = tl.constexpr(LOG_ZERO)
BOUND = tl.constexpr(LOG_ZERO_BOUND)
FLOOR = tl.constexpr(TEACHER_FLOOR)

# Names of settings, as numbers a program can be specialised on.
FORWARD, REVERSE, MIXED, JSD = (tl.constexpr(i) for i in range(4))
RENORMALIZE, ZERO_OUTSIDE, BUCKET, DROP = (tl.constexpr(i) for i in range(4))
# What the teacher shipped: the whole vocabulary, the tail's logsumexp, the logsumexp of all, neither.
WHOLE, TAIL, LSE, NEITHER = (tl.constexpr(i) for i in range(4))


@triton.jit
def logaddexp(a, b):
    """log(e^a + e^b) of finite values."""
    high = tl.maximum(a, b)
    return high + tl.log(1.0 + tl.exp(tl.minimum(a, b) - high))


@triton.jit
def logsumexp(x_K):
    """log Σ e^x of a row."""
    high = tl.max(x_K, 0)
    return high + tl.log(tl.sum(tl.exp(x_K - high), 0))


@triton.jit
def one_minus_exp(x):
    """1 − e^x for x ≤ 0, to full relative precision near 0."""
    near = -x * (1.0 + x / 2.0 * (1.0 + x / 3.0 * (1.0 + x / 4.0 * (1.0 + x / 5.0 * (1.0 + x / 6.0)))))
    return tl.where(x > -0.2, near, 1.0 - tl.exp(x))


@triton.jit
def teacher_side(t_K, keep_K, shipped, OUTSIDE: tl.constexpr, SHIPPED: tl.constexpr):
    """(log p [K], log p_t, P) of a row; ``sparse_kl.teacher_rows``. ``shipped`` is the logsumexp that came along."""
    lse_kept = logsumexp(t_K)
    lse = lse_kept
    log_tail = lse_kept * 0.0 + ZERO
    if SHIPPED == TAIL:
        log_tail = tl.maximum(shipped, ZERO)
        lse = logaddexp(lse_kept, log_tail)
    elif SHIPPED == LSE:
        lse = shipped
        if OUTSIDE == BUCKET:
            rounding = 1.1920929e-07 * tl.maximum(tl.abs(lse), 1.0)
            log_tail = lse + tl.log(tl.maximum(one_minus_exp(tl.minimum(lse_kept - lse, 0.0)), rounding))
            lse = logaddexp(lse_kept, log_tail)
    normaliser = lse
    if OUTSIDE == RENORMALIZE or OUTSIDE == ZERO_OUTSIDE:  # noqa: SIM109 (programs know no `in`)
        normaliser = lse_kept
    log_p_K = tl.where(keep_K, t_K - normaliser, ZERO)
    return log_p_K, tl.maximum(log_tail - lse, ZERO), tl.exp(lse_kept - lse)


@triton.jit
def row_sums(log_p_K, p_K, log_q_K, q_K, jsd_beta, log_beta, log_rest, KL: tl.constexpr):
    """(first, second) sums over S that the loss needs; of ``row_math``."""
    ratio_K = log_q_K - log_p_K
    if KL == JSD:
        log_m_K = logaddexp(log_p_K + log_beta, log_q_K + log_rest)
        student = tl.sum(q_K * (1.0 - jsd_beta) * (log_q_K - log_m_K), 0)
        return jsd_beta * tl.sum(p_K * (log_p_K - log_m_K), 0) + student, student
    first = -tl.sum(p_K * ratio_K, 0)
    second = tl.sum(q_K * ratio_K, 0)
    return first, second


@triton.jit
def forward(loss, p_K, q_K, p_t, log_p_t, q_t, log_q_t, mass, OUTSIDE: tl.constexpr):
    """(L, α, complete values) of the forward divergence."""
    if OUTSIDE == RENORMALIZE:
        return loss, q_t * 0.0, q_K - p_K
    elif OUTSIDE == ZERO_OUTSIDE:
        return loss, q_t, q_K - p_K
    elif OUTSIDE == DROP:
        return loss, mass * q_t, q_K * mass - p_K
    else:
        return loss + p_t * (log_p_t - log_q_t), q_t - p_t, q_K - p_K


@triton.jit
def reverse(loss, q_K, ratio_K, log_p_t, q_t, log_q_t, student_mass, mean, lse, OUTSIDE: tl.constexpr):
    """(L, α, β, complete values) of the reverse divergence; β is there for "zero" alone."""
    if OUTSIDE == RENORMALIZE:
        return loss, q_t * 0.0, q_t * 0.0, q_K * (ratio_K - loss)
    elif OUTSIDE == DROP:
        level = loss + student_mass
        return loss, -level * q_t, q_t * 0.0, q_K * (ratio_K + (1.0 - level))
    elif OUTSIDE == BUCKET:
        ratio_t = log_q_t - tl.maximum(log_p_t, FLOOR)
        loss = loss + q_t * ratio_t
        return loss, q_t * (ratio_t - loss), q_t * 0.0, q_K * (ratio_K - loss)
    else:
        loss = loss + q_t * (mean - lse - FLOOR)
        return loss, q_t * (-FLOOR - lse - loss), q_t, q_K * (ratio_K - loss)


@triton.jit
def jsd(
    loss, level, log_p_K, log_q_K, q_K, p_t, log_p_t, q_t, log_q_t, jsd_beta, log_beta, log_rest, OUTSIDE: tl.constexpr
):  # fmt: skip
    """(L, α, complete values) of the Jensen-Shannon divergence."""
    log_m_K = logaddexp(log_p_K + log_beta, log_q_K + log_rest)
    u_K = (1.0 - jsd_beta) * (log_q_K - log_m_K)
    alpha = q_t * 0.0
    if OUTSIDE == BUCKET:
        log_m_t = logaddexp(log_p_t + log_beta, log_q_t + log_rest)
        u_t = (1.0 - jsd_beta) * (log_q_t - log_m_t)
        loss = loss + jsd_beta * p_t * (log_p_t - log_m_t) + q_t * u_t
        level = level + q_t * u_t
        alpha = q_t * (u_t - level)
    return loss, alpha, q_K * (u_K - level)

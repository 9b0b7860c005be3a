"""What the kernels compute, in plain float64 on dense logits: the oracle of every test.

Written for reading: dense [N, V] tensors, masks, one line per definition, gradients by autograd. Nothing here shares
code with the kernels. The divergence is taken over *cells*, probabilities that a token's vocabulary is cut into: the K
kept ids, and for "bucket" one more for the rest.

Letters: N tokens, V vocabulary, K kept, C cells.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TEACHER_FLOOR = -100.0  # log-probability of ids outside the kept ones, "zero" with a reverse term; of an empty tail


class Reference(NamedTuple):
    """Per-token results [N] in float64; ``per_token`` carries the autograd graph."""

    per_token: Tensor
    teacher_mass: Tensor
    student_mass: Tensor
    entropy: Tensor
    label_logprob: Tensor | None
    top1_agree: Tensor


def topk(logits: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids [N, K] ascending, logits [N, K], logsumexp [N], tail_logsumexp [N]; of equal logits the lower id is kept."""
    logits = logits.detach().double()
    # A stable descending sort keeps equal logits in the order of their ids.
    kept_ids = logits.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(1).values
    kept = _member(kept_ids, logits.shape[1])
    z = logits / temperature
    return kept_ids, logits.gather(1, kept_ids), z.logsumexp(1), z.masked_fill(kept, -torch.inf).logsumexp(1)


def topk_kl(
    logits: Tensor,
    indices: Tensor,
    teacher_logits: Tensor,
    logsumexp: Tensor | None,
    tail_logsumexp: Tensor | None,
    *,
    kl: str,
    outside: str,
    mixed_weight: float = 0.5,
    jsd_beta: float = 0.5,
    temperature: float = 1.0,
    labels: Tensor | None = None,
) -> Reference:
    """The divergences of ``fastkd.kernels.topk_kl`` for student logits [N, V] (valid ids only).

    ``tail_logsumexp`` None: the teacher's tail is exp(logsumexp) minus the kept part. Both None: P counts as 1.
    """
    n, vocabulary = logits.shape
    log_q_V = torch.log_softmax(logits.double() / temperature, dim=1)
    t_K = teacher_logits.double() / temperature
    listed_K = torch.isfinite(t_K)
    kept_V = torch.zeros(n, vocabulary, dtype=torch.bool)
    for row in range(n):
        kept_V[row, indices[row][listed_K[row]].long()] = True

    # Teacher over the vocabulary, −inf where it says nothing.
    t_V = torch.full((n, vocabulary), -torch.inf, dtype=torch.float64)
    for row in range(n):
        t_V[row, indices[row][listed_K[row]].long()] = t_K[row][listed_K[row]]
    lse_kept = t_V.logsumexp(1)
    if t_K.shape[1] == vocabulary:
        lse_tail = torch.full((n,), -torch.inf, dtype=torch.float64)
    elif tail_logsumexp is not None:
        lse_tail = tail_logsumexp.double()
    elif logsumexp is not None:
        lse_tail = logsumexp.double() + torch.log1p(-torch.exp(lse_kept - logsumexp.double()))
    else:
        lse_tail = torch.full((n,), -torch.inf, dtype=torch.float64)
    lse = torch.logaddexp(lse_kept, lse_tail)
    log_p_V = t_V - lse[:, None]
    log_p_tail = lse_tail - lse

    per_token = torch.zeros(n, dtype=torch.float64)
    share = {"forward": 1.0, "reverse": 0.0, "mixed": mixed_weight}.get(kl)
    if kl == "jsd":
        log_p_C, log_q_C = _cells(log_p_V, log_p_tail, log_q_V, kept_V, outside)
        m_C = jsd_beta * log_p_C.exp() + (1 - jsd_beta) * log_q_C.exp()
        log_m_C = torch.where(m_C > 0, m_C, 1.0).log()  # where m = 0 both terms are 0
        per_token = jsd_beta * _kl(log_p_C, log_m_C) + (1 - jsd_beta) * _kl(log_q_C, log_m_C)
    else:
        assert share is not None
        if share > 0:
            log_p_C, log_q_C = _cells(log_p_V, log_p_tail, log_q_V, kept_V, outside)
            per_token = per_token + share * _kl(log_p_C, log_q_C)
        if share < 1:
            log_p_C, log_q_C = _cells(log_p_V, log_p_tail, log_q_V, kept_V, outside, reverse=True)
            per_token = per_token + (1 - share) * _kl(log_q_C, log_p_C)

    q_V = log_q_V.detach().exp()
    log_label = None
    if labels is not None:
        log_label = torch.log_softmax(logits.detach().double(), 1).gather(1, labels[:, None].long()).squeeze(1)
    return Reference(
        per_token,
        teacher_mass=torch.exp(lse_kept - lse),
        student_mass=(q_V * kept_V).sum(1),
        entropy=-torch.special.xlogy(q_V, q_V).sum(1),
        label_logprob=log_label,
        top1_agree=log_q_V.detach().gather(1, t_V.argmax(1)[:, None]).squeeze(1) >= log_q_V.detach().amax(1),
    )


def _cells(
    log_p_V: Tensor, log_p_tail: Tensor, log_q_V: Tensor, kept_V: Tensor, outside: str, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """log p and log q over the cells of each token, −inf for what is not a cell (on both sides)."""
    log_p = log_p_V.masked_fill(~kept_V, -torch.inf)
    log_q = log_q_V.masked_fill(~kept_V, -torch.inf)
    if outside == "renormalize":
        return log_p - log_p.logsumexp(1, keepdim=True), log_q - log_q.logsumexp(1, keepdim=True)
    if outside == "zero":
        renormalised = log_p - log_p.logsumexp(1, keepdim=True)
        # Forward: p̃ is 0 outside. Reverse: every id is a cell, with a floor instead of log 0.
        return (renormalised.masked_fill(~kept_V, TEACHER_FLOOR), log_q_V) if reverse else (renormalised, log_q_V)
    if outside == "drop":
        return log_p, log_q
    if reverse:
        log_p_tail = log_p_tail.clamp(min=TEACHER_FLOOR)
    log_q_tail = log_q_V.masked_fill(kept_V, -torch.inf).logsumexp(1)
    return torch.cat((log_p, log_p_tail[:, None]), 1), torch.cat((log_q, log_q_tail[:, None]), 1)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Σ a (log a − log b) over the cells where a > 0."""
    positive = log_a > -torch.inf
    # Replaced before subtracting, so that neither the value nor the gradient sees inf − inf.
    difference = log_a.masked_fill(~positive, 0.0) - log_b.masked_fill(~positive, 0.0)
    return (log_a.exp().masked_fill(~positive, 0.0) * difference).sum(1)


def _member(indices: Tensor, vocabulary: int) -> Tensor:
    """[N, V] bool: which ids a row keeps."""
    kept = torch.zeros(indices.shape[0], vocabulary, dtype=torch.bool, device=indices.device)
    return kept.scatter_(1, indices.long(), True)

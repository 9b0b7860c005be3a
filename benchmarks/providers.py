"""Who is compared: the fused kernels, the same loss from materialised logits, and the fused losses of other packages.

Every provider is a function of a ``Case`` that returns a mean-per-token loss, differentiable in ``case.hidden`` and
``case.weight``, and the float64 formula that it must equal. ``gate`` checks loss and gradients on a small case before
anything is timed, and the error it finds is a column of the table.

Not all compute the same thing, and their names say so. Liger's JSD losses take the teacher's hidden states and head,
compute the divergence over the whole vocabulary, and need the teacher's GEMM for it; Liger's linear KL takes the
teacher as dense [N, V] probabilities; cut-cross-entropy computes the cross-entropy of one label per token, the least
work that any loss on a head can do.

Letters: N tokens, D hidden, V vocabulary, K kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Bench, Skipped, reason
from fastkd._kernels import reference
from fastkd._kernels.tuning import interpreting
from fastkd.kernels import TopK, topk_kl, vocab_topk


class Shape(NamedTuple):
    """N tokens, D hidden, V vocabulary, K kept."""

    n: int
    d: int
    v: int
    k: int

    def __str__(self) -> str:
        return f"N={self.n:,} D={self.d:,} V={self.v:,} K={self.k:,}"


# Triton's interpreter takes a second for a row.
GATE = Shape(3, 16, 200, 8) if interpreting() else Shape(64, 64, 1000, 32)


@dataclass(frozen=True)
class Case:
    """A student, and a teacher that is a noisy copy of it, so that the kept ids are the likely ones.

    ``hidden`` [N, D] and ``weight`` [V, D] are leaves; ``teacher_hidden`` [N, D] goes with the same head.
    """

    shape: Shape
    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher: TopK
    even: Tensor
    """[N] weights 1/N."""

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        """What is differentiated."""
        return self.hidden, self.weight

    @property
    def gradient_bytes(self) -> int:
        """Of dX and dW, which every provider has to hold."""
        return sum(leaf.numel() * leaf.element_size() for leaf in self.leaves)

    def double(self) -> Case:
        """The same in float64 on the CPU, with leaves of its own."""
        hidden, weight = (leaf.detach().cpu().double().requires_grad_() for leaf in self.leaves)
        teacher = TopK(*(None if field is None else field.cpu() for field in self.teacher))
        return replace(
            self, hidden=hidden, weight=weight, teacher_hidden=self.teacher_hidden.cpu().double(), teacher=teacher
        )


def make(shape: Shape, device: torch.device, dtype: torch.dtype) -> Case:
    """Random tensors of a shape, always the same ones."""
    torch.manual_seed(0)
    hidden = torch.randn(shape.n, shape.d, device=device, dtype=dtype)
    weight = torch.randn(shape.v, shape.d, device=device, dtype=dtype).mul_(2.0 / shape.d**0.5)
    teacher_hidden = hidden + 0.3 * torch.randn_like(hidden)
    teacher = vocab_topk(teacher_hidden, weight, shape.k)
    even = torch.full((shape.n,), 1.0 / shape.n, device=device)
    return Case(shape, hidden.requires_grad_(), weight.requires_grad_(), teacher_hidden, teacher, even)


def work_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on CUDA, float32 elsewhere."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@dataclass(frozen=True)
class Provider:
    """One contender."""

    name: str
    loss: Callable[[Case], Tensor]
    exact: Callable[[Case], Tensor]
    ours: bool = False
    missing: str | None = None
    """Why it cannot run here."""
    bytes_per_logit: float = 0.0
    """Estimated peak beyond inputs and gradients, per element of [N, V]; 0 where it does not grow with N · V."""
    prepare: Callable[[Case], Callable[[Case], Tensor]] | None = None
    """Made once, outside the timing: returns the loss."""


def step(loss: Tensor, case: Case) -> None:
    """Backward, and drop the gradients."""
    torch.autograd.grad(loss, case.leaves)


# ---------------------------------------------------------------- ours


def fused(kl: str, outside: str, **options) -> Provider:
    """``topk_kl`` with a loss and its options."""
    extra = "".join(f", {key}={value}" for key, value in options.items())

    def loss(case: Case) -> Tensor:
        weights = case.even
        return topk_kl(*case.leaves, case.teacher, kl=kl, outside=outside, token_weights=weights, **options).loss

    return Provider(f"topk_kl {kl}/{outside}{extra}", loss, lambda case: exact_topk(case, kl, outside), ours=True)


def exact_topk(case: Case, kl: str, outside: str) -> Tensor:
    """The float64 reference, mean over tokens."""
    return reference.topk_kl(case.hidden @ case.weight.T, *case.teacher, kl=kl, outside=outside).per_token.mean()


# ---------------------------------------------------------------- the same loss from materialised logits


def nemo_rl(hidden: Tensor, weight: Tensor, teacher: TopK, kl: str = "forward") -> Tensor:
    """Both sides renormalised on the kept ids, gathered from the whole log-softmax in float32."""
    logits = (hidden @ weight.T).float()
    log_q = torch.log_softmax(logits, -1).gather(1, teacher.indices.long())
    log_q = log_q - log_q.logsumexp(1, keepdim=True)
    log_p = torch.log_softmax(teacher.logits.float(), 1)
    a, b = (log_p, log_q) if kl == "forward" else (log_q, log_p)
    return (a.exp() * (a - b)).sum(1).mean()


def _true_log_probabilities(hidden: Tensor, weight: Tensor, teacher: TopK) -> tuple[Tensor, Tensor]:
    """log p and log q [N, K] of the kept ids, normalised over the whole vocabulary."""
    assert teacher.logsumexp is not None
    log_p = teacher.logits.float() - teacher.logsumexp[:, None]
    return log_p, torch.log_softmax((hidden @ weight.T).float(), -1).gather(1, teacher.indices.long())


def verl(hidden: Tensor, weight: Tensor, teacher: TopK) -> Tensor:
    """Forward KL truncated to the kept ids, true probabilities on both sides (its clamps left out)."""
    log_p, log_q = _true_log_probabilities(hidden, weight, teacher)
    return (log_p.exp() * (log_p - log_q)).sum(1).mean()


def trl(hidden: Tensor, weight: Tensor, teacher: TopK) -> Tensor:
    """Forward KL over the kept ids and one bucket, whose mass is one minus the rest (clamped at 1e-7)."""

    def with_tail(log: Tensor) -> Tensor:
        rest = torch.log(-torch.expm1(log.logsumexp(1, keepdim=True).clamp(max=-1e-7)))
        return torch.cat([log, rest], 1)

    log_p, log_q = (with_tail(log) for log in _true_log_probabilities(hidden, weight, teacher))
    return (log_p.exp() * (log_p - log_q)).sum(1).mean()


def materialised() -> list[Provider]:
    """Full logits, log_softmax, gather, autograd: the way RL libraries compute a top-k KL."""
    # On the CPU: logits, log-softmax and their two gradients. On the GPU the bf16 logits and their gradient besides.
    size = 20.0 if torch.cuda.is_available() else 16.0

    def one(name: str, loss: Callable[..., Tensor], kl: str, outside: str) -> Provider:
        return Provider(
            f"materialised, as {name}: {kl}/{outside}",
            lambda case: loss(*case.leaves, case.teacher),
            lambda case: exact_topk(case, kl, outside),
            bytes_per_logit=size,
        )

    return [
        one("NeMo RL", nemo_rl, "forward", "renormalize"),
        one("NeMo RL", partial(nemo_rl, kl="reverse"), "reverse", "renormalize"),
        one("verl", verl, "forward", "drop"),
        one("TRL", trl, "forward", "bucket"),
    ]


def compiled() -> list[Provider]:
    """torch.compile of the same, specialised to the shape."""
    torch.compiler.reset()  # its limit of recompilations counts per function, over all tables of the process

    def one(name: str, loss: Callable[..., Tensor], kl: str, outside: str) -> Provider:
        traced = torch.compile(loss, dynamic=False)

        def run(case: Case) -> Tensor:
            return traced(*case.leaves, case.teacher)

        def prepare(case: Case) -> Callable[[Case], Tensor]:
            step(run(case), case)  # compiles both directions for this shape
            return run

        return Provider(
            f"torch.compile of {name}'s: {kl}/{outside}",
            run,
            lambda case: exact_topk(case, kl, outside),
            bytes_per_logit=12.0,
            prepare=prepare,
        )

    return [one("NeMo RL", nemo_rl, "forward", "renormalize"), one("TRL", trl, "forward", "bucket")]


# ---------------------------------------------------------------- other packages


def exact_jsd(case: Case) -> Tensor:
    """Jensen–Shannon divergence over the whole vocabulary, β = 1/2."""
    log_q = torch.log_softmax(case.hidden @ case.weight.T, 1)
    log_p = torch.log_softmax(case.teacher_hidden @ case.weight.detach().T, 1)
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, dtype=log_p.dtype))
    return (0.5 * log_p.exp() * (log_p - log_m) + 0.5 * log_q.exp() * (log_q - log_m)).sum(1).mean()


def labels_of(case: Case) -> Tensor:
    """[N] the teacher's likeliest id."""
    return case.teacher.indices.gather(1, case.teacher.logits.argmax(1, keepdim=True)).squeeze(1).long()


def exact_cross_entropy(case: Case) -> Tensor:
    """Of the teacher's likeliest id."""
    return F.cross_entropy(case.hidden @ case.weight.T, labels_of(case))


def dense_teacher(case: Case) -> Tensor:
    """[N, V] float32 probabilities, 0 outside of the kept ids: forward/zero."""
    dense = case.hidden.new_zeros((case.shape.n, len(case.weight)), dtype=torch.float32)
    return dense.scatter_(1, case.teacher.indices.long(), case.teacher.logits.float().softmax(1))


def _liger_jsd(case: Case) -> Callable[[Case], Tensor]:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    module = LigerFusedLinearJSD(jsd_beta=0.5)
    return lambda case: module(*case.leaves, case.teacher_hidden, case.weight.detach(), None)


def _liger_chunked(case: Case) -> Callable[[Case], Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=case.hidden.is_cuda)
    labels = labels_of(case)  # only tell which tokens count
    return lambda case: module(*case.leaves, case.teacher_hidden, case.weight.detach(), labels)


def _liger_kl(case: Case) -> Callable[[Case], Tensor]:
    from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

    module, target = LigerFusedLinearKLDivLoss(reduction="batchmean"), dense_teacher(case)
    return lambda case: module(*case.leaves, target)


def _cut_cross_entropy(case: Case) -> Callable[[Case], Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    labels = labels_of(case)
    return lambda case: linear_cross_entropy(*case.leaves, labels)


def _unused(case: Case) -> Tensor:
    raise NotImplementedError("made by prepare")


def packages(device: torch.device) -> list[Provider]:
    """Liger and cut-cross-entropy, installed or not."""
    on_cpu = None if device.type == "cuda" else "its Triton kernels need a CUDA device"

    def missing(module: str, package: str, needs_cuda: bool = True) -> str | None:
        if find_spec(module) is None:
            return f"not installed (pip install {package})"
        return on_cpu if needs_cuda else None

    return [
        Provider("Liger fused linear JSD (full V from teacher hidden, 1 more GEMM)", _unused,
                 exact_jsd, missing=missing("liger_kernel", "liger-kernel"), prepare=_liger_jsd),
        Provider("Liger chunked JSD (full V from teacher hidden, 1 more GEMM)", _unused,
                 exact_jsd, missing=missing("liger_kernel", "liger-kernel", needs_cuda=False), prepare=_liger_chunked),
        Provider("Liger fused linear KL (forward/zero; dense [N, V] teacher not counted)", _unused,
                 lambda case: exact_topk(case, "forward", "zero"), missing=missing("liger_kernel", "liger-kernel"),
                 bytes_per_logit=6.0, prepare=_liger_kl),
        Provider("cut-cross-entropy (CE of one label, no KL: a lower bound of work)", _unused,
                 exact_cross_entropy, missing=missing("cut_cross_entropy", "cut-cross-entropy"),
                 prepare=_cut_cross_entropy),
    ]  # fmt: skip


# ---------------------------------------------------------------- the gate


def gate(bench: Bench, providers: list[Provider]) -> dict[str, float | Skipped]:
    """Relative gradient error of each against float64, or why it is left out.

    Raises:
        AssertionError: one of ours is wrong. Another provider that is wrong is skipped with its error.
    """
    dtype = work_dtype(bench.device)
    case = make(GATE, bench.device, dtype)
    exact_case = case.double()
    narrow = dtype == torch.bfloat16
    results: dict[str, float | Skipped] = {}
    for one in providers:
        if one.missing:
            results[one.name] = Skipped(one.missing)
            continue
        expected = one.exact(exact_case)
        wanted = torch.autograd.grad(expected, exact_case.leaves)
        try:
            loss = (one.prepare(case) if one.prepare else one.loss)(case)
            got = torch.autograd.grad(loss, case.leaves)
        except Exception as error:
            results[one.name] = Skipped(reason(error))
            if one.ours:
                bench.failures.append(f"{one.name}: {reason(error)}")
            continue
        value, exact = float(loss.detach()), float(expected.detach())
        off = abs(value - exact) / max(abs(exact), 1e-3)
        error = max(float((a.cpu().double() - b).norm() / b.norm()) for a, b in zip(got, wanted, strict=True))
        if one.ours:
            assert off < 1e-3, f"{one.name}: loss {value}, float64 {exact}"
            # bfloat16: dlogits and the results are rounded. The column says how much.
            assert error < (1.5e-2 if narrow else 1e-4), f"{one.name}: gradients off by {error:.1e}"
        # Others round logits to bfloat16; that is what their column shows, and no reason to leave them out.
        elif not (off < (0.1 if narrow else 1e-3) and error < (0.5 if narrow else 1e-2)):
            results[one.name] = Skipped(f"wrong: loss off by {off:.1e}, gradients by {error:.1e}")
            continue
        results[one.name] = error
    return results

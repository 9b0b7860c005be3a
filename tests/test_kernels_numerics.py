"""The numerics rules of the kernels: exact tails, ignored entries, empty tails, padding, determinism, memory."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastkd._kernels import reference, values
from fastkd.kernels import TopK, topk_kl, topk_kl_from_logits, vocab_topk

VARIANTS = [
    (kl, outside)
    for kl in ("forward", "reverse", "mixed", "jsd")
    for outside in ("renormalize", "zero", "bucket", "drop")
    if kl != "jsd" or outside in ("renormalize", "bucket")
]
EVERY_VARIANT = pytest.mark.parametrize(("kl", "outside"), VARIANTS)


def teacher_of(logits, k, temperature=1.0, dtype=torch.float32):
    """The TopK record of dense teacher logits, from the oracle."""
    ids, values, lse, tail = reference.topk(logits, k, temperature)
    return TopK(ids.int(), values.to(dtype), lse.to(dtype), tail.to(dtype))


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_tail(logits, k, log_tail, kept=None, dtype=torch.float64):
    """``logits`` with the K largest (or ``kept``) lifted until the mass outside them is exp(log_tail)."""
    logits = logits.double()
    kept = logits.topk(k).indices if kept is None else kept.long()
    tail = logits.scatter(1, kept, -torch.inf).logsumexp(1)
    lift = tail - logits.gather(1, kept).logsumexp(1) - log_tail
    return logits.scatter_add(1, kept, lift[:, None].expand_as(kept)).to(dtype)


def loss_and_gradient(logits, teacher, **options):
    x = logits.detach().clone().requires_grad_()
    result = topk_kl_from_logits(x, teacher, **options)
    (gradient,) = torch.autograd.grad(result.loss, x)
    return result, gradient


@pytest.mark.parametrize("student_tail", [-4.0, -18.42, -27.6])
@pytest.mark.parametrize("teacher_tail", [-9.2, -16.1, -30.0])
@EVERY_VARIANT
def test_small_tails_are_exact(kl, outside, student_tail, teacher_tail):
    # 1e-8 … 1e-13 of mass: any 1 − Q would be noise. In float32, against float64 on the same float32 numbers.
    teacher = teacher_of(with_tail(normal(5, 600), 8, teacher_tail, dtype=torch.float32), 8)
    student = with_tail(normal(5, 600, seed=1), 8, student_tail, kept=teacher.indices, dtype=torch.float32)
    x = student.double().requires_grad_()
    expected = reference.topk_kl(x, *teacher, kl=kl, outside=outside)
    (wanted,) = torch.autograd.grad(expected.per_token.sum(), x)
    result, gradient = loss_and_gradient(student, teacher, kl=kl, outside=outside)
    torch.testing.assert_close(result.per_token.double(), expected.per_token, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-6)
    if outside in ("bucket", "zero"):
        # The tail's own gradient, on its own tiny scale.
        tail = torch.ones_like(wanted, dtype=torch.bool).scatter_(1, teacher.indices.long(), False)
        torch.testing.assert_close(gradient[tail].double(), wanted[tail], rtol=1e-4, atol=0)


def test_the_measured_tail_of_1e_minus_8_is_not_a_difference():
    student = with_tail(normal(3, 5000), 64, -18.42, dtype=torch.float32)
    result, _ = loss_and_gradient(student, teacher_of(normal(3, 5000, seed=9), 64), kl="forward", outside="drop")
    assert (result.student_mass <= 1.0).all()
    kept = vocab_topk(torch.eye(3), student.T.contiguous(), 64)
    torch.testing.assert_close((kept.tail_logsumexp - kept.logsumexp).exp(), torch.full((3,), 1e-8), rtol=0.01, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_teacher_logits_stay_a_distribution(dtype):
    # The normaliser is formed from what arrived: rounding may move P but never above 1.
    full = with_tail(normal(64, 800), 16, -12.0)
    teacher = teacher_of(full, 16)
    teacher = teacher._replace(logits=teacher.logits.to(dtype))
    student = normal(64, 800, seed=1)
    result = topk_kl_from_logits(student, teacher, outside="bucket")
    assert (result.teacher_mass <= 1.0).all()
    assert (result.per_token >= 0).all()
    expected = reference.topk_kl(student, *teacher, kl="forward", outside="bucket")
    torch.testing.assert_close(result.per_token.double(), expected.per_token, rtol=1e-5, atol=1e-6)


def test_logsumexp_alone_is_clamped_and_warned_about_once(monkeypatch):
    monkeypatch.setattr(values, "_warned_about_logsumexp", False)
    student = normal(4, 300)
    exact = teacher_of(with_tail(normal(4, 300), 8, -25.0), 8)
    poor = exact._replace(tail_logsumexp=None)
    with pytest.warns(UserWarning, match="tail_logsumexp is missing"):
        result, gradient = loss_and_gradient(student, poor, outside="bucket", kl="mixed")
    assert torch.isfinite(gradient).all() and (result.teacher_mass <= 1.0).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        topk_kl_from_logits(student, poor, outside="bucket")
        topk_kl_from_logits(student, poor, outside="renormalize")
    # A tail that float32 can resolve comes out the same either way.
    exact = teacher_of(with_tail(normal(4, 300), 8, -3.0), 8)
    torch.testing.assert_close(
        topk_kl_from_logits(student, exact._replace(tail_logsumexp=None)).per_token,
        topk_kl_from_logits(student, exact).per_token,
        rtol=1e-4,
        atol=1e-5,
    )


@EVERY_VARIANT
@pytest.mark.parametrize("memory", ["fast", "low"])
def test_ignored_entries_count_as_outside(kl, outside, memory):
    hidden, weight = normal(6, 8, dtype=torch.float64), normal(50, 8, seed=1, dtype=torch.float64)
    teacher = teacher_of(normal(6, 50, seed=2, dtype=torch.float64), 9, dtype=torch.float64)
    short = TopK(*(field[:, :6] if field.dim() == 2 else field for field in teacher))
    # The last three are ignored: their mass joins the tail, and their ids are junk (here 0, a legal one twice).
    tail = torch.logaddexp(teacher.tail_logsumexp, teacher.logits[:, 6:].logsumexp(1))
    short = short._replace(tail_logsumexp=tail)
    padded = TopK(
        torch.cat((short.indices, torch.zeros(6, 2).int(), short.indices[:, 3:4]), 1),
        torch.cat((short.logits, torch.full((6, 3), -torch.inf)), 1),
        short.logsumexp,
        tail,
    )
    results = []
    for rows in (short, padded):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        result = topk_kl(x, w, rows, kl=kl, outside=outside, memory=memory, labels=torch.arange(6))
        result.loss.backward()
        results.append((*result, x.grad, w.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@EVERY_VARIANT
def test_empty_tail(kl, outside):
    # K = V: "bucket", "drop", "zero" and "renormalize" are all the plain divergence over the vocabulary.
    student, teacher = normal(4, 20, dtype=torch.float64), teacher_of(normal(4, 20, seed=1), 20, dtype=torch.float64)
    result, gradient = loss_and_gradient(student, teacher, kl=kl, outside=outside)
    expected, wanted = loss_and_gradient(student, teacher, kl=kl, outside="renormalize")
    torch.testing.assert_close(result.per_token, expected.per_token, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-12)
    assert (result.student_mass == 1).all() and (result.teacher_mass == 1).all()


@pytest.mark.parametrize("kl", ["forward", "reverse", "mixed", "jsd"])
def test_teacher_without_a_tail_against_a_student_with_one(kl):
    # p_t = 0 < q_t: adds 0 to forward; reverse takes the floor of −100 as log p_t.
    student = normal(4, 30, dtype=torch.float64)
    teacher = teacher_of(normal(4, 30, seed=1), 10, dtype=torch.float64)
    teacher = teacher._replace(tail_logsumexp=torch.full((4,), -torch.inf, dtype=torch.float64), logsumexp=None)
    x = student.clone().requires_grad_()
    expected = reference.topk_kl(x, *teacher, kl=kl, outside="bucket").per_token
    (wanted,) = torch.autograd.grad(expected.sum(), x)
    result, gradient = loss_and_gradient(student, teacher, kl=kl, outside="bucket")
    torch.testing.assert_close(result.per_token, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, wanted, rtol=1e-11, atol=1e-12)


@EVERY_VARIANT
def test_a_student_far_from_the_teacher_still_gets_a_gradient(kl, outside):
    # Clamped log-probabilities would leave no gradient exactly where the student is worst.
    student = normal(3, 40)
    teacher = teacher_of(normal(3, 40, seed=1), 4)
    student.scatter_(1, teacher.indices.long(), -80.0)
    student[:, :] = student - 200.0
    result, gradient = loss_and_gradient(student, teacher, kl=kl, outside=outside)
    x = student.double().requires_grad_()
    (wanted,) = torch.autograd.grad(reference.topk_kl(x, *teacher, kl=kl, outside=outside).per_token.sum(), x)
    assert torch.isfinite(result.loss)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-3, atol=1e-6)
    if kl == "forward":
        assert (gradient.gather(1, teacher.indices.long()) < 0).any(1).all()


@EVERY_VARIANT
@pytest.mark.parametrize("memory", ["fast", "low"])
def test_padding_ids_take_part_in_nothing(kl, outside, memory):
    hidden, weight = normal(5, 8), normal(33, 8, seed=1)
    teacher = teacher_of(normal(5, 33, seed=2), 6)
    padded = torch.cat((weight, 100.0 * torch.ones(7, 8)))
    results = []
    for head, valid in ((weight, None), (padded, 33)):
        x, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        result = topk_kl(x, w, teacher, kl=kl, outside=outside, valid_vocab=valid, memory=memory)
        result.loss.backward()
        assert (w.grad[33:] == 0).all()
        results.append((*result[:5], x.grad, w.grad[:33]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    logits = (hidden @ padded.T).requires_grad_()
    result = topk_kl_from_logits(logits, teacher, kl=kl, outside=outside, valid_vocab=33)
    result.loss.backward()
    torch.testing.assert_close(result.per_token, results[0][1], rtol=1e-4, atol=1e-5)
    assert (logits.grad[:, 33:] == 0).all()


@EVERY_VARIANT
@pytest.mark.parametrize("memory", ["fast", "low"])
def test_same_inputs_same_bits(kl, outside, memory):
    hidden, weight, teacher = normal(40, 16), normal(300, 16, seed=1), teacher_of(normal(40, 300, seed=2), 12)

    def run():
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        result = topk_kl(x, w, teacher, kl=kl, outside=outside, memory=memory, chunk_bytes=20_000)
        result.loss.backward()
        return [*result[:5], x.grad, w.grad]

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


class Allocations(TorchDispatchMode):
    """Records the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outside", ["bucket", "renormalize"])
@pytest.mark.parametrize("stats", [True, False])
def test_no_tensor_is_larger_than_the_chunk_or_the_gradients(memory, dtype, outside, stats):
    n, d, v, k, chunk_bytes = 600, 8, 4000, 8, 400_000
    hidden, weight = normal(n, d, dtype=dtype).requires_grad_(), normal(v, d, seed=1, dtype=dtype).requires_grad_()
    teacher = teacher_of(normal(n, v, seed=2), k)
    with Allocations() as allocations:
        topk_kl(
            hidden, weight, teacher, outside=outside, memory=memory, stats=stats, chunk_bytes=chunk_bytes,
            labels=torch.zeros(n, dtype=torch.int64),
        ).loss.backward()  # fmt: skip
    assert allocations.largest <= chunk_bytes < n * v * 4 / 20
    with Allocations() as allocations:
        vocab_topk(hidden, weight, k, chunk_bytes=chunk_bytes)
    assert allocations.largest <= chunk_bytes

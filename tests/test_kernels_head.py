"""Heads with a bias and a soft-cap (Gemma), against the float64 oracle on dense logits."""

from __future__ import annotations

import pytest
import torch

from fastkd._kernels import reference
from fastkd.kernels import TopK, topk_kl, vocab_topk

N, D, V, K = 11, 6, 70, 9
VARIANTS = [
    (kl, outside)
    for kl in ("forward", "reverse", "mixed", "jsd")
    for outside in ("renormalize", "zero", "bucket", "drop")
    if kl != "jsd" or outside in ("renormalize", "bucket")
]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


HIDDEN, WEIGHT, BIAS = normal(N, D), 2.0 * normal(V, D, seed=1), normal(V, seed=2)
WEIGHTS = torch.rand(N, generator=torch.Generator().manual_seed(4), dtype=torch.float64) + 0.1
LABELS = torch.arange(N)


def dense(hidden, weight, bias, softcap):
    logits = hidden @ weight.T
    logits = logits if bias is None else logits + bias
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


TEACHER = TopK(*reference.topk(dense(normal(N, D, seed=3), WEIGHT, None, None), K, 1.3))
TEACHER = TEACHER._replace(indices=TEACHER.indices.int())


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("stats", [True, False])
@pytest.mark.parametrize(("with_bias", "softcap"), [(True, None), (False, 5.0), (True, 5.0)])
@pytest.mark.parametrize(("kl", "outside"), VARIANTS)
def test_values_and_gradients_equal_the_oracle(kl, outside, with_bias, softcap, stats, memory):
    bias = BIAS.clone() if with_bias else None
    leaves = [x for x in (HIDDEN.clone(), WEIGHT.clone(), bias) if x is not None]
    x, w, *b = (leaf.requires_grad_() for leaf in leaves)
    options = dict(kl=kl, outside=outside, temperature=1.3, labels=LABELS)
    exact = reference.topk_kl(dense(x, w, b[0] if b else None, softcap), *TEACHER, **options)
    wanted = torch.autograd.grad((exact.per_token * WEIGHTS).sum(), leaves)
    result = topk_kl(
        x, w, TEACHER, bias=b[0] if b else None, softcap=softcap, token_weights=WEIGHTS, stats=stats, memory=memory,
        chunk_bytes=4000, **options,
    )  # fmt: skip
    torch.testing.assert_close(torch.autograd.grad(result.loss, leaves), wanted, rtol=1e-10, atol=1e-12)
    for name in ("per_token", "student_mass", "entropy", "label_logprob", "top1_agree"):
        value, expected = getattr(result, name), getattr(exact, name)
        if value is not None:
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_bfloat16(memory):
    x, w, b = (t.bfloat16().requires_grad_() for t in (HIDDEN, WEIGHT, BIAS))
    result = topk_kl(x, w, TEACHER, bias=b, softcap=8.0, temperature=1.3, token_weights=WEIGHTS, memory=memory)
    result.loss.backward()
    leaves = [t.detach().double().requires_grad_() for t in (x, w, b)]
    exact = reference.topk_kl(dense(*leaves, 8.0), *TEACHER, kl="forward", outside="bucket", temperature=1.3)
    wanted = torch.autograd.grad((exact.per_token * WEIGHTS).sum(), leaves)
    for leaf, gradient in zip((x, w, b), wanted, strict=True):
        assert leaf.grad.dtype == torch.bfloat16
        assert (leaf.grad.double() - gradient).norm() <= 4e-3 * gradient.norm()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_teachers_head(softcap, temperature):
    found = vocab_topk(HIDDEN, WEIGHT, K, bias=BIAS, softcap=softcap, temperature=temperature, chunk_bytes=3000)
    expected = reference.topk(dense(HIDDEN, WEIGHT, BIAS, softcap), K, temperature)
    assert torch.equal(found.indices.long(), expected[0])
    torch.testing.assert_close(tuple(found[1:]), tuple(expected[1:]), rtol=1e-12, atol=1e-12)


def test_where_the_cap_saturates_the_uncapped_logits_decide():
    hidden, weight = torch.eye(1, 1), (100.0 + torch.arange(50.0))[:, None]  # tanh(100 / 2) is 1 in float32
    found = vocab_topk(hidden, weight, 3, softcap=2.0)
    assert found.indices.tolist() == [[47, 48, 49]] and (found.logits == 2.0).all()
    torch.testing.assert_close(found.tail_logsumexp, torch.tensor([2.0 + torch.tensor(47.0).log()]))


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("outside", ["bucket", "zero", "renormalize"])
def test_a_bias_of_minus_infinity_masks_an_id(memory, outside):
    masked = [i for i in range(V) if not (TEACHER.indices == i).any()][:4]
    bias = BIAS.clone()
    bias[masked] = -torch.inf
    x, w, b = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_(), bias.requires_grad_()
    result = topk_kl(x, w, TEACHER, bias=b, softcap=9.0, kl="mixed", outside=outside, memory=memory)
    result.loss.backward()
    assert all(torch.isfinite(t).all() for t in (result.loss, result.entropy, x.grad, w.grad, b.grad))
    assert (w.grad[masked] == 0).all() and (b.grad[masked] == 0).all()
    free = [i for i in range(V) if i not in masked]
    expected = reference.topk(dense(HIDDEN, WEIGHT[free], BIAS[free], 9.0), 60)
    found = vocab_topk(HIDDEN, WEIGHT, 60, bias=bias, softcap=9.0)
    assert torch.equal(found.indices.long(), torch.tensor(free)[expected[0]])
    torch.testing.assert_close(tuple(found[1:]), tuple(expected[1:]))
    # More kept than there are: masked ids fill the row up, to be ignored.
    assert torch.isneginf(vocab_topk(HIDDEN, WEIGHT, V, bias=bias, softcap=9.0).logits[:, masked]).all()


def test_only_the_gradients_asked_for():
    x, w, b = HIDDEN, WEIGHT, BIAS.clone().requires_grad_()
    topk_kl(x, w, TEACHER, bias=b).loss.backward()
    assert b.grad is not None and x.grad is None and w.grad is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(bias=BIAS[:-1]), r"bias is \(69,\).*\(70,\)"),
        (dict(bias=BIAS.float()), r"bias is torch.float32.*torch.float64"),
        (dict(softcap=0.0), r"softcap=0.0.*positive"),
        (dict(softcap=-1.0), r"softcap=-1.0.*positive"),
        (dict(sequence_parallel=True), r"sequence_parallel=True: needs group"),
    ],
)
def test_wrong_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        topk_kl(HIDDEN, WEIGHT, TEACHER, **changes)
    with pytest.raises(ValueError, match=message):
        vocab_topk(HIDDEN, WEIGHT, 3, **changes)

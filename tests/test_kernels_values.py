"""topk_kl and topk_kl_from_logits against the float64 oracle: values, statistics and gradients, every variant."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastkd._kernels import reference
from fastkd.kernels import topk_kl, topk_kl_from_logits, vocab_topk

VARIANTS = [
    (kl, outside)
    for kl in ("forward", "reverse", "mixed", "jsd")
    for outside in ("renormalize", "zero", "bucket", "drop")
    if kl != "jsd" or outside in ("renormalize", "bucket")
]
EVERY_VARIANT = pytest.mark.parametrize(("kl", "outside"), VARIANTS)


def case(n=13, d=8, vocabulary=61, k=7, *, dtype=torch.float64, seed=0, spread=1.0):
    """Hidden states, head, a different teacher's TopK, weights and labels."""
    make = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    hidden, weight = (spread * normal(n, d)).to(dtype), normal(vocabulary, d).to(dtype)
    teacher = vocab_topk((hidden.double() + 0.5 * normal(n, d)), weight.double() + 0.3 * normal(vocabulary, d), k)
    weights = torch.rand(n, generator=make) + 0.1
    labels = torch.randint(vocabulary, (n,), generator=make)
    return hidden, weight, teacher, weights, labels


def oracle(hidden, weight, teacher, weights, **options):
    """(per-token results, loss, dX, dW) in float64 by dense autograd."""
    x, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    result = reference.topk_kl(x @ w.T, *teacher, **options)
    loss = (result.per_token * weights.double()).sum()
    return result, loss, *torch.autograd.grad(loss, (x, w))


def fused(hidden, weight, teacher, weights, **options):
    """The same from the fused op."""
    x, w = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    result = topk_kl(x, w, teacher, token_weights=weights, **options)
    return result, result.loss, *torch.autograd.grad(result.loss, (x, w))


def assert_close(actual, expected, tolerance):
    expected = expected.detach().double()
    error = (actual.detach().double() - expected).norm()
    assert error <= tolerance * expected.norm() + tolerance * 1e-3, f"relative error {error / expected.norm():.2e}"


def assert_same(actual, expected, tolerance):
    for got, want in zip(actual, expected, strict=True):
        if isinstance(want, tuple):
            for name in want._fields:
                value, target = getattr(got, name), getattr(want, name)
                if value is not None and target is not None and target.dtype != torch.bool:
                    assert_close(value, target, tolerance)
                elif value is not None:
                    assert torch.equal(value, target)
        else:
            assert_close(got, want, tolerance)


@EVERY_VARIANT
@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_float64_equals_the_oracle(kl, outside, memory, temperature):
    hidden, weight, teacher, weights, labels = case()
    teacher = vocab_topk(hidden.flip(0) + hidden, weight, 7, temperature=temperature)
    options = dict(kl=kl, outside=outside, temperature=temperature, mixed_weight=0.3, jsd_beta=0.2, labels=labels)
    expected = oracle(hidden, weight, teacher, weights, **options)
    # A budget of three rows (or columns) makes several chunks with a short last one.
    actual = fused(hidden, weight, teacher, weights, memory=memory, chunk_bytes=3 * 1500, **options)
    assert_same(actual, expected, 1e-12)
    assert all(field is not None for field in actual[0])


@EVERY_VARIANT
def test_float32_equals_the_oracle(kl, outside):
    hidden, weight, teacher, weights, labels = case(40, 32, 500, 20, dtype=torch.float32, spread=0.5)
    options = dict(kl=kl, outside=outside, labels=labels)
    assert_same(
        fused(hidden, weight, teacher, weights, **options),
        oracle(hidden, weight, teacher, weights, **options),
        2e-5,
    )


@EVERY_VARIANT
@pytest.mark.parametrize("memory", ["fast", "low"])
def test_bfloat16_inputs_lose_only_their_own_rounding(kl, outside, memory):
    hidden, weight, teacher, weights, labels = case(40, 32, 500, 20, dtype=torch.bfloat16, spread=0.5)
    options = dict(kl=kl, outside=outside, labels=labels)
    expected = oracle(hidden, weight, teacher, weights, **options)
    # The scratch that widens weight rows holds 40 of the 500, so several slabs are joined.
    actual = fused(hidden, weight, teacher, weights, memory=memory, chunk_bytes=40 * 32 * 4 * 4, **options)
    assert actual[2].dtype == actual[3].dtype == torch.bfloat16
    assert_same(actual[:2], expected[:2], 2e-5)
    assert_same(actual[2:], expected[2:], 3e-3)


@EVERY_VARIANT
@pytest.mark.parametrize("memory", ["fast", "low"])
def test_near_converged_pair_in_bfloat16(kl, outside, memory):
    # KL ≈ 0.01: gradients are small differences of nearly equal probabilities.
    make = torch.Generator().manual_seed(3)
    hidden = torch.randn(64, 64, generator=make).bfloat16()
    weight = (0.5 * torch.randn(800, 64, generator=make)).bfloat16()
    nudged = weight.float() + 0.018 * torch.randn(800, 64, generator=make)
    teacher = vocab_topk(hidden.float(), nudged, 64)
    weights = torch.full((64,), 1 / 64)
    options = dict(kl=kl, outside=outside)
    expected = oracle(hidden, weight, teacher, weights, **options)
    if (kl, outside) == ("forward", "bucket"):
        assert 0.005 < expected[1] < 0.02
    actual = fused(hidden, weight, teacher, weights, memory=memory, **options)
    assert_close(actual[2], expected[2], 5e-3)
    assert_close(actual[3], expected[3], 5e-3)


@EVERY_VARIANT
def test_oracle_gradient_equals_central_differences(kl, outside):
    hidden, weight, teacher, _, _ = case(3, 5, 11, 4)
    logits = (hidden @ weight.T).requires_grad_()
    options = dict(kl=kl, outside=outside, mixed_weight=0.3, jsd_beta=0.7, temperature=1.3)
    (analytic,) = torch.autograd.grad(reference.topk_kl(logits, *teacher, **options).per_token.sum(), logits)
    numeric, step = torch.zeros_like(analytic), 1e-5
    with torch.no_grad():
        for place in range(logits.numel()):
            bump = torch.zeros(logits.numel(), dtype=torch.float64)
            bump[place] = step
            up, down = (
                reference.topk_kl(logits + sign * bump.view_as(logits), *teacher, **options).per_token.sum()
                for sign in (1, -1)
            )
            numeric.view(-1)[place] = (up - down) / (2 * step)
    assert (analytic - numeric).abs().max() < 1e-7


@EVERY_VARIANT
def test_gradcheck(kl, outside):
    hidden, weight, teacher, weights, _ = case(3, 4, 9, 4)

    def loss(x, w):
        return topk_kl(x, w, teacher, kl=kl, outside=outside, token_weights=weights.double()).loss

    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(), weight.requires_grad_()))


@EVERY_VARIANT
def test_from_logits_equals_the_linear_form(kl, outside):
    hidden, weight, teacher, weights, labels = case()
    options = dict(kl=kl, outside=outside, token_weights=weights, labels=labels, temperature=1.5)
    logits = (hidden @ weight.T).requires_grad_()
    given_logits = topk_kl_from_logits(logits, teacher, **options)
    given_logits.loss.backward()
    x = hidden.clone().requires_grad_()
    linear = topk_kl(x, weight, teacher, **options)
    linear.loss.backward()
    assert_same([given_logits], [linear], 1e-13)
    assert_close(logits.grad @ weight, x.grad, 1e-12)


def test_from_logits_leaves_its_input_alone_and_takes_masked_ids():
    hidden, weight, teacher, weights, _ = case()
    logits = hidden @ weight.T
    outside_every_row = [i for i in range(61) if not (teacher.indices == i).any()][:5]
    logits[:, outside_every_row] = -torch.inf
    before = logits.clone()
    for kl, outside in VARIANTS:
        x = logits.clone().requires_grad_()
        result = topk_kl_from_logits(x, teacher, kl=kl, outside=outside, token_weights=weights)
        result.loss.backward()
        assert torch.isfinite(result.loss) and torch.isfinite(x.grad).all()
        assert (x.grad[:, outside_every_row] == 0).all()
        assert torch.isfinite(result.entropy).all()
    assert torch.equal(logits, before)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 9),
    d=st.integers(1, 9),
    vocabulary=st.integers(2, 40),
    share=st.floats(0, 1),
    variant=st.sampled_from(VARIANTS),
    memory=st.sampled_from(["fast", "low"]),
    stats=st.booleans(),
    chunk_bytes=st.integers(1, 20_000),
    seed=st.integers(0, 10_000),
)
def test_any_shape(n, d, vocabulary, share, variant, memory, stats, chunk_bytes, seed):
    k = max(1, round(share * vocabulary))
    hidden, weight, teacher, weights, labels = case(n, d, vocabulary, k, seed=seed)
    options = dict(kl=variant[0], outside=variant[1], labels=labels)
    actual = fused(hidden, weight, teacher, weights, memory=memory, stats=stats, chunk_bytes=chunk_bytes, **options)
    expected = oracle(hidden, weight, teacher, weights, **options)
    # In float64 a tail that is one id in a far corner still carries the noise of its own logsumexp.
    assert_same(actual, expected, 1e-9)

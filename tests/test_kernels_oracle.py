"""The kernels against the float64 oracle at real vocabularies and at any shape up to four million logits.

Also here: tails of 1e-6 … 1e-13 read back from a shipped TopK, gradients of a nearly converged pair against what
PyTorch itself reaches in bfloat16, and memory that starts as NaN.

Letters: N tokens, D hidden, V vocabulary, K kept.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastkd._kernels import reference
from fastkd.kernels import TopK, topk_kl, vocab_topk

VARIANTS = [
    (kl, outside)
    for kl in ("forward", "reverse", "mixed", "jsd")
    for outside in ("renormalize", "zero", "bucket", "drop")
    if kl != "jsd" or outside in ("renormalize", "bucket")
]
EVERY_VARIANT = pytest.mark.parametrize(("kl", "outside"), VARIANTS)


def case(n, d, vocabulary, k, *, seed=0, ties=False):
    """Hidden states, head, the TopK rows of another teacher (checked against the oracle), all in float32."""
    make = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=make)

    hidden, weight = normal(n, d) / d**0.5, normal(vocabulary, d)
    teacher_hidden, teacher_weight = 2.0 * normal(n, d) / d**0.5, normal(vocabulary, d)
    if ties:  # whole numbers: products are exact, and many are equal
        teacher_hidden, teacher_weight = (2.0 * teacher_hidden).round(), teacher_weight.round()
    teacher = vocab_topk(teacher_hidden, teacher_weight, k)
    if ties:
        ids, values, lse, tail = reference.topk(teacher_hidden @ teacher_weight.T, k)
        assert torch.equal(teacher.indices.long(), ids) and torch.equal(teacher.logits.double(), values)
        torch.testing.assert_close(teacher.logsumexp.double(), lse, rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(teacher.tail_logsumexp.double(), tail, rtol=1e-6, atol=2e-6)
    return hidden, weight, teacher, torch.rand(n, generator=make)


def both(hidden, weight, teacher, weights, memory="fast", chunk_bytes=None, **options):
    """((result, dX, dW), (oracle's result, dX, dW))."""
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    actual = topk_kl(x, w, teacher, token_weights=weights, memory=memory, chunk_bytes=chunk_bytes, **options)
    got = actual, *torch.autograd.grad(actual.loss, (x, w))
    x, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    expected = reference.topk_kl(x @ w.T, *teacher, **options)
    return got, (expected, *torch.autograd.grad((expected.per_token * weights.double()).sum(), (x, w)))


def relative(actual, expected):
    """Relative error in the L2 norm; the norm itself where nothing is expected."""
    error = (actual.double() - expected.double()).norm()
    return float(error / expected.double().norm()) if expected.norm() > 0 else float(error)


def assert_same(got, expected, weights, tolerance):
    """Float32 against the oracle. Where a gradient is a difference (jsd, the −100 of "zero") 2e-5 is float32's own."""
    live = weights != 0
    for name in ("per_token", "teacher_mass", "student_mass", "entropy"):
        value, wanted = getattr(got[0], name), getattr(expected[0], name).detach()
        assert relative(value[live], wanted[live]) < tolerance, name
        assert (value[~live] == 0).all()
    assert relative(got[1], expected[1]) < tolerance, "dX"
    assert relative(got[2], expected[2]) < tolerance, "dW"


# ---------------------------------------------------------------- shapes


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    log_v=st.floats(0, 17.2),
    rows=st.floats(0, 1),
    kept=st.one_of(st.just(0.0), st.just(1.0), st.floats(0, 1)),
    d=st.integers(1, 24),
    variant=st.sampled_from(VARIANTS),
    memory=st.sampled_from(["fast", "low"]),
    ties=st.booleans(),
    padded=st.booleans(),
    masked=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 10_000),
)
def test_any_shape_up_to_four_million_logits(log_v, rows, kept, d, variant, memory, ties, padded, masked, seed):
    vocabulary = round(2**log_v)  # 1 … 150,562
    k = max(1, round(vocabulary**kept))
    n = round(rows * min(1500, 4_000_000 // vocabulary))
    hidden, weight, teacher, weights = case(n, d, vocabulary, k, seed=seed, ties=ties)
    make = torch.Generator().manual_seed(seed)
    if padded:  # some entries behind the first are ignored: their ids are any legal ones
        ignored = torch.rand(n, k, generator=make) < 0.3
        ignored[:, 0] = False
        teacher = teacher._replace(
            indices=teacher.indices.masked_fill(ignored, vocabulary - 1),
            logits=teacher.logits.masked_fill(ignored, -torch.inf),
        )
    weights = weights.masked_fill(torch.rand(n, generator=make) < masked, 0.0)
    got, expected = both(
        hidden, weight, teacher, weights, memory=memory, chunk_bytes=4_000_000, kl=variant[0], outside=variant[1]
    )
    assert_same(got, expected, weights, 1e-4)


@pytest.mark.parametrize("n", [0, 1, 63])
@pytest.mark.parametrize(
    ("vocabulary", "variants"),
    [
        (18_992, [("forward", "bucket"), ("reverse", "zero"), ("mixed", "drop"), ("jsd", "renormalize")]),
        (151_936, [("mixed", "bucket"), ("jsd", "bucket")]),
    ],
)
def test_real_vocabularies(n, vocabulary, variants):
    # 151,936 = 128 · 1187 ids, and an eighth of them: neither is a multiple of 256, the latter not of 32.
    hidden, weight, teacher, weights = case(n, 16, vocabulary, 512, ties=n < 63)
    for index, (kl, outside) in enumerate(variants):
        memory = ("fast", "low")[index % 2]
        got, expected = both(hidden, weight, teacher, weights, memory=memory, kl=kl, outside=outside)
        assert_same(got, expected, weights, 1e-4)
        assert got[2].shape == weight.shape


# ---------------------------------------------------------------- mass → 1


@pytest.mark.parametrize("payload", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("power", [-6, -8, -10, -13])
def test_small_tails_survive_shipping(power, temperature, payload):
    # Teacher logits with a tail of 10^power, through vocab_topk, possibly rounded to bfloat16 on the way.
    n, vocabulary, k = 4, 3000, 16
    make = torch.Generator().manual_seed(0)
    logits = torch.randn(n, vocabulary, generator=make, dtype=torch.float64)
    kept = logits.topk(k).indices

    def with_tail(size):
        tail = logits.scatter(1, kept, -torch.inf).logsumexp(1)
        lift = tail - logits.gather(1, kept).logsumexp(1) - torch.log(torch.tensor(size, dtype=torch.float64))
        lifted = logits.scatter_add(1, kept, lift[:, None].expand_as(kept))
        return (temperature * lifted).float()

    teacher_logits = with_tail(10.0**power)
    shipped = vocab_topk(torch.eye(n), teacher_logits.T.contiguous(), k, temperature=temperature)
    shipped = shipped._replace(logits=shipped.logits.to(payload))
    assert torch.equal(shipped.indices.long(), kept.sort(1).values)

    # The truth in float64: the tail of the logits as they were, against the kept ones as they arrived.
    z = teacher_logits.double() / temperature
    tail = z.scatter(1, kept, -torch.inf).logsumexp(1)
    kept_mass = (shipped.logits.double() / temperature).logsumexp(1)
    truth = torch.exp(tail - torch.logaddexp(tail, kept_mass))
    if payload == torch.float32:
        torch.testing.assert_close(truth, torch.full_like(truth, 10.0**power), rtol=0.01, atol=0)

    # A student whose own tail is a thousandth of it: the tail's gradient under forward bucket, Σ (q − p_t q/q_t) over
    # the ids outside, is q_t − p_t. The head is the logits themselves, so that its gradient is theirs.
    student = with_tail(1e-3 * 10.0**power).T.contiguous().requires_grad_()
    loss = topk_kl(torch.eye(n), student, shipped, kl="forward", outside="bucket", temperature=temperature).loss
    (gradient,) = torch.autograd.grad(loss, student)
    found = -temperature * gradient.T.double().scatter(1, kept, 0.0).sum(1)
    torch.testing.assert_close(found, 0.999 * truth, rtol=0.01, atol=0)


# ---------------------------------------------------------------- near convergence


def in_pytorch(x, w, teacher, kl, outside, dtype):
    """(dX, dW) by autograd of dense logits in ``dtype``, softmax in float32 or wider: what one would write by hand."""
    x, w = x.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    logits = x.to(dtype) @ w.to(dtype).T
    loss = reference.topk_kl(logits, *teacher, kl=kl, outside=outside).per_token.sum()
    return torch.autograd.grad(loss, (x, w))


@EVERY_VARIANT
def test_a_nearly_converged_pair_is_as_exact_as_pytorch_allows(kl, outside):
    # KL ≈ 0.01: gradients are small differences of nearly equal probabilities. bfloat16 inputs and gradients.
    make = torch.Generator().manual_seed(3)
    hidden = torch.randn(64, 64, generator=make).bfloat16()
    weight = (0.5 * torch.randn(800, 64, generator=make)).bfloat16()
    teacher = vocab_topk(hidden.float(), weight.float() + 0.018 * torch.randn(800, 64, generator=make), 64)
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    ours = torch.autograd.grad(topk_kl(x, w, teacher, kl=kl, outside=outside).loss, (x, w))
    truth = in_pytorch(hidden.double(), weight.double(), teacher, kl, outside, torch.float64)
    wide = in_pytorch(hidden, weight, teacher, kl, outside, torch.float32)
    for name, got, exact, bound in zip(("dX", "dW"), ours, truth, wide, strict=True):
        assert relative(got, exact) <= min(5e-3, 3 * relative(bound, exact)), name


@EVERY_VARIANT
def test_logit_gradients_of_a_nearly_converged_pair(kl, outside):
    # Hidden states are unit vectors, so the head holds the logits and its gradient is theirs: no sum hides an error.
    make = torch.Generator().manual_seed(4)
    n, vocabulary = 48, 900
    logits = (2.5 * torch.randn(vocabulary, n, generator=make)).bfloat16()
    hidden = torch.eye(n).bfloat16()
    teacher = vocab_topk(hidden.float(), logits.float() + 0.13 * torch.randn(vocabulary, n, generator=make), 64)
    w = logits.clone().requires_grad_()
    result = topk_kl(hidden, w, teacher, kl=kl, outside=outside)
    if (kl, outside) == ("forward", "bucket"):
        assert 0.004 < result.per_token.mean() < 0.02
    (got,) = torch.autograd.grad(result.loss, w)
    (_, exact) = in_pytorch(hidden.double(), logits.double(), teacher, kl, outside, torch.float64)
    (_, bound) = in_pytorch(hidden, logits, teacher, kl, outside, torch.float32)
    assert relative(got, exact) <= min(5e-3, 3 * relative(bound, exact))


def test_rounded_logits_would_fail_that_bar():
    # The bar is not idle: the same sum with logits rounded to bfloat16 after the product misses it many times over.
    make = torch.Generator().manual_seed(3)
    hidden = torch.randn(64, 64, generator=make).bfloat16()
    weight = (0.5 * torch.randn(800, 64, generator=make)).bfloat16()
    teacher = vocab_topk(hidden.float(), weight.float() + 0.018 * torch.randn(800, 64, generator=make), 64)
    exact = in_pytorch(hidden.double(), weight.double(), teacher, "forward", "bucket", torch.float64)[0]
    rounded = in_pytorch(hidden, weight, teacher, "forward", "bucket", torch.bfloat16)[0]
    assert relative(rounded, exact) > 2e-2


# ---------------------------------------------------------------- memory


@pytest.fixture
def poisoned_memory():
    """Everything that torch.empty and its kin return starts as NaN, or as the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all() and torch.ones(2).new_empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def everything(dtype, kl, outside, memory, stats):
    """All that one call computes, with dropped rows, padding ids and ignored entries."""
    make = torch.Generator().manual_seed(5)
    hidden, weight = torch.randn(23, 12, generator=make).to(dtype), torch.randn(140, 12, generator=make).to(dtype)
    kept = vocab_topk(torch.randn(23, 12, generator=make), torch.randn(140, 12, generator=make), 9, valid_vocab=133)
    padded = TopK(kept.indices, kept.logits.index_fill(1, torch.tensor([7]), -torch.inf), *kept[2:])
    x, w = hidden.requires_grad_(), weight.requires_grad_()
    result = topk_kl(
        x, w, padded, kl=kl, outside=outside, memory=memory, stats=stats, valid_vocab=133, chunk_bytes=12_000,
        active=torch.arange(1, 23, 2), token_weights=torch.linspace(0, 1, 11), labels=torch.arange(23),
    )  # fmt: skip
    return [*kept, *(field for field in result if field is not None), *torch.autograd.grad(result.loss, (x, w))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stats", [True, False])
@EVERY_VARIANT
def test_uninitialised_memory_never_shows(kl, outside, stats, dtype, request):
    clean = [everything(dtype, kl, outside, memory, stats) for memory in ("fast", "low")]
    request.getfixturevalue("poisoned_memory")
    for memory, wanted in zip(("fast", "low"), clean, strict=True):
        for got, value in zip(everything(dtype, kl, outside, memory, stats), wanted, strict=True):
            assert torch.equal(got, value) and not value.isnan().any()

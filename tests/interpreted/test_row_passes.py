"""The loss through its Triton kernels, interpreted: every variant against the float64 oracle, from the chunk loop."""

from __future__ import annotations

import pytest
import torch

from fastkd._kernels import heads, linear_kl_low, reference, row_passes, tuning
from fastkd._kernels.gemm import HeadGemms
from fastkd.kernels import TopK, topk_kl, topk_kl_from_logits, vocab_topk

VARIANTS = [
    (kl, outside)
    for kl in ("forward", "reverse", "mixed", "jsd")
    for outside in ("renormalize", "zero", "bucket", "drop")
    if kl != "jsd" or outside in ("renormalize", "bucket")
]
EVERY_VARIANT = pytest.mark.parametrize(("kl", "outside"), VARIANTS)
N, D, V, K = 5, 8, 130, 9


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Blocks of 64 columns and 4 kept ids, so that a small row takes several; and proof that Triton runs."""
    tile = tuning.tile

    def small(kernel, device):
        return tile(kernel, device)._replace(block={"poison": 4}.get(kernel, 64))

    from fastkd._kernels import triton_finish, triton_stats

    monkeypatch.setattr(triton_stats, "tile", small)
    calls = []
    original = triton_finish.finish_rows
    monkeypatch.setattr(triton_finish, "finish_rows", lambda *a: calls.append(1) or original(*a))
    yield
    assert calls


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def case(seed=0, k=K, vocabulary=V):
    hidden, weight = normal(N, D, seed=seed), normal(vocabulary, D, seed=seed + 1)
    near = hidden.double() + 0.5 * normal(N, D, seed=seed + 2)
    teacher = vocab_topk(near, weight.double() + 0.3 * normal(vocabulary, D, seed=seed + 3), k, temperature=1.5)
    teacher = TopK(teacher.indices, teacher.logits.float(), teacher.logsumexp.float(), teacher.tail_logsumexp.float())
    weights = torch.rand(N, generator=torch.Generator().manual_seed(seed)) + 0.1
    return hidden, weight, teacher, weights


def compare(hidden, weight, teacher, weights, *, bias=None, softcap=None, valid=None, tolerance=2e-5, **options):
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    call = {key: value for key, value in options.items() if key in ("kl", "outside", "temperature", "labels")}
    call |= {key: options[key] for key in ("mixed_weight", "jsd_beta") if key in options}
    result = topk_kl(
        leaves[0], leaves[1], teacher, token_weights=weights, bias=leaves[2] if bias is not None else None,
        softcap=softcap, valid_vocab=valid, **options,
    )  # fmt: skip
    result.loss.backward()
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    logits = exact_leaves[0] @ exact_leaves[1].T
    logits = logits if bias is None else logits + exact_leaves[2]
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    exact = reference.topk_kl(logits[:, :valid], *teacher, **call)
    (exact.per_token * weights.double()).sum().backward()
    for name in ("per_token", "teacher_mass", "student_mass", "entropy", "label_logprob"):
        value, expected = getattr(result, name), getattr(exact, name)
        if value is not None:
            torch.testing.assert_close(value.double(), expected.detach(), rtol=tolerance, atol=tolerance)
    if result.top1_agree is not None:
        assert torch.equal(result.top1_agree, exact.top1_agree)
    for leaf, wanted in zip(leaves, exact_leaves, strict=True):
        error = (leaf.grad.double() - wanted.grad).norm()
        assert error <= tolerance * wanted.grad.norm(), f"{error / wanted.grad.norm():.1e}"
    return result


def test_the_kernels_are_the_ones_in_use():
    assert row_passes.row_passes(torch.device("cpu"), torch.float32).narrows_in_place
    compare(*case(), kl="forward", outside="bucket", temperature=1.5)


@EVERY_VARIANT
@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("stats", [True, False])
def test_every_variant(kl, outside, memory, stats):
    options = dict(kl=kl, outside=outside, memory=memory, stats=stats, temperature=1.5, mixed_weight=0.3, jsd_beta=0.2)
    chunk_bytes = 3 * V * 4 if memory == "fast" else 8 * V * 4  # some chunks, some slabs
    compare(*case(), labels=torch.arange(N), chunk_bytes=chunk_bytes, **options)


@EVERY_VARIANT
def test_soft_cap_bias_and_padding(kl, outside):
    hidden, weight, teacher, weights = case(seed=10)
    weight = torch.cat((weight, normal(13, D, seed=4)))
    compare(
        hidden, weight, teacher, weights, bias=normal(V + 13, seed=5), softcap=6.0, valid=V, kl=kl, outside=outside,
        temperature=1.5,
    )  # fmt: skip


@EVERY_VARIANT
def test_ignored_entries_and_a_whole_vocabulary(kl, outside):
    hidden, weight, teacher, weights = case(seed=20)
    logits = teacher.logits.clone()
    logits[::2, [1, 5]] = -torch.inf
    compare(hidden, weight, teacher._replace(logits=logits), weights, kl=kl, outside=outside, temperature=1.5)
    compare(*case(seed=21, k=V), kl=kl, outside=outside, temperature=1.5)


@pytest.mark.parametrize("outside", ["bucket", "drop", "zero"])
def test_a_teacher_with_a_logsumexp_alone(outside):
    hidden, weight, teacher, weights = case(seed=30)
    compare(
        hidden, weight, teacher._replace(tail_logsumexp=None), weights, kl="mixed", outside=outside, temperature=1.5
    )


def test_given_logits():
    hidden, weight, teacher, weights = case(seed=40)
    logits = (hidden @ weight.T).requires_grad_()
    topk_kl_from_logits(logits, teacher, kl="mixed", temperature=1.5, token_weights=weights).loss.backward()
    exact = logits.detach().double().requires_grad_()
    result = reference.topk_kl(exact, *teacher, kl="mixed", outside="bucket", temperature=1.5)
    (result.per_token * weights).sum().backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def test_active_rows_and_weight_zero():
    hidden, weight, teacher, weights = case(seed=50)
    active = torch.tensor([0, 2, 3])
    part = TopK(*(field[active] for field in teacher))
    expected = topk_kl(hidden[active], weight, part, temperature=1.5, token_weights=weights[active])
    result = topk_kl(hidden, weight, teacher, temperature=1.5, token_weights=weights, active=active)
    assert torch.equal(result.per_token[active], expected.per_token) and result.loss == expected.loss
    assert (result.per_token[[1, 4]] == 0).all()


@pytest.mark.parametrize("log_tail", [-3.0, -14.0, -18.4, -28.0])
def test_small_tails_keep_their_digits(log_tail):
    logits = normal(4, 400, seed=60)
    kept = logits.topk(8).indices
    gap = logits.scatter(1, kept, -torch.inf).double().logsumexp(1) - logits.gather(1, kept).double().logsumexp(1)
    logits = logits.double().scatter_add(1, kept, (gap - log_tail)[:, None].expand(4, 8)).float()
    teacher = TopK(*reference.topk(logits, 8))
    teacher = TopK(teacher.indices.int(), *(field.float() for field in teacher[1:]))
    student = (logits + 0.3 * normal(4, 400, seed=61)).requires_grad_()
    topk_kl_from_logits(student, teacher).loss.backward()
    exact = student.detach().double().requires_grad_()
    reference.topk_kl(exact, *teacher, kl="forward", outside="bucket").per_token.sum().backward()
    tail = torch.ones(4, 400, dtype=torch.bool).scatter(1, kept, False)
    error = (student.grad.double() - exact.grad)[tail].norm() / exact.grad[tail].norm()
    assert error < 1e-4


def test_the_factor_one_leaves_gradients_alone():
    from fastkd._kernels.triton_stats import scale_unless_one

    values = normal(5000)
    scaled = values.clone()
    scale_unless_one(scaled, torch.tensor(1.0))
    assert torch.equal(scaled, values)
    scale_unless_one(scaled, torch.tensor(-2.5))
    torch.testing.assert_close(scaled, -2.5 * values)
    compare(*case(), kl="forward", outside="bucket", temperature=1.5)


class EmulatedGemms(HeadGemms):
    """The mixed GEMMs of CUDA on the CPU: bfloat16 operands, products and sums in float32."""

    def __init__(self, weight, scratch_bytes):
        super().__init__(weight, scratch_bytes)
        self.mixed, self.scratch_bytes = not self.native, 0

    def logits(self, x, out):
        torch.mm(x.float(), self.weight.float().t(), out=out)

    def grad_hidden(self, dz, out, accumulate=False):
        assert dz.dtype == self.weight.dtype
        torch.addmm(out, dz.float(), self.weight.float(), beta=int(accumulate), out=out)

    def grad_weight(self, dz, x, out, accumulate):
        product = dz.float().t() @ x.float()
        out.copy_(out + product if accumulate else product)


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("with_active", [False, True])
def test_bfloat16_as_on_cuda(memory, with_active, monkeypatch):
    """Dlogits narrowed in the logits' place, and for "low" blocks of rows and dX summed in 24 bits."""
    for module in (heads, linear_kl_low):
        monkeypatch.setattr(module, "HeadGemms", EmulatedGemms)
    monkeypatch.setattr(linear_kl_low, "on_host", lambda device: False)
    monkeypatch.setattr(linear_kl_low, "_BLOCK_ROWS", 2)
    hidden, weight, teacher, weights = case(seed=70)
    active = torch.tensor([0, 2, 3]) if with_active else None
    x, w = (t.bfloat16().requires_grad_() for t in (hidden, weight))
    options = dict(kl="mixed", temperature=1.5)
    topk_kl(
        x, w, teacher, token_weights=weights, active=active, memory=memory, chunk_bytes=4000, **options
    ).loss.backward()
    exact_x, exact_w = (t.detach().double().requires_grad_() for t in (x, w))
    exact = reference.topk_kl(exact_x @ exact_w.T, *teacher, outside="bucket", **options).per_token * weights
    (exact if active is None else exact[active]).sum().backward()
    for gradient, wanted in ((x.grad, exact_x.grad), (w.grad, exact_w.grad)):
        assert gradient.dtype == torch.bfloat16
        # The interpreter cuts float32 to bfloat16 where a GPU rounds.
        assert (gradient.double() - wanted).norm() <= 1e-2 * wanted.norm()


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_float32_in_blocks_of_rows(memory, monkeypatch):
    monkeypatch.setattr(linear_kl_low, "on_host", lambda device: False)
    monkeypatch.setattr(linear_kl_low, "_BLOCK_ROWS", 2)
    compare(*case(seed=80), kl="reverse", outside="zero", temperature=1.5, memory=memory, chunk_bytes=4000)
    compare(*case(seed=81), kl="jsd", outside="renormalize", stats=False, temperature=1.5, memory=memory)


def test_a_sum_in_24_bits():
    from fastkd._kernels.triton_sum import Sum24

    parts = [100.0 * normal(7, 33, seed=seed) for seed in range(30)]
    total = Sum24(torch.empty(7, 33, dtype=torch.bfloat16))
    for number, part in enumerate(parts):
        for rows in (slice(0, 3), slice(3, 7)):
            total.add(rows, part[rows].contiguous(), first=number == 0)
    found = torch.cat(
        [total.read(rows, torch.empty(rows.stop - rows.start, 33)) for rows in (slice(0, 3), slice(3, 7))]
    )
    exact = torch.stack(parts).double().sum(0)
    assert (found.double() - exact).norm() <= 30**0.5 * 2**-17 * exact.norm()
    compare(*case(), kl="forward", outside="bucket", temperature=1.5)

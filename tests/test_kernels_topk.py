"""vocab_topk: exact ids whatever the logits look like, exact small tails, and no memory of size [N, V]."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastkd._kernels import reference
from fastkd._kernels.row_topk import padded_columns, row_topk, select
from fastkd.kernels import vocab_topk


def as_head(logits):
    """(hidden, weight) whose product is exactly ``logits`` [N, V]."""
    return torch.eye(logits.shape[0], dtype=logits.dtype), logits.T.contiguous()


def assert_topk(logits, k, **options):
    result = vocab_topk(*as_head(logits), k, **options)
    ids, values, lse, tail = reference.topk(logits, k, options.get("temperature", 1.0))
    assert result.indices.dtype == torch.int32
    assert torch.equal(result.indices.long(), ids)
    assert torch.equal(result.logits.double(), values)
    torch.testing.assert_close(result.logsumexp.double(), lse, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(result.tail_logsumexp.double(), tail, rtol=2e-6, atol=2e-6)


def shapes_of_logits(n, v):
    """Logits that make selection hard, by name."""
    make = torch.Generator().manual_seed(5)
    noise = torch.randn(n, v, generator=make)
    yield "gaussian", noise
    yield "by id", noise - 8.0 * torch.arange(v) / v
    yield "blocks", noise + 3.0 * torch.randn(n, -(-v // 64), generator=make).repeat_interleave(64, 1)[:, :v]
    yield "constant", torch.full((n, v), 1.5)
    yield "few values", (2.0 * noise).round()
    yield "bfloat16", noise.bfloat16().float()
    yield "periodic", torch.sin(torch.arange(v) * 2.0 * torch.pi / 50).repeat(n, 1)
    yield "one lane", noise + 100.0 * (torch.arange(v) % 97 == 0)
    yield "peaked", torch.where(torch.arange(v) == v // 2, 80.0, noise)
    yield "far down", noise - 500.0
    yield "far up", noise + 500.0


# From 20,011 logits on, five rows do not fit the part of 300,000 bytes that a strided selection takes at a time.
@pytest.mark.parametrize("chunk_bytes", [None, 300_000])
@pytest.mark.parametrize(("v", "k"), [(3000, 1), (3000, 17), (20011, 64), (20011, 512), (300, 32), (300, 300)])
def test_exact_for_every_shape_of_logits(v, k, chunk_bytes):
    for name, logits in shapes_of_logits(5, v):
        for temperature in (1.0, 0.5, 4.0):
            try:
                assert_topk(logits, k, temperature=temperature, chunk_bytes=chunk_bytes)
            except AssertionError as error:
                raise AssertionError(f"{name} logits, T = {temperature}") from error


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 5),
    v=st.integers(1, 2500),
    share=st.floats(0, 1),
    levels=st.sampled_from([2, 20, 10**6]),
    seed=st.integers(0, 10**6),
)
def test_any_shape_with_ties(rows, v, share, levels, seed):
    k = max(1, min(v, round(share**4 * v)))
    logits = torch.randint(levels, (rows, v), generator=torch.Generator().manual_seed(seed)) * (10.0 / levels)
    assert_topk(logits, k)


def test_rows_with_and_without_a_tie_at_the_border_share_a_chunk():
    logits = torch.randn(6, 5000, generator=torch.Generator().manual_seed(0))
    logits[2] = logits[2].round()
    logits[4] = 0.0
    columns = padded_columns(5000, 20)
    buffer = torch.full((6, columns), -torch.inf)
    buffer[:, :5000] = logits
    chosen, runner_up = row_topk(buffer, 5000, 20)
    assert runner_up is None  # the lanes alone could not decide
    assert torch.equal(chosen, reference.topk(logits, 20)[0])


def test_lanes_report_the_largest_logit_left_out():
    logits = torch.randn(6, 5000, generator=torch.Generator().manual_seed(0))
    buffer = torch.full((6, padded_columns(5000, 20)), -torch.inf)
    buffer[:, :5000] = logits
    chosen, runner_up = row_topk(buffer, 5000, 20)
    assert torch.equal(chosen, reference.topk(logits, 20)[0])
    assert torch.equal(runner_up, logits.sort(1, descending=True).values[:, 20])


def test_select_prefers_the_left_of_equal_values():
    values = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
    assert select(values, 2).tolist() == [[1, 2], [0, 1]]


@pytest.mark.parametrize("log_tail", [-3.0, -12.0, -18.42, -40.0, -80.0])
def test_small_tails_keep_their_digits(log_tail):
    # A tail of 1e-8 is below half an ulp of the logsumexp: 1 − P would give 0, or noise.
    make = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 4000, generator=make)
    kept = logits.topk(16).indices
    tail = logits.scatter(1, kept, -torch.inf).double().logsumexp(1)
    whole = logits.gather(1, kept).double().logsumexp(1)
    logits = logits.double().scatter_add(1, kept, (tail - whole - log_tail)[:, None].expand(4, 16)).float()
    result = vocab_topk(*as_head(logits), 16)
    _, _, lse, exact = reference.topk(logits, 16)
    assert abs(float((exact - lse).mean()) - log_tail) < 0.1
    torch.testing.assert_close(result.tail_logsumexp.double(), exact, rtol=0, atol=3e-6)


def test_temperature_changes_the_logsumexps_only():
    hidden, weight = as_head(torch.randn(3, 200, generator=torch.Generator().manual_seed(2)))
    warm, plain = vocab_topk(hidden, weight, 5, temperature=2.0), vocab_topk(hidden, weight, 5)
    assert torch.equal(warm.indices, plain.indices) and torch.equal(warm.logits, plain.logits)
    torch.testing.assert_close(warm.logsumexp, (weight.T / 2.0).logsumexp(1))


def test_padding_ids_take_part_in_nothing():
    logits = torch.randn(4, 120, generator=torch.Generator().manual_seed(3))
    padded = torch.cat((logits, torch.full((4, 8), 50.0)), 1)
    for result, expected in zip(
        vocab_topk(*as_head(padded), 9, valid_vocab=120), vocab_topk(*as_head(logits), 9), strict=True
    ):
        assert torch.equal(result, expected)


def test_whole_vocabulary_leaves_an_empty_tail():
    result = vocab_topk(*as_head(torch.randn(3, 40)), 40)
    assert torch.equal(result.indices, torch.arange(40, dtype=torch.int32).expand(3, 40))
    assert (result.tail_logsumexp == -torch.inf).all()


def test_chunks_and_dtypes():
    make = torch.Generator().manual_seed(4)
    hidden, weight = torch.randn(37, 24, generator=make), torch.randn(900, 24, generator=make)
    whole = vocab_topk(hidden, weight, 12)
    # Twice the widest rounding of a float32 GEMM: another chunking may sum in another order.
    chunked = vocab_topk(hidden, weight, 12, chunk_bytes=5 * 900 * 4)
    assert torch.equal(whole.indices, chunked.indices)
    torch.testing.assert_close(whole.logits, chunked.logits)
    # bfloat16 products are exact in float32, so the logits are those of the widened inputs.
    narrow = vocab_topk(hidden.bfloat16(), weight.bfloat16(), 12, chunk_bytes=80_000)
    wide = vocab_topk(hidden.bfloat16().double(), weight.bfloat16().double(), 12)
    assert narrow.logits.dtype == torch.float32 and wide.logits.dtype == torch.float64
    assert torch.equal(narrow.indices, wide.indices)
    torch.testing.assert_close(narrow.logits.double(), wide.logits, rtol=1e-5, atol=1e-5)


def test_no_rows_and_no_gradient():
    weight = torch.randn(50, 8, requires_grad=True)
    result = vocab_topk(torch.randn(0, 8, requires_grad=True), weight, 5)
    assert result.indices.shape == result.logits.shape == (0, 5)
    result = vocab_topk(torch.randn(2, 8, requires_grad=True), weight, 5)
    assert not any(field.requires_grad for field in result)


def test_nan_is_reported():
    logits = torch.randn(3, 60)
    logits[1, 7] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        vocab_topk(*as_head(logits), 4)


@pytest.mark.parametrize("k", [0, -1, 41, 2.0, True])
def test_wrong_k(k):
    with pytest.raises(ValueError, match=rf"k={k!r}.*40"):
        vocab_topk(torch.randn(2, 8), torch.randn(40, 8), k)

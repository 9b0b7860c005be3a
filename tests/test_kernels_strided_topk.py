"""Top-K by strided parts of the vocabulary: which rows it settles, that it says so, and what it needs."""

from __future__ import annotations

import pytest
import torch

from fastkd._kernels import reference, strided_topk
from fastkd._kernels.gemm import HeadGemms
from fastkd.kernels import vocab_topk

V, K = 20_011, 64
CHUNK_BYTES = 200_000  # two rows of logits


def gaussian(rows, seed=0):
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))


def blocks_for(rows, k=K):
    found = strided_topk.arrange(rows, V, k, 4, CHUNK_BYTES)
    assert found is not None and found.count > 1
    return found


def strided(logits, k=K, temperature=1.0):
    """(TopK, settled) of one chunk whose logits are exactly these."""
    rows = len(logits)
    weight = logits.T.contiguous()
    return strided_topk.strided_topk(
        torch.eye(rows, dtype=logits.dtype), HeadGemms(weight, 1 << 20), None, k, temperature, blocks_for(rows, k)
    )


@pytest.mark.parametrize("ordered_by_id", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("k", [1, 8, 64, 300])
def test_ordinary_rows_are_settled_and_exact(ordered_by_id, temperature, k):
    logits = 2.0 * gaussian(6)
    if ordered_by_id:  # a tokenizer's frequent tokens have low ids, and high logits
        logits -= 6.0 * torch.arange(V) / V
    found, settled = strided(logits, k, temperature)
    assert settled.all()
    ids, values, lse, tail = reference.topk(logits, k, temperature)
    assert torch.equal(found.indices.long(), ids) and torch.equal(found.logits.double(), values)
    torch.testing.assert_close(found.logsumexp.double(), lse, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.tail_logsumexp.double(), tail, rtol=1e-6, atol=1e-6)


def unsettling():
    """Logits of one row that a sample of the vocabulary cannot settle, by name."""
    noise = gaussian(1, seed=1)
    order = noise.argsort(1, descending=True)
    yield "tie at the border", noise.scatter(1, order[:, K : K + 1], noise.gather(1, order[:, K - 1 : K]))
    yield "constant", torch.full((1, V), 1.5)
    yield "few values", noise.round()
    yield "a block of the K largest alone", torch.where(torch.arange(V) % blocks_for(3).count == 1, noise + 50.0, noise)
    yield "far away", noise + 1e5


@pytest.mark.parametrize(("name", "row"), list(unsettling()), ids=[name for name, _ in unsettling()])
def test_what_it_cannot_settle_is_selected_from_whole_rows(name, row):
    logits = gaussian(3)
    logits[1] = row
    _, settled = strided(logits)
    assert settled.tolist() == [True, False, True], name
    result = vocab_topk(torch.eye(3), logits.T.contiguous(), K, chunk_bytes=CHUNK_BYTES)
    ids, values, lse, tail = reference.topk(logits, K)
    assert torch.equal(result.indices.long(), ids) and torch.equal(result.logits.double(), values)
    torch.testing.assert_close(result.logsumexp.double(), lse, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(result.tail_logsumexp.double(), tail, rtol=2e-6, atol=2e-6)


def test_masked_ids():
    """A bias of −inf, also for so many ids that the K largest are not all real."""
    logits = gaussian(4)
    bias = torch.where(torch.arange(V) % 3 == 0, -torch.inf, 0.25)
    for masked in (bias, bias.masked_fill(torch.arange(V) >= 50, -torch.inf)):
        result = vocab_topk(torch.eye(4), logits.T.contiguous(), K, bias=masked, chunk_bytes=CHUNK_BYTES)
        biased = (logits + masked).double()
        values = biased.topk(K, 1).values
        assert torch.equal(result.logits.double().sort(1, descending=True).values, values)
        torch.testing.assert_close(result.logsumexp.double(), biased.logsumexp(1), rtol=1e-6, atol=1e-6)
        real = result.logits > -torch.inf
        assert torch.equal(biased.gather(1, result.indices.long())[real], result.logits.double()[real])


def test_nan_is_reported():
    logits = gaussian(3)
    logits[1, 7] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        vocab_topk(torch.eye(3), logits.T.contiguous(), K, chunk_bytes=CHUNK_BYTES)


def test_where_whole_rows_are_as_good():
    chunk_bytes = 160 << 20
    assert strided_topk.arrange(0, 151_936, 512, 4, chunk_bytes) is None
    assert strided_topk.arrange(256, 151_936, 512, 4, chunk_bytes) is None  # all fit
    assert strided_topk.arrange(20_480, 65_536, 512, 4, chunk_bytes) is None  # 640 at a time
    assert strided_topk.arrange(20_480, 151_936, 50_000, 4, chunk_bytes) is None  # a third of the vocabulary
    assert strided_topk.arrange(5, 300, 150, 4, 1000) is None


@pytest.mark.parametrize("k", [1, 512, 2048, 4096])
@pytest.mark.parametrize("rows", [300, 20_480])
def test_buffers_stay_within_chunk_bytes(rows, k):
    chunk_bytes = 160 << 20
    blocks = strided_topk.arrange(rows, 151_936, k, 4, chunk_bytes)
    assert blocks is not None and blocks.rows <= rows
    assert blocks.rows * (blocks.width * 4 + 2 * blocks.lanes * 4 + blocks.capacity * 8) <= chunk_bytes * 3 // 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_widened_part_by_part(dtype):
    """The same rows from a weight that the device cannot multiply as it is."""
    make = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(40, 48, generator=make).to(dtype), torch.randn(V, 48, generator=make).to(dtype)
    assert strided_topk.arrange(40, V, K, 4, 1_000_000) is not None
    found = vocab_topk(hidden, weight, K, chunk_bytes=1_000_000)
    ids, values, lse, tail = reference.topk(hidden.double() @ weight.double().T, K)
    assert torch.equal(found.indices.long(), ids)
    torch.testing.assert_close(found.logits.double(), values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.tail_logsumexp.double(), tail, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.logsumexp.double(), lse, rtol=1e-5, atol=1e-5)


def test_the_same_bits_again():
    make = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(40, 48, generator=make), torch.randn(V, 48, generator=make)
    first, second = (vocab_topk(hidden, weight, K, chunk_bytes=1_000_000) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

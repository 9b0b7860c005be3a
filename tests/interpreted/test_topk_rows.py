"""topk_rows, interpreted: exact ids and small tails on every path, whatever the logits look like.

Few lanes stand for the 4,096 of a GPU, so that a few thousand logits reach every path.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed")

from fastkd._kernels import reference, triton_topk
from fastkd._kernels.rows import LOG_ZERO
from fastkd._kernels.triton_topk import topk_rows

LANES = 128
PADDING = 5  # columns behind the last one, full of NaN: nothing may read them


def noise(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def select(logits, k, temperature=1.0, softcap=None, lanes=LANES):
    rows, columns = logits.shape
    buffer = torch.full((rows, columns + PADDING), torch.nan)
    buffer[:, :columns] = logits
    before = buffer.clone()
    result = topk_rows(buffer, columns, k, temperature, softcap, lanes=lanes)
    assert torch.equal(buffer.view(torch.int32), before.view(torch.int32))
    return result


def assert_exact(logits, k, temperature=1.0, softcap=None, lanes=LANES):
    result = select(logits, k, temperature, softcap, lanes)
    ids, values, lse, tail = reference.topk(logits, k, temperature)
    assert result.indices.dtype == torch.int32
    assert torch.equal(result.indices.long(), ids)
    if softcap is None:
        assert torch.equal(result.logits.double(), values)
    else:
        capped = logits.double().div(softcap).tanh().mul(softcap)
        assert torch.equal(result.logits.double(), logits.double().gather(1, ids))  # capped by the caller
        lse = (capped / temperature).logsumexp(1)
        tail = (capped / temperature).scatter(1, ids, -torch.inf).logsumexp(1)
    torch.testing.assert_close(result.logsumexp.double(), lse, rtol=2e-6, atol=2e-6)
    # The caller turns LOG_ZERO into −inf, as the reference has it.
    found = result.tail_logsumexp.double().masked_fill(result.tail_logsumexp == LOG_ZERO, -torch.inf)
    torch.testing.assert_close(found, tail, rtol=2e-6, atol=2e-6)


def shapes_of_logits(n, v):
    """Logits that make selection hard, by name."""
    plain = noise(n, v, 5)
    yield "gaussian", plain
    yield "by id", plain - 8.0 * torch.arange(v) / v
    yield "blocks", plain + 3.0 * noise(n, -(-v // 64), 6).repeat_interleave(64, 1)[:, :v]
    yield "constant", torch.full((n, v), 1.5)
    yield "few values", (2.0 * plain).round()
    yield "signed zeros", torch.where(plain > 1.0, plain, torch.where(plain > 0, 0.0, -0.0))
    yield "bfloat16", plain.bfloat16().float()
    yield "periodic", torch.sin(torch.arange(v) * 2.0 * torch.pi / (LANES // 2)).repeat(n, 1)
    yield "one lane", plain + 100.0 * (torch.arange(v) % LANES == 7)
    yield "first of every lane", plain + 100.0 * (torch.arange(v) < LANES)
    yield "peaked", torch.where(torch.arange(v) == v // 2, 80.0, plain)
    yield "far down", plain - 500.0
    yield "far up", plain + 500.0


@pytest.fixture
def calls(monkeypatch):
    """How many rows overflowed, per call: what the fallback was for."""
    overflows = []
    original = triton_topk.select_whole_row

    class Spy:
        def __getitem__(self, grid):
            def launch(logits, counts, *rest, **options):
                overflows.append(grid[0] if counts is None else int(counts[:, 2].sum()))
                return original[grid](logits, counts, *rest, **options)

            return launch

    monkeypatch.setattr(triton_topk, "select_whole_row", Spy())
    return overflows


@pytest.mark.parametrize("k", [1, 17, 64])
@pytest.mark.parametrize("name", [name for name, _ in shapes_of_logits(1, 128)])
def test_exact_for_every_shape_of_logits(name, k):
    logits = dict(shapes_of_logits(2, 1500))[name]
    assert_exact(logits, k)
    assert_exact(logits, k, temperature=0.5)


@pytest.mark.parametrize(
    ("name", "k", "rows"),
    [("gaussian", 17, 0), ("by id", 17, 0), ("bfloat16", 17, 0), ("constant", 17, 2), ("periodic", 40, 2),
     ("one lane", 40, 0), ("gaussian", 128, 2), ("gaussian", 129, 2)],
)  # fmt: skip
def test_the_fallback_takes_the_rows_that_need_it(calls, name, k, rows):
    assert_exact(dict(shapes_of_logits(2, 1500))[name], k)
    assert calls == [rows]


def test_rows_with_and_without_overflow_share_a_launch(calls):
    logits = noise(4, 1500)
    logits[2] = 3.0
    assert_exact(logits, 17)
    assert calls == [1]


@pytest.mark.parametrize(("columns", "k"), [(1, 1), (3, 2), (100, 1), (100, 100), (128, 17), (129, 17), (300, 300)])
def test_few_columns(columns, k):
    assert_exact(noise(3, columns), k)


def test_the_shipped_tile_at_a_shard_of_a_large_vocabulary():
    assert_exact(noise(1, 18_992) * 2.0, 512, lanes=None)
    assert_exact(noise(1, 9_000), 64, lanes=None)
    assert_exact(noise(1, 9_000), 1_100, lanes=None)  # twice the lanes


def test_lanes_grow_with_k_and_end():
    assert [triton_topk.lanes_for(k, 4096) for k in (1, 512, 1024, 1025, 4096, 4097)] == [
        4096, 4096, 4096, 8192, 8192, None,
    ]  # fmt: skip


@pytest.mark.parametrize("softcap", [30.0, 2.0, 0.1])
@pytest.mark.parametrize("k", [17, 128])
def test_soft_cap(softcap, k):
    # 0.1 saturates: neighbours among raw logits are equal once capped, and the raw ones decide.
    for temperature in (1.0, 0.5, 2.0):
        assert_exact(noise(2, 1500) * 3.0, k, temperature, softcap)


@pytest.mark.parametrize("log_tail", [-3.0, -12.0, -18.42, -40.0, -80.0])
@pytest.mark.parametrize("k", [16, 128])
def test_small_tails_keep_their_digits(log_tail, k):
    logits = noise(2, 1500, 1)
    kept = logits.topk(k).indices
    tail = logits.scatter(1, kept, -torch.inf).double().logsumexp(1)
    whole = logits.gather(1, kept).double().logsumexp(1)
    logits = logits.double().scatter_add(1, kept, (tail - whole - log_tail)[:, None].expand(2, k)).float()
    result = select(logits, k)
    _, _, lse, exact = reference.topk(logits, k)
    assert abs(float((exact - lse).mean()) - log_tail) < 0.1
    torch.testing.assert_close(result.tail_logsumexp.double(), exact, rtol=0, atol=3e-6)


def test_a_tail_below_the_smallest_float_of_its_lane_maximum():
    # exp(−200) is 0 in float32, also as a part of its lane: sums are relative to the tail's own largest logit.
    logits = noise(2, 1024)
    logits[:, :LANES] += 200.0
    assert_exact(logits, 64)
    assert_exact(logits, LANES)


@pytest.mark.parametrize("k", [3, 17, 40])
def test_minus_infinity_has_probability_zero(k):
    logits = noise(4, 1500)
    logits[0, ::2] = -torch.inf
    logits[1, LANES:] = -torch.inf
    logits[2, 30:] = -torch.inf  # fewer than 40 finite ones: the lowest ids of −inf fill up
    logits[3, :-30] = -torch.inf
    for softcap in (None, 30.0):
        result = select(logits, k, softcap=softcap)
        capped = logits.double() if softcap is None else logits.double().div(softcap).tanh().mul(softcap)
        ids, _, lse, tail = reference.topk(capped.masked_fill(logits == -torch.inf, -torch.inf), k)
        assert torch.equal(result.indices.long(), ids)
        assert torch.equal(result.logits, logits.gather(1, ids))
        torch.testing.assert_close(result.logsumexp.double(), lse, rtol=2e-6, atol=2e-6)
        assert torch.equal(result.tail_logsumexp == LOG_ZERO, tail == -torch.inf)
        finite = tail > -torch.inf
        torch.testing.assert_close(result.tail_logsumexp[finite].double(), tail[finite], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("k", [1, 17, 200])
def test_nan_shows_and_stays_in_bounds(k):
    logits = noise(7, 1500)
    logits[1, 700] = torch.nan  # most likely in a lane of the tail
    logits[2, 0] = torch.nan
    logits[3, 1499] = torch.nan
    logits[4, int(logits[4].argmax()) ^ LANES] = torch.nan  # in the lane of a survivor
    logits[5, 100:] = torch.nan
    logits[6] = torch.nan
    result = select(logits, k)
    assert torch.isnan(result.logsumexp).tolist() == [False] + [True] * 6
    assert ((result.indices >= 0) & (result.indices < 1500)).all()
    assert (result.indices[:, 1:] > result.indices[:, :-1]).all()
    assert torch.equal(result.indices[0].long(), reference.topk(logits[:1], k)[0][0])


@pytest.mark.parametrize("fill", [float("nan"), 1e30, -1e30])
def test_nothing_is_read_before_it_is_written(monkeypatch, fill):
    empty = torch.empty

    def poisoned(*size, **options):
        made = empty(*size, **options)
        return made.fill_(fill if made.is_floating_point() else 2**31 - 1)

    logits = noise(4, 1500)
    logits[2] = 3.0
    monkeypatch.setattr(triton_topk.torch, "empty", poisoned)
    result = select(logits, 17)
    monkeypatch.undo()
    for found, expected in zip(result, select(logits, 17), strict=True):
        assert torch.equal(found, expected)


def test_the_same_bits_every_time():
    logits = noise(3, 1500).bfloat16().float()
    for first, second in zip(select(logits, 33), select(logits, 33), strict=True):
        assert torch.equal(first.view(torch.int32), second.view(torch.int32))


def test_ids_that_need_64_bits_to_sort(monkeypatch):
    # V · S ≥ 2³¹ takes millions of columns; the switch is what is tested here.
    original = triton_topk.select_rows

    class Wide:
        def __getitem__(self, grid):
            return lambda *rest, **options: original[grid](*rest, **(options | {"WIDE": True}))

    monkeypatch.setattr(triton_topk, "select_rows", Wide())
    assert_exact(noise(2, 1500), 17)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 3),
    columns=st.integers(1, 500),
    share=st.floats(0, 1),
    levels=st.sampled_from([2, 20, 10**6]),
    lanes=st.sampled_from([16, 64, 256]),
    seed=st.integers(0, 10**6),
)
def test_any_shape_with_ties(rows, columns, share, levels, lanes, seed):
    k = max(1, min(columns, round(share**4 * columns)))
    logits = torch.randint(levels, (rows, columns), generator=torch.Generator().manual_seed(seed)) * (10.0 / levels)
    assert_exact(logits, k, lanes=lanes)


def test_no_rows_and_wrong_arguments():
    assert topk_rows(torch.empty(0, 50), 40, 5).indices.shape == (0, 5)
    for k, columns in ((0, 40), (41, 40), (5, 51)):
        with pytest.raises(ValueError, match=rf"k={k}, columns={columns}"):
            topk_rows(torch.zeros(2, 50), columns, k)
    with pytest.raises(ValueError, match=r"float64"):
        topk_rows(torch.zeros(2, 50, dtype=torch.float64), 40, 5)
    with pytest.raises(ValueError, match="strides"):
        topk_rows(torch.zeros(50, 2).t(), 40, 5)

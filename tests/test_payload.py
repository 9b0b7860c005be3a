"""The compact form of teacher rows: ids exact, values within half a step, a fraction of the bytes, the same loss."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastkd.kernels import TopK, topk_kl, vocab_topk
from fastkd.payload import compress, expand


def rows(n=40, k=512, vocab=151_936, seed=0, spread=3.0):
    make = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(n, 16, generator=make), torch.randn(vocab, 16, generator=make) * spread / 4
    return vocab_topk(hidden, weight, k)


def test_ids_are_exact_and_values_within_half_a_step():
    given_rows = rows()
    payload = compress(given_rows)
    back = expand(payload)
    ids, order = given_rows.indices.sort(1)
    assert torch.equal(back.indices, ids) and back.indices.dtype == torch.int32
    error = (back.logits - given_rows.logits.gather(1, order)).abs()
    width = given_rows.logits.amax(1) - given_rows.logits.amin(1)
    assert (error.amax(1) <= width / 131_068 + 4e-6).all()  # and float32's own rounding
    assert torch.equal(back.logsumexp, given_rows.logsumexp)
    assert torch.equal(back.tail_logsumexp, given_rows.tail_logsumexp)


def test_four_bytes_per_entry():
    payload = compress(rows(n=100))
    assert payload.nbytes == 100 * (512 * 4 + 16) + 4 * len(payload.wide)
    assert len(payload.wide) < 10


@given(
    st.integers(1, 6).flatmap(
        lambda k: st.lists(
            st.tuples(
                st.lists(st.integers(0, 262_143), min_size=k, max_size=k, unique=True),
                st.lists(st.floats(-60, 60, width=32) | st.just(-torch.inf), min_size=k, max_size=k),
            ),
            min_size=0,
            max_size=5,
        ).map(lambda entries: (k, entries))
    )
)
def test_any_ids_and_values(case):
    k, entries = case
    ids = torch.tensor([ids for ids, _ in entries], dtype=torch.int32).reshape(-1, k)
    logits = torch.tensor([values for _, values in entries]).reshape(-1, k)
    payload = compress(TopK(ids, logits, torch.zeros(len(ids)), None))
    back = expand(payload)
    ids, order = ids.sort(1)
    logits = logits.gather(1, order)
    assert torch.equal(back.indices, ids)
    assert torch.equal(torch.isneginf(back.logits), torch.isneginf(logits))
    error = (back.logits - logits).masked_fill(torch.isneginf(logits), 0.0).abs()
    assert (error <= payload.scale[:, None] / 2 + 1e-5).all()
    assert back.tail_logsumexp is None


def test_the_loss_is_that_of_the_rows_before():
    make = torch.Generator().manual_seed(1)
    teacher = rows(n=30, k=64, vocab=5000)
    hidden, weight = torch.randn(30, 16, generator=make), torch.randn(5000, 16, generator=make)
    exact = topk_kl(hidden, weight, teacher, kl="reverse")
    coarse = teacher._replace(logits=teacher.logits.bfloat16().float())
    errors = [
        abs(float(topk_kl(hidden, weight, other, kl="reverse").loss / exact.loss) - 1)
        for other in (expand(compress(teacher)), coarse)
    ]
    assert errors[0] < 2e-6 and errors[0] < errors[1] / 100


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_without_a_scale_are_refused(value):
    with pytest.raises(ValueError, match=r"NaN or \+inf"):
        compress(TopK(torch.tensor([[1, 2]], dtype=torch.int32), torch.tensor([[0.0, value]]), torch.zeros(1), None))

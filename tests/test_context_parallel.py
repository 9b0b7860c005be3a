"""The split of a packed batch over context-parallel ranks; its collectives run in tests/distributed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastkd.attention import attend_packed
from fastkd.batch import Prompt, Rollout, pack, pad
from fastkd.context_parallel import split


def packed(lengths, ranks):
    """A batch of sequences with (prompt, response) lengths, padded for so many ranks; token i has id i."""
    rollouts = [
        Rollout(Prompt(0, "", None, "", (1,) * prompt), 0, (2,) * response, True, 0) for prompt, response in lengths
    ]
    batch = pad(pack(rollouts), 2 * ranks)
    batch.tokens_N.copy_(torch.arange(len(batch.tokens_N)))
    batch.labels_A.copy_(torch.arange(len(batch.labels_A)))
    return batch


SEQUENCES = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=6)
RANKS = st.sampled_from([1, 2, 3, 4])


@settings(max_examples=200, deadline=None)
@given(SEQUENCES, RANKS)
def test_every_token_and_every_active_row_is_on_one_rank(lengths, ranks):
    whole = packed(lengths, ranks)
    shares = [split(whole, ranks, rank) for rank in range(ranks)]
    size = len(whole.tokens_N) // ranks
    assert {len(share.tokens_N) for share in shares} == {size}
    assert sorted(torch.cat([share.tokens_N for share in shares]).tolist()) == whole.tokens_N.tolist()
    assert sorted(torch.cat([share.labels_A for share in shares]).tolist()) == whole.labels_A.tolist()
    active = torch.full((len(whole.tokens_N),), -1)
    active[whole.active_A] = whole.labels_A
    for share in shares:
        assert torch.equal(share.positions_N, whole.positions_N[share.tokens_N])
        # Tokens are numbered, labels too: an active row must still be the one that its label belongs to.
        assert torch.equal(active[share.tokens_N[share.active_A]], share.labels_A)
        assert torch.equal(share.take(whole.labels_A), share.labels_A)
        assert sum(share.lengths) == size and share.cu_seqlens.tolist()[-1] == size
        assert share.max_seqlen == max(share.lengths) and share.cu_seqlens.dtype == torch.int32
        for index, count in enumerate(share.responses):  # of each piece
            start, end = share.cu_seqlens.tolist()[index : index + 2]
            assert int(((share.active_A >= start) & (share.active_A < end)).sum()) == count


@settings(max_examples=100, deadline=None)
@given(SEQUENCES, RANKS, st.sampled_from([None, 1, 3, 9]))
def test_attention_of_the_shares_is_attention_of_the_whole(lengths, ranks, window):
    whole = packed(lengths, ranks)
    shares = [split(whole, ranks, rank) for rank in range(ranks)]
    torch.manual_seed(0)
    query, key, value = (torch.randn(len(whole.tokens_N), heads, 4, dtype=torch.float64) for heads in (4, 2, 2))
    wanted = attend_packed(query, key, value, lengths=whole.lengths, cu_seqlens=whole.cu_seqlens, window=window)
    order = torch.cat([share.tokens_N for share in shares])
    for share in shares:
        keys = torch.cat([order[start:end] for start, end in share.context.runs])  # what gathering would bring
        assert len(keys) == sum(share.context.lengths) == share.context.cu_seqlens.tolist()[-1]
        out = attend_packed(
            query[share.tokens_N], key[keys], value[keys], lengths=share.lengths, cu_seqlens=share.cu_seqlens,
            key_lengths=share.context.lengths, key_cu_seqlens=share.context.cu_seqlens, window=window,
        )  # fmt: skip
        torch.testing.assert_close(out, wanted[share.tokens_N], rtol=0, atol=1e-12)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_one_long_sequence_is_the_same_work_for_every_rank(ranks):
    whole = packed([(40 * ranks, 24 * ranks + 1)], ranks)
    work = [int((split(whole, ranks, rank).positions_N + 1).sum()) for rank in range(ranks)]
    assert set(work) == {sum(range(64 * ranks + 1)) // ranks}


def test_the_keys_of_a_share_are_no_more_than_its_pieces_need():
    whole = packed([(30, 3), (4, 5)], 2)  # 32 + 8 tokens in 4 chunks of 10: the last begins 30 tokens into the first
    first, second = (split(whole, 2, rank) for rank in (0, 1))
    assert first.lengths == (10, 2, 8) and first.context.lengths == (10, 32, 8)
    assert second.lengths == (10, 10) and second.context.lengths == (20, 30)


def test_a_batch_that_does_not_divide():
    batch = pack([Rollout(Prompt(0, "", None, "", (1,) * 5), 0, (2,) * 5, True, 0)])
    with pytest.raises(ValueError, match="9 tokens do not make 4 equal chunks"):
        split(batch, 2, 0)


def test_an_unsplit_batch_takes_and_joins_everything():
    batch, rows = packed([(2, 3)], 1), torch.arange(3)
    assert batch.take(rows) is rows and batch.join(rows) is rows

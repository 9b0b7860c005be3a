"""Every sequence lands in exactly one bin, no bin overflows, and modified first-fit decreasing packs tighter."""

import math
import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastkd.packing import ALGORITHMS, assign, microbatches

lengths_and_capacity = st.tuples(st.lists(st.integers(0, 60), max_size=60), st.integers(1, 64))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(lengths_and_capacity)
def test_a_partition_without_overflow(algorithm, case):
    lengths, capacity = case
    bins = microbatches(lengths, tokens=capacity, algorithm=algorithm)
    assert sorted(index for one in bins for index in one) == [i for i, length in enumerate(lengths) if length]
    for one in bins:
        assert len(one) == 1 or sum(lengths[index] for index in one) <= capacity
        assert one
    assert bins == microbatches(lengths, tokens=capacity, algorithm=algorithm)


def test_pairs_a_large_item_with_two_small_ones_where_plain_first_fit_decreasing_cannot():
    # 51 + 26 + 23 fill a bin of 100; plain FFD puts 27 beside 51 and strands the 23s.
    lengths = [51] * 6 + [27] * 6 + [26] * 6 + [23] * 12
    modified = microbatches(lengths, tokens=100)
    plain = microbatches(lengths, tokens=100, algorithm="first_fit_decreasing")
    assert (len(modified), len(plain)) == (10, 11)


def test_by_count_keeps_the_order_and_leaves_out_the_empty():
    assert microbatches([3, 0, 5, 1, 2], size=2) == [[0, 2], [3, 4]]


def test_concatenative_keeps_the_order():
    assert microbatches([4, 4, 9, 1], tokens=9, algorithm="concatenative") == [[0, 1], [2], [3]]


def test_a_sequence_longer_than_the_bin_gets_its_own():
    assert [2] in microbatches([3, 3, 20], tokens=8)


@pytest.mark.parametrize("arguments", [{"size": 0}, {"tokens": 0}, {"tokens": 4, "algorithm": "best"}, {}])
def test_bad_arguments_are_named(arguments):
    with pytest.raises(ValueError, match=r"microbatches: (size|tokens|algorithm)="):
        microbatches([1, 2], **arguments)


def test_typical_rollouts_pack_tightly():
    rng = random.Random(0)
    lengths = [rng.randint(40, 70) for _ in range(64)]
    bins = microbatches(lengths, tokens=512)
    assert len(bins) == math.ceil(sum(lengths) / 512)


@example(([4, 4, 4, 8, 9, 12, 13, 17, 17, 25], 24), 5)
@given(lengths_and_capacity, st.integers(1, 9))
def test_every_rank_gets_as_many_micro_batches(case, ranks):
    lengths, capacity = case
    bins = microbatches(lengths, tokens=capacity)
    dealt = assign(bins, lengths, ranks)
    assert len(dealt) == ranks and len({len(one) for one in dealt}) == 1
    assert sorted(i for own in dealt for one in own for i in one) == sorted(i for one in bins for i in one)
    for one in (one for own in dealt for one in own):
        # A sequence beyond the capacity makes a micro-batch of its size; sharing out the rest may fill another so far.
        assert len(one) <= 1 or sum(lengths[i] for i in one) <= max(capacity, *lengths)
    assert len(dealt[0]) == -(-len(bins) // ranks)


def test_tokens_are_balanced_over_ranks():
    rng = random.Random(0)
    lengths = [rng.randint(200, 4000) for _ in range(512)]
    dealt = assign(microbatches(lengths, tokens=20_480), lengths, 8)
    totals = [sum(lengths[i] for one in own for i in one) for own in dealt]
    assert max(totals) <= 1.02 * sum(totals) / 8
    for round_ in zip(*dealt, strict=True):  # and so are the micro-batches that run at the same time
        sizes = [sum(lengths[i] for i in one) for one in round_]
        assert max(sizes) <= 1.25 * min(sizes)


def test_fewer_sequences_than_ranks_leave_empty_micro_batches():
    assert assign([[0, 1]], [5, 3], 4) == [[[0]], [[1]], [[]], [[]]]
    assert assign([[0], [1]], [5, 3], 1) == [[[0], [1]]]

"""Which sequences share a micro-batch: bins of at most so many tokens.

Modified first-fit decreasing (Johnson & Garey, "A 71/60 theorem for bin packing", J. Complexity 1985) needs at
most 71/60 of the optimal number of bins, where plain first-fit decreasing needs 11/9. A sequence longer than the
bin gets a bin of its own: it is the longest that the run allows, so the bin size was chosen too small for
efficiency, not for correctness. The loss does not depend on any of this; only time and memory do.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from fastkd.config import Policy, Teacher

Bins = list[list[int]]
"""Indices into the lengths given, bin by bin."""


def microbatches(
    lengths: Sequence[int],
    *,
    size: int | None = None,
    tokens: int | None = None,
    algorithm: str = "modified_first_fit_decreasing",
) -> Bins:
    """Split sequences into micro-batches, by count or by tokens.

    Args:
        lengths: packed length of each sequence; those of length 0 are left out.
        size: sequences per micro-batch, in the order given (no packing), when ``tokens`` is None.
        tokens: tokens per micro-batch.
        algorithm: a key of ``ALGORITHMS``.

    Returns:
        Bins of indices; every index with a positive length occurs exactly once.
    """
    items = [index for index, length in enumerate(lengths) if length > 0]
    if tokens is None:
        if size is None or size < 1:
            raise ValueError(f"microbatches: size={size}, must be at least 1 when tokens is None")
        return [items[start : start + size] for start in range(0, len(items), size)]
    if tokens < 1:
        raise ValueError(f"microbatches: tokens={tokens}, must be at least 1")
    try:
        pack_items = ALGORITHMS[algorithm]
    except KeyError:
        raise ValueError(f"microbatches: algorithm={algorithm!r}, must be one of {', '.join(ALGORITHMS)}") from None
    oversized = [[index] for index in items if lengths[index] > tokens]
    return pack_items([index for index in items if lengths[index] <= tokens], lengths, tokens) + oversized


def _decreasing(items: Sequence[int], lengths: Sequence[int]) -> list[int]:
    return sorted(items, key=lambda index: (-lengths[index], index))


def _first_fit(items: Sequence[int], lengths: Sequence[int], capacity: int, bins: Bins, free: list[int]) -> Bins:
    for index in items:
        for slot, room in enumerate(free):
            if lengths[index] <= room:
                bins[slot].append(index)
                free[slot] -= lengths[index]
                break
        else:
            bins.append([index])
            free.append(capacity - lengths[index])
    return bins


def first_fit_decreasing(items: Sequence[int], lengths: Sequence[int], capacity: int) -> Bins:
    """Longest first, each into the first bin with room."""
    return _first_fit(_decreasing(items, lengths), lengths, capacity, [], [])


def first_fit_shuffle(items: Sequence[int], lengths: Sequence[int], capacity: int) -> Bins:
    """In a random but repeatable order, each into the first bin with room."""
    shuffled = random.Random(len(items)).sample(list(items), len(items))
    return _first_fit(shuffled, lengths, capacity, [], [])


def concatenative(items: Sequence[int], lengths: Sequence[int], capacity: int) -> Bins:
    """In the order given, a new bin whenever the next sequence does not fit."""
    bins: Bins = []
    room = 0
    for index in items:
        if lengths[index] > room:
            bins.append([])
            room = capacity
        bins[-1].append(index)
        room -= lengths[index]
    return bins


def modified_first_fit_decreasing(items: Sequence[int], lengths: Sequence[int], capacity: int) -> Bins:
    """The five phases of the paper, with items large (> C/2), medium (> C/3), small (> C/6) and tiny."""
    ordered = _decreasing(items, lengths)
    large = [i for i in ordered if 2 * lengths[i] > capacity]
    medium = [i for i in ordered if 2 * lengths[i] <= capacity < 3 * lengths[i]]
    small = [i for i in ordered if 3 * lengths[i] <= capacity < 6 * lengths[i]]
    tiny = [i for i in ordered if 6 * lengths[i] <= capacity]

    # 1: every large item opens a bin; bins are then in order of growing room.
    bins: Bins = [[index] for index in large]
    free = [capacity - lengths[index] for index in large]

    def put(slot: int, source: list[int], index: int) -> None:
        source.remove(index)
        bins[slot].append(index)
        free[slot] -= lengths[index]

    def largest_fitting(source: list[int], room: int) -> int | None:
        return next((index for index in source if lengths[index] <= room), None)

    # 2: forward, the largest medium item that fits.
    holds_medium = set()
    for slot in range(len(bins)):
        index = largest_fitting(medium, free[slot])
        if index is not None:
            put(slot, medium, index)
            holds_medium.add(slot)

    # 3: backward over bins without one, a pair of small items: the smallest left, then the largest that still fits.
    for slot in reversed(range(len(bins))):
        if slot in holds_medium or len(small) < 2 or lengths[small[-1]] + lengths[small[-2]] > free[slot]:
            continue
        put(slot, small, small[-1])
        index = largest_fitting(small, free[slot])
        if index is not None:
            put(slot, small, index)

    # 4: forward, whatever is left, largest first, as long as something fits.
    left = _decreasing(medium + small + tiny, lengths)
    for slot in range(len(bins)):
        while (index := largest_fitting(left, free[slot])) is not None:
            put(slot, left, index)

    # 5: first-fit decreasing on the rest, into new bins.
    return bins + _first_fit(left, lengths, capacity, [], [])


ALGORITHMS = {
    "modified_first_fit_decreasing": modified_first_fit_decreasing,
    "first_fit_decreasing": first_fit_decreasing,
    "first_fit_shuffle": first_fit_shuffle,
    "concatenative": concatenative,
}


def for_policy(policy: Teacher, lengths: Sequence[int], *, training: bool) -> Bins:
    """Micro-batches as a model's recipe section asks: packed, dynamic, or by count.

    Args:
        policy: ``recipe.policy`` or ``recipe.teacher``.
        lengths: packed length of each sequence.
        training: use train_mb_tokens / train_micro_batch_size; else the logprob ones.
    """
    tokens = policy.train_mb_tokens if training else policy.logprob_mb_tokens
    size = policy.train_micro_batch_size if training and isinstance(policy, Policy) else policy.logprob_batch_size
    packed = policy.sequence_packing.enabled
    # Dynamic batching sorts by length and cuts; on flat batches that is first-fit decreasing without the fitting.
    algorithm = policy.sequence_packing.algorithm if packed else "first_fit_decreasing"
    return microbatches(lengths, size=size, tokens=tokens, algorithm=algorithm)


def assign(bins: Bins, lengths: Sequence[int], ranks: int) -> list[Bins]:
    """Deal micro-batches to data-parallel ranks: the same number to each, with about as many tokens.

    Ranks run micro-batch j together (every one gathers weights and reduces gradients with the others), so bins of
    about the same size are dealt in the same round, and within a round the largest goes to the rank that has least.
    The smallest bins are shared out evenly over the last round; where they hold fewer sequences than there are ranks,
    some ranks get an empty micro-batch, which they run without any active row.

    Args:
        bins: of :func:`microbatches`.
        lengths: packed length of each sequence.
        ranks: R.

    Returns:
        R lists of bins, equally long; every index occurs exactly once, and none is larger than the largest given. One
        rank gets ``bins`` as they are.
    """
    if ranks == 1 or not bins:
        return [bins] * ranks

    def size(one: Sequence[int]) -> int:
        return sum(lengths[index] for index in one)

    bins = sorted(bins, key=lambda one: (-size(one), one))
    # The smallest bins, which would fill the last round unevenly or only in part, are shared out anew.
    last = len(bins) // ranks * ranks if len(bins) % ranks else max(len(bins) - ranks, 0)
    rest = bins[last:]
    even: Bins = [[] for _ in range(ranks)]
    for index in _decreasing([index for one in rest for index in one], lengths):
        min(even, key=size).append(index)
    largest = max(map(size, rest), default=0)
    bins = bins[:last] + (even if max(map(size, even)) <= largest else rest + [[]] * (ranks - len(rest)))
    dealt: list[Bins] = [[] for _ in range(ranks)]
    totals = [0] * ranks
    for start in range(0, len(bins), ranks):
        order = sorted(range(ranks), key=lambda rank: (totals[rank], rank))
        for rank, one in zip(order, bins[start : start + ranks], strict=True):
            dealt[rank].append(one)
            totals[rank] += size(one)
    return dealt

"""Which source the n-th sample comes from, and which of its documents.

Sources take turns by largest deficit, as in Megatron's blended dataset: sample n (from 0) comes from the source s with
the largest w_s·max(n, 1) - c_s, where w_s is its share and c_s how many samples it has given; ties go to the first.
Deficits sum to zero, and the one that is served falls by one, so each stays above -1, and below S - 1 for S sources:
after n samples a source has given w_s·n to within S - 1, whatever n is.

Each source is read in a new order in every epoch, drawn from (seed, source, epoch) alone. So the sample at any place is
a function of the place, and how many samples were consumed is all there is to save.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastkd.sampling import stable_seed


class Draw(NamedTuple):
    """One sample's origin."""

    source: int
    """Number of the source, from 0."""
    turn: int
    """How many samples that source gave before."""


class Mixture:
    """The sequence of sources for given weights.

    The rule has no closed form, so places are worked out in blocks; of earlier blocks only the counts at their start
    are kept. To resume after a million samples of three sources takes one or two seconds.
    """

    BLOCK = 1 << 14

    def __init__(self, weights: Sequence[float]):
        """``weights``: relative shares. ValueError: none, one is negative, or all are zero."""
        total = sum(weights)
        if not weights or min(weights) < 0 or total <= 0:
            raise ValueError(f"Mixture: weights={list(weights)}, must be at least 0 and not all 0")
        self.shares = [weight / total for weight in weights]
        self._starts: list[list[int]] = [[0] * len(weights)]
        self._block: tuple[int, array[int]] = (-1, array("H"))

    def draws(self, start: int, count: int) -> list[Draw]:
        """Where samples start … start + count - 1 come from."""
        found: list[Draw] = []
        given = self.counts(start)
        while len(found) < count:
            block, offset = divmod(start + len(found), self.BLOCK)
            for source in self._sources(block)[offset : offset + count - len(found)]:
                found.append(Draw(source, given[source]))
                given[source] += 1
        return found

    def counts(self, samples: int) -> list[int]:
        """How many of the first samples come from each source."""
        block, offset = divmod(samples, self.BLOCK)
        before = self._sources(block)[:offset]
        return [count + before.count(source) for source, count in enumerate(self._starts[block])]

    def _sources(self, block: int) -> array[int]:
        """The source of each sample of a block."""
        if self._block[0] != block:
            for number in range(min(len(self._starts) - 1, block), block + 1):
                self._block = (number, self._work_out(number))
        return self._block[1]

    def _work_out(self, block: int) -> array[int]:
        shares, given = self.shares, list(self._starts[block])
        sources = range(len(shares))
        chosen_ones = array("H")
        for n in range(block * self.BLOCK, (block + 1) * self.BLOCK):
            place = n or 1
            chosen, most = 0, -math.inf
            for source in sources:
                deficit = shares[source] * place - given[source]
                if deficit > most:
                    chosen, most = source, deficit
            chosen_ones.append(chosen)
            given[chosen] += 1
        if len(self._starts) == block + 1:
            self._starts.append(given)
        return chosen_ones


class Order:
    """In which order the documents of one source are read, epoch by epoch."""

    def __init__(self, length: int, *seed: object, shuffle: bool):
        """``length``: documents of the source. ``seed``: whatever tells this order from others."""
        self.length, self.seed, self.shuffle = length, seed, shuffle
        self._epoch: tuple[int, torch.Tensor] = (-1, torch.zeros(0, dtype=torch.int64))

    def document(self, turn: int) -> int:
        """The document that the source gives at this turn (from 0)."""
        epoch, place = divmod(turn, self.length)
        if not self.shuffle:
            return place
        if self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(stable_seed("blend", *self.seed, epoch))
            self._epoch = (epoch, torch.randperm(self.length, generator=generator))
        return int(self._epoch[1][place])

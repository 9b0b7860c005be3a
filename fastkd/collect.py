"""Sampling and scoring of one step over two pools at once: the teacher scores what is finished, the rest is sampled.

Prompts go to the engines in batches, the longest first, each to whoever is idle. What comes back waits for the teacher,
which takes all that is there whenever it is idle. A lost engine's batch goes back into the queue; a lost teacher scores
again, since its rows are lost with it. So every rollout is sampled and scored once in the result, whoever dies.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import ray  # pyright: ignore[reportMissingImports]

from fastkd.actors import WorkerDied
from fastkd.batch import Prompt, Rollout
from fastkd.queue_lengths import QueueLengths
from fastkd.refs import Refs


class Engines(Protocol):
    """The generation pool, as this loop sees it."""

    def idle(self) -> list[int]:
        """Engines that have nothing to do."""
        ...

    def submit(self, engine: int, prompts: Sequence[Prompt]) -> Any:
        """Begin to sample; a ``Pending`` of rollouts, prompt by prompt."""
        ...

    def lost(self, error: WorkerDied) -> None:
        """Replace an engine; raises when that was done too often."""
        ...


class Scorer(Protocol):
    """The teacher pool, as this loop sees it."""

    def submit(self, rollouts: Sequence[Rollout]) -> Any:
        """Begin to score; a ``Pending`` of ``Refs``."""
        ...

    def lost(self, error: WorkerDied) -> None:
        """Replace the teacher; raises when that was done too often."""
        ...


def batches(prompts: Sequence[Prompt], size: int) -> list[list[int]]:
    """Places of prompts by batch: of like length together, since left padding is wasted work, the longest first."""
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index].tokens), index))
    return [order[start : start + size] for start in range(0, len(order), size)]


class Collection:
    """One step's rollouts and rows under way.

    Args:
        prompts: of the step.
        generations: rollouts per prompt.
        size: prompts given to an engine at a time.
        engines: who samples.
        scorer: who scores; None: nobody does.
        read: turns rollouts into what the teacher reads of them, one for one.
        arrived: told how many rollouts have come back, now.
        waiting: told how many prompts wait for an engine, and rollouts for the teacher.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        generations: int,
        size: int,
        engines: Engines,
        scorer: Scorer | None,
        read: Callable[[Sequence[Rollout]], Sequence[Rollout]],
        arrived: Callable[[int], None] = lambda count: None,
        waiting: QueueLengths | None = None,
    ):
        self.prompts, self.generations, self.engines, self.scorer = prompts, generations, engines, scorer
        self.read, self.arrived = read, arrived
        self.rollouts: list[Rollout | None] = [None] * (len(prompts) * generations)
        self.rows: list[Any] = [None] * len(self.rollouts)
        self.to_sample = deque(batches(prompts, size))
        self.to_score: list[int] = []
        self.sampling: dict[int, tuple[Any, list[int]]] = {}
        """Engine → its call and the places of its prompts."""
        self.scoring: tuple[Any, list[int]] | None = None
        self.waiting, self._told = waiting or QueueLengths(), (0, 0)

    def sample(self) -> list[Rollout]:
        """Until all is sampled: the rollouts, prompt by prompt. The teacher may still be busy."""
        self._run(lambda: bool(self.to_sample or self.sampling))
        return self.rollouts  # pyright: ignore[reportReturnType]

    def score(self) -> Refs:
        """Until all is scored: the rows."""
        self._run(lambda: bool(self.to_score or self.scoring))
        return Refs(self.rows)

    def _run(self, unfinished: Callable[[], bool]) -> None:
        try:
            while unfinished():
                self._begin()
                self._tell(sum(map(len, self.to_sample)), len(self.to_score))
                _wait_for_any([call for call, _ in (*self.sampling.values(), *filter(None, [self.scoring]))])
                self._take_samples()
                self._take_rows()
        except BaseException:
            self._tell(0, 0)  # nobody goes on with it
            raise
        self._tell(sum(map(len, self.to_sample)), len(self.to_score))

    def _tell(self, prompts: int, rollouts: int) -> None:
        for role, now, before in zip(("generation", "teacher"), (prompts, rollouts), self._told, strict=True):
            self.waiting.change(role, now - before)
        self._told = prompts, rollouts

    def _begin(self) -> None:
        """Give work to whoever is idle."""
        for engine in self.engines.idle():
            if self.to_sample and engine not in self.sampling:
                places = self.to_sample.popleft()
                call = self.engines.submit(engine, [self.prompts[place] for place in places])
                self.sampling[engine] = (call, places)
        if self.scorer is not None and self.scoring is None and self.to_score:
            places, self.to_score = self.to_score, []
            # In the order of the batch, so that the result does not depend on who was first.
            places.sort()
            rollouts = [rollout for place in places if (rollout := self.rollouts[place]) is not None]
            self.scoring = (self.scorer.submit(self.read(rollouts)), places)

    def _take_samples(self) -> None:
        for engine, (call, places) in list(self.sampling.items()):
            if not call.done():
                continue
            del self.sampling[engine]
            try:
                found = call.result()
            except WorkerDied as error:
                self.to_sample.appendleft(places)
                self.engines.lost(error)
                continue
            for number, place in enumerate(places):
                start = place * self.generations
                mine = found[number * self.generations : (number + 1) * self.generations]
                self.rollouts[start : start + self.generations] = mine
                self.to_score += range(start, start + self.generations)
            self.arrived(len(found))

    def _take_rows(self) -> None:
        if self.scoring is None or not self.scoring[0].done():
            return
        (call, places), self.scoring, scorer = self.scoring, None, self.scorer
        assert scorer is not None
        try:
            found = call.result()
        except WorkerDied as error:
            scorer.lost(error)
            scored = [place for place, row in enumerate(self.rows) if row is not None]
            self.rows = [None] * len(self.rollouts)  # they were in its memory
            self.to_score = sorted({*self.to_score, *places, *scored})
            return
        for place, row in zip(places, found.items, strict=True):
            self.rows[place] = row


def _wait_for_any(calls: Sequence[Any]) -> None:
    """Until a call is done. A group's call has several references, and only the last one ends it."""
    references = [reference for call in calls for reference in call.references]
    ended = 1
    while not any(call.done() for call in calls):
        ended = min(ended + 1, len(references))
        ray.wait(references, num_returns=ended, timeout=1.0, fetch_local=False)

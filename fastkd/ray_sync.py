"""Weights from the training group to the engines, and to an engine that took the place of a lost one.

There are two ways. ``StoreSync`` is for engines that run transformers: the first training rank puts whole tensors into
its node's object store, and each engine fetches them; what lies there serves an engine that comes later. ``VllmSync``
uses vLLM's weight transfer: the group and all engines are joined, every sync is a collective of theirs and is probed,
so that one lost engine breaks the connection of all.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from ray.exceptions import ObjectLostError, RayActorError  # pyright: ignore[reportMissingImports]

from fastkd import cluster_workers as work
from fastkd import engine_actors
from fastkd.actors import WorkerDied, WorkerFailed
from fastkd.cluster_workers import Learner
from fastkd.driver import Inputs
from fastkd.metrics import Metrics
from fastkd.placement import devices_per_worker
from fastkd.ray_pools import Pending, RayPool
from fastkd.ray_repairs import Repairs
from fastkd.refs import Refs
from fastkd.rollout import Generation
from fastkd.turns import Turns
from fastkd.vllm_generation import VllmGeneration

LOST: tuple[type[BaseException], ...] = (ObjectLostError, RayActorError)
"""What fetching an object raises whose maker is gone."""


class WeightSync(Protocol):
    """How engines get weights, as ``fastkd.ray_roles`` sees it."""

    def sync(self, version: int) -> Metrics:
        """All engines sample with the student's weights from here on; what it took.

        Args:
            version: optimizer steps that the student has taken.
        """
        ...

    def engine_lost(self, error: WorkerDied) -> None:
        """Replace an engine, and those that went with its node; they get the newest weights."""
        ...

    def group_lost(self) -> None:
        """The training group is built anew: what it had made is gone."""
        ...

    def changed(self) -> None:
        """The student has other weights, though no step was taken."""
        ...


class StoreSync:
    """``WeightSync`` through the object stores.

    Args:
        student: the training group.
        engines: who samples.
        repairs: replaces engines.
        ahead: engines sample ahead of training. They are not waited for: they take weights after the batch they are at,
            before the next one. What became of it is heard at the next sync.
    """

    def __init__(self, student: RayPool[Learner], engines: RayPool[Generation], repairs: Repairs, *, ahead: bool):
        self.student, self.engines, self.repairs, self.ahead = student, engines, repairs, ahead
        self.version = 0
        self.published: tuple[Refs, int] | None = None
        """The newest weights that generation was given, and their version."""
        self.giving: list[Pending[bool]] = []
        """Engines about to take weights that are not waited for."""

    def sync(self, version: int) -> Metrics:
        self.version = version
        return self._publish()

    def engine_lost(self, error: WorkerDied) -> None:
        with self.repairs.mending:
            ranks = self.repairs.replace(self.engines, error, error.rank)
            if ranks and self.published is not None and not self._give(ranks):
                self._publish()

    def group_lost(self) -> None:
        self.published = None

    def changed(self) -> None:
        self.published = None

    def _publish(self) -> Metrics:
        with self.repairs.mending:
            while True:
                if self.published is None or self.published[1] != self.version:
                    self.published = (self.student.keep(work.publish), self.version)
                if self._give(range(len(self.engines))):
                    return {"sync/megabytes": self.published[0].nbytes / 1e6}
                self.published = None

    def _give(self, ranks: Iterable[int]) -> bool:
        """These engines take the newest weights; False when those are lost, without the training group being so."""
        assert self.published is not None
        calls = [self.engines.submit_to(rank, work.receive, *self.published, LOST) for rank in ranks]
        if self.ahead:
            calls, self.giving = self.giving, calls
        whole = True
        for call in calls:
            try:
                whole &= call.result()
            except WorkerDied as error:
                self.engine_lost(error)
        if not whole:
            self.student.run(work.alive)
        return whole


class VllmSync:
    """``WeightSync`` through vLLM's weight transfer, and probed.

    Args:
        inputs: the recipe, a text for the probe and the vocabulary.
        student: the training group.
        engines: who samples.
        repairs: replaces engines.
        turns: of roles that share their devices; it is told that new weights wake an engine.
    """

    def __init__(
        self,
        inputs: Inputs,
        student: RayPool[Learner],
        engines: RayPool[VllmGeneration],
        repairs: Repairs,
        turns: Turns,
    ):
        self.inputs, self.student, self.engines, self.repairs, self.turns = inputs, student, engines, repairs, turns
        self.connected = False
        """Whether the training group and the engines, all of them, are in one transfer group."""

    def sync(self, version: int) -> Metrics:
        del version  # the student tells the engines
        return self._push()

    def engine_lost(self, error: WorkerDied) -> None:
        with self.repairs.mending:
            if self._replace(error):
                self._push()

    def group_lost(self) -> None:
        self.connected = False

    def changed(self) -> None:
        pass  # every sync sends the weights that there are

    def _push(self) -> Metrics:
        with self.repairs.mending:
            while True:
                failure = "" if self.connected else self._connect()
                if not failure:
                    found, failure = self.student.run(engine_actors.push)
                    if not failure:
                        self.turns.holds("generation")
                        return found
                self.connected = False
                dead = [error for error in map(self._death_of, range(len(self.engines))) if error is not None]
                if not dead:
                    raise WorkerFailed("generation", 0, self.engines.slots.nodes[0].name, failure)
                for error in dead:
                    self._replace(error)

    def _replace(self, error: WorkerDied) -> list[int]:
        ranks = self.repairs.replace(self.engines, error, error.rank)
        if ranks:
            self.connected = False  # they belong to no group yet
        return ranks

    def _connect(self) -> str:
        """Join them; why that failed, or ""."""
        inputs = self.inputs
        text = inputs.train.render([0], inputs.train.problems.rows[:1])[0].tokens
        vocab = inputs.student_vocab or len(inputs.tokenizer)
        workers = [devices_per_worker(inputs.recipe, "generation")] * len(self.engines)
        failure = self.student.run(engine_actors.connect, inputs.recipe, self.engines.handles, workers, text, vocab)
        self.connected = not failure
        return failure

    def _death_of(self, rank: int) -> WorkerDied | None:
        try:
            self.engines.submit_to(rank, work.alive).result()
        except WorkerDied as error:
            return error
        return None

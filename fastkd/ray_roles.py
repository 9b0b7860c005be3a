"""The three roles as pools of Ray actors, each on nodes of its own or sharing them, as the recipe says.

The driver moves prompts, rollouts and references. Rows stay on the teacher's nodes until the training rank
that needs them fetches them, and weights go from the training group to the engines (``fastkd.ray_sync``). Roles that
share devices take turns with the memory (``fastkd.ray_turns``).

What is lost is replaced (``fastkd.ray_repairs``): an engine gets the newest weights and its batch is sampled again; a
teacher scores again; a training group is left to the runner, which goes on from a checkpoint.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastkd import cluster_workers as work
from fastkd import engine_actors
from fastkd.actors import WorkerDied
from fastkd.batch import Prompt, Rollout
from fastkd.checkpoint import Workers
from fastkd.collect import Collection
from fastkd.driver import Inputs
from fastkd.log import bars, logger
from fastkd.metrics import Metrics
from fastkd.placement import Placement
from fastkd.queue_lengths import QueueLengths
from fastkd.ray_cluster import connected
from fastkd.ray_pools import Pending, RayPool
from fastkd.ray_repairs import Repairs
from fastkd.ray_role_pools import RolePools
from fastkd.ray_sync import LOST, StoreSync, VllmSync, WeightSync
from fastkd.ray_turns import PoolTurns
from fastkd.refs import Refs
from fastkd.roles import Phase, Scored
from fastkd.rollout import Request
from fastkd.shared_weights import shares_student
from fastkd.student import Student
from fastkd.teacher import Teacher
from fastkd.timeline import Work


class RayRoles:
    """``roles.Roles`` over pools of actors; ``started`` makes it."""

    def __init__(self, inputs: Inputs, placement: Placement):
        recipe = inputs.recipe
        self.inputs, self.recipe = inputs, recipe
        self.pools = RolePools(inputs, placement)
        self.teacher_shares = shares_student(recipe)
        self.version = 0
        """Optimizer steps that the student had taken at the last sync."""
        self.waiting = QueueLengths()
        self.turns = PoolTurns(recipe)
        self.repairs = Repairs(recipe.cluster.max_restarts, self.turns)
        self.workers = Workers(
            save=lambda path, asynchronous: self._training().run(Student.save, path, asynchronous),
            saved=lambda wait: self.student.run(Student.saved, wait),
            load=lambda path: self._training().run(Student.load, path),
        )

    def _start(self) -> None:
        """Start the pools; ``close`` ends those that were started, whatever happened to the others."""
        self.student = self.pools.training()
        self.teacher: RayPool[Any] = self.student if self.teacher_shares else self.pools.teacher()
        self.engines = self._engine_pool()
        self.weights: WeightSync = self._weight_sync()
        mend = {"generation": self.engine_lost, "teacher": self.teacher_lost}  # a training group is the runner's
        for role, pool in self.pools.items():
            self.turns.add(pool, mend.get(role))

    @classmethod
    @contextmanager
    def started(cls, inputs: Inputs) -> Iterator[RayRoles]:
        """Workers on a Ray cluster: the one there is, or a new one; they end with the block.

        Raises:
            UserError: the cluster is too small or unhealthy, or a worker rejects what the recipe gives.
        """
        cluster = inputs.recipe.cluster
        with (
            connected(inputs.recipe, cpu_slots=cluster.cpu_slots_per_node),
            Placement(inputs.recipe, cpu_slots=cluster.cpu_slots_per_node, exclude=cluster.exclude_nodes) as placement,
        ):
            logger.info(placement.marker())
            roles = cls(inputs, placement)
            failed = True
            try:
                roles._start()
                yield roles
                failed = False
            finally:
                roles.close(at_once=failed)

    def _engine_pool(self) -> RayPool[Any]:
        return self.pools.generation()

    def _weight_sync(self) -> WeightSync:
        if self.recipe.policy.generation.backend == "vllm":
            return VllmSync(self.inputs, self.student, self.engines, self.repairs, self.turns)
        ahead = self.recipe.distillation.max_off_policy_steps > 0
        return StoreSync(self.student, self.engines, self.repairs, ahead=ahead)

    def _training(self) -> RayPool[work.Learner]:
        """The training group, which works next."""
        self.turns.take("training")
        return self.student

    def close(self, *, at_once: bool = False) -> None:
        """End all workers."""
        self.repairs.closed = True
        self.pools.close(at_once=at_once)

    # --- sampling and scoring -----------------------------------------------------------------------------------

    def collect(self, prompts: Sequence[Prompt], request: Request, phase: Phase) -> Scored:
        """Sample and score at the same time (see ``fastkd.collect``), or in turns on the same devices."""
        if self.turns.shared:
            with phase("sampling", "generation"):
                rollouts = self.sample(prompts, request)
            readings = self.inputs.readings(rollouts)
            with phase("scoring", "teacher"):
                return Scored(rollouts, readings, self.score(readings.teacher))
        collection = Collection(
            prompts,
            request.generations,
            self._batch(request, len(prompts)),
            _Engines(self, request),
            _Teacher(self),
            lambda rollouts: self.inputs.readings(rollouts).teacher,
            bars.advance,
            self.waiting,
        )
        with phase("sampling", "generation"):
            rollouts = collection.sample()
        with phase("scoring", "teacher"):
            rows = collection.score()
        return Scored(rollouts, self.inputs.readings(rollouts), rows)

    def sample(self, prompts: Sequence[Prompt], request: Request, batch_size: int | None = None) -> list[Rollout]:
        """``Generation.sample`` over all engines."""
        self.turns.take("generation")
        size = self._batch(request, len(prompts), batch_size)
        engines = _Engines(self, request)
        return Collection(prompts, request.generations, size, engines, None, list, bars.advance).sample()

    def sample_teacher(self, prompts: Sequence[Prompt], request: Request, batch_size: int) -> list[Rollout]:
        """The teacher's own answers, by a copy that the engines load for it."""
        self.turns.take("generation")
        recipe, inputs = self.recipe, self.inputs
        count = len(self.engines)
        shares = [list(range(rank, len(prompts), count)) for rank in range(count)]
        answers = self.engines.run_each(
            work.teacher_answers,
            [([prompts[index] for index in share],) for share in shares],
            recipe,
            inputs.tokenizer,
            inputs.teacher_vocab,
            request,
            batch_size,
        )
        found: list[Any] = [None] * len(prompts)
        for share, rollouts in zip(shares, answers, strict=True):
            for index, rollout in zip(share, rollouts, strict=True):
                found[index] = rollout
        return found

    def _batch(self, request: Request, prompts: int, batch_size: int | None = None) -> int:
        """Prompts that an engine is given at a time: at most its share, or some engines would have none."""
        most = max(1, (batch_size or self.recipe.policy.generation_batch_size) // request.generations)
        return max(1, min(most, -(-prompts // len(self.engines))))

    def score(self, rollouts: Sequence[Rollout]) -> Refs:
        """``Teacher.score``; the rows stay with the teacher."""
        self.turns.take("training" if self.teacher_shares else "teacher")
        while True:
            try:
                return self.submit_score(rollouts).result()
            except WorkerDied as error:
                self.teacher_lost(error)

    def submit_score(self, rollouts: Sequence[Rollout]) -> Pending[Refs]:
        """``score``, without waiting and without a second try."""
        method: Any = Teacher.score
        if self.teacher_shares:
            method = work.score_lent
        elif self.recipe.teacher.backend == "vllm":
            method = engine_actors.Scorer.score
        return self.teacher.submit_keep(method, rollouts)

    # --- training -----------------------------------------------------------------------------------------------

    def calibrate(self, rollouts: Sequence[Rollout]) -> None:
        """``Student.calibrate``."""
        self._training().run(Student.calibrate, rollouts)
        self.weights.changed()  # folded weights are other weights

    def train(self, batch: Scored) -> Metrics:
        """``Student.train``, once every rank has its share of the rows."""
        self._hold(batch, training=True)
        self.turns.take("training")
        return self.student.run(work.train_held)

    def divergences(self, batch: Scored, *, with_loss: bool) -> Metrics:
        """``Student.divergences``."""
        self._hold(batch, training=False)
        self.turns.take("training")
        return self.student.run(work.divergences_held, with_loss=with_loss)

    def _hold(self, batch: Scored, *, training: bool) -> None:
        student, teacher = batch.readings.student, batch.readings.teacher
        while not all(self.student.run_all(work.hold, student, batch.rows, training, LOST)):
            logger.warning("teacher: rows were lost with a worker; scoring again")
            batch.rows = self.score(teacher)

    def sync(self) -> Metrics:
        """All engines sample with the student's weights from here on."""
        self.version = self._training().run(work.version)
        return self.weights.sync(self.version)

    def export(self, path: Path) -> None:
        """``Student.export``."""
        self._training().run(Student.export, path)

    def memory(self) -> Metrics:
        """The most that one worker of a role uses."""
        return self.pools.memory()

    def queues(self) -> Metrics:
        """Prompts that wait for an engine, and rollouts for the teacher."""
        return self.waiting.take()

    def take_work(self) -> list[Work]:
        """All calls done since the last time."""
        return self.pools.take_work()

    @property
    def sizes(self) -> dict[str, int]:
        """Workers by role."""
        return {role: len(pool) for role, pool in self.pools.items()}

    # --- losses -------------------------------------------------------------------------------------------------

    def revive(self, error: BaseException) -> None:
        """A training group that lost a rank is built anew; anything else is raised."""
        if not isinstance(error, WorkerDied) or error.role != "training":
            raise error
        with self.repairs.mending:
            self.weights.group_lost()
            self.repairs.replace(self.student, error)

    def engine_lost(self, error: WorkerDied) -> None:
        """Replace an engine, and those that went with its node; they get the newest weights."""
        self.weights.engine_lost(error)

    def teacher_lost(self, error: WorkerDied) -> None:
        """Replace the teacher group, unless that was done for another call."""
        if self.teacher_shares:
            raise error
        self.repairs.replace(self.teacher, error)

    @property
    def restarts(self) -> Counter[str]:
        """By role, so far."""
        return self.repairs.restarts


class _Engines:
    """``collect.Engines`` of one request."""

    def __init__(self, roles: RayRoles, request: Request):
        self.roles, self.request = roles, request

    def idle(self) -> list[int]:
        return list(range(len(self.roles.engines)))

    def submit(self, engine: int, prompts: Sequence[Prompt]) -> Pending[list[Rollout]]:
        return self.roles.engines.submit_to(engine, work.sample, prompts, self.request, _WHOLE)

    def lost(self, error: WorkerDied) -> None:
        self.roles.engine_lost(error)


_WHOLE = 1 << 30
"""An engine decodes the batch it is given as one."""


class _Teacher:
    """``collect.Scorer``."""

    def __init__(self, roles: RayRoles):
        self.roles = roles

    def submit(self, rollouts: Sequence[Rollout]) -> Pending[Refs]:
        return self.roles.submit_score(rollouts)

    def lost(self, error: WorkerDied) -> None:
        self.roles.teacher_lost(error)

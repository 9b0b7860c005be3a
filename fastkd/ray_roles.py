"""The three roles as pools of Ray actors, each on nodes of its own or sharing them, as the recipe says.

The driver moves prompts, rollouts and references. Rows stay on the teacher's nodes until the training rank
that needs them fetches them, and weights go from the first training rank to the engines through the object stores.

What is lost is replaced, ``cluster.max_restarts`` times per role: an engine gets the newest weights and its batch is
sampled again; a teacher scores again; a training group is left to the runner, which goes on from a checkpoint.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray.exceptions import ObjectLostError, RayActorError  # pyright: ignore[reportMissingImports]

from fastkd import cluster_workers as work
from fastkd import engine_actors
from fastkd.actors import NodeLost, WorkerDied, WorkerFailed
from fastkd.batch import Prompt, Rollout
from fastkd.checkpoint import Workers
from fastkd.collect import Collection
from fastkd.driver import Inputs
from fastkd.errors import UserError
from fastkd.health import Limits
from fastkd.log import bars, logger
from fastkd.metrics import Metrics
from fastkd.placement import Placement, devices_per_worker
from fastkd.ray_cluster import connected
from fastkd.ray_pools import Options, Pending, RayPool
from fastkd.refs import Refs
from fastkd.roles import Phase, Scored
from fastkd.rollout import Request
from fastkd.shared_weights import shares_student
from fastkd.student import Student
from fastkd.teacher import Teacher
from fastkd.timeline import Work
from fastkd.turns import Turns, give_memory, take_memory

_LOST: tuple[type[BaseException], ...] = (ObjectLostError, RayActorError)
"""What fetching an object raises whose maker is gone."""
NODE_SECONDS = 120.0
"""How long a role waits for a node to take the place of one that is gone."""


class RayRoles:
    """``roles.Roles`` over pools of actors; ``started`` makes it."""

    def __init__(self, inputs: Inputs, placement: Placement):
        recipe = inputs.recipe
        self.inputs, self.recipe, self.placement = inputs, recipe, placement
        self.restarts: Counter[str] = Counter()
        self.closed = False
        self.pools: dict[str, RayPool[Any]] = {}
        self.teacher_shares = shares_student(recipe)
        self.by_vllm = recipe.policy.generation.backend == "vllm"
        self.connected = False
        """Whether the training group and the vLLM engines, all of them, are in one transfer group."""
        self.version = 0
        """Optimizer steps that the student had taken at the last sync."""
        self.published: tuple[Refs, int] | None = None
        """The newest weights that generation was given, and their version."""
        self.giving: list[Pending[bool]] = []
        """Engines about to take weights that are not waited for."""
        self.turns: Turns | None = None
        """Of roles that share their devices."""
        self._mending = threading.RLock()
        """Whoever replaces workers, or gives weights to engines; one thread collects ahead while another trains."""
        self.workers = Workers(
            save=lambda path, asynchronous: self._training().run(Student.save, path, asynchronous),
            saved=lambda wait: self.student.run(Student.saved, wait),
            load=lambda path: self._training().run(Student.load, path),
        )

    def _start(self) -> None:
        """Start the pools; ``close`` ends those that were started, whatever happened to the others."""
        recipe, inputs = self.recipe, self.inputs
        threads = recipe.cluster.cpu_threads if recipe.cluster.device == "cpu" else None
        limits = Limits(disk_path=str(recipe.checkpointing.checkpoint_dir))
        group, alone = Options(threads=threads, limits=limits), Options(False, threads=threads, limits=limits)
        self.student: RayPool[Any] = self._pool(
            "training", group, work.learner, recipe, inputs.student_vocab, inputs.teacher_vocab
        )
        self.teacher: RayPool[Any] = self.student if self.teacher_shares else self._teacher_pool(group, alone)
        self.engines: RayPool[Any] = self._engine_pool(alone)
        if self._shares_devices():
            self.turns = Turns(self._turn_calls())

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

    def _pool(self, role: str, options: Options, build: Any, *args: Any) -> RayPool[Any]:
        pool = self.pools[role] = RayPool(self.placement.slots(role), options, build, *args)
        return pool

    def _teacher_pool(self, group: Options, alone: Options) -> RayPool[Any]:
        recipe, vocab = self.recipe, self.inputs.teacher_vocab
        if recipe.teacher.backend == "vllm":
            count = len(self.placement.slots("teacher"))
            return self._pool("teacher", alone, engine_actors.build_scorer, recipe, vocab, count)
        return self._pool("teacher", group, work.scorer, recipe, vocab)

    def _engine_pool(self, options: Options) -> RayPool[Any]:
        recipe, inputs = self.recipe, self.inputs
        if self.by_vllm:
            eos = inputs.tokenizer.eos_token_id
            # Weights come while it samples.
            options = replace(options, at_once=engine_actors.CALLS_AT_ONCE)
            return self._pool("generation", options, engine_actors.build_engine, recipe, eos, inputs.student_vocab)
        return self._pool("generation", options, work.generator, recipe, inputs.tokenizer, inputs.student_vocab)

    # --- turns ----------------------------------------------------------------------------------------------------

    def _shares_devices(self) -> bool:
        """Whether roles take turns; who samples ahead of training cannot."""
        loop = self.recipe.distillation
        shared = self.recipe.policy.generation.colocated.enabled and not loop.resource_isolation.enabled
        return shared and loop.max_off_policy_steps == 0

    def _turn_calls(self) -> dict[str, Any]:
        """(give, take) of each role. A worker that is found dead has a successor then, which holds its memory."""

        def calls(pool: RayPool[Any], give: Any, take: Any, lost: Any) -> Any:
            def call(method: Any) -> None:
                try:
                    pool.run(method)
                except WorkerDied as error:
                    lost(error)

            return lambda: call(give), lambda: call(take)

        def raised(error: WorkerDied) -> None:
            raise error  # the runner's to mend

        engine = (engine_actors.sleep, engine_actors.wake) if self.by_vllm else (give_memory, take_memory)
        found = {
            "training": calls(self.student, give_memory, take_memory, raised),
            "generation": calls(self.engines, *engine, self.engine_lost),
        }
        if not self.teacher_shares and self.recipe.teacher.backend == "fastkd":
            found["teacher"] = calls(self.teacher, give_memory, take_memory, self.teacher_lost)
        return found

    def _take_turn(self, role: str) -> None:
        if self.turns is not None and role in self.turns.calls:
            self.turns.take(role)

    def _training(self) -> RayPool[Any]:
        """The training group, which works next."""
        self._take_turn("training")
        return self.student

    def close(self, *, at_once: bool = False) -> None:
        """End all workers."""
        self.closed = True
        for pool in self.pools.values():
            pool.close(at_once=at_once)

    # --- sampling and scoring -----------------------------------------------------------------------------------

    def collect(self, prompts: Sequence[Prompt], request: Request, phase: Phase) -> Scored:
        """Sample and score at the same time (see ``fastkd.collect``), or in turns on the same devices."""
        if self.turns is not None:
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
        )
        with phase("sampling", "generation"):
            rollouts = collection.sample()
        with phase("scoring", "teacher"):
            rows = collection.score()
        return Scored(rollouts, self.inputs.readings(rollouts), rows)

    def sample(self, prompts: Sequence[Prompt], request: Request, batch_size: int | None = None) -> list[Rollout]:
        """``Generation.sample`` over all engines."""
        self._take_turn("generation")
        size = self._batch(request, len(prompts), batch_size)
        engines = _Engines(self, request)
        return Collection(prompts, request.generations, size, engines, None, list, bars.advance).sample()

    def sample_teacher(self, prompts: Sequence[Prompt], request: Request, batch_size: int) -> list[Rollout]:
        """The teacher's own answers, by a copy that the engines load for it."""
        self._take_turn("generation")
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
        self._take_turn("training" if self.teacher_shares else "teacher")
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
        self.published = None  # folded weights are other weights, though no step was taken

    def train(self, batch: Scored) -> Metrics:
        """``Student.train``, once every rank has its share of the rows."""
        self._hold(batch, training=True)
        self._take_turn("training")
        return self.student.run(work.train_held)

    def divergences(self, batch: Scored, *, with_loss: bool) -> Metrics:
        """``Student.divergences``."""
        self._hold(batch, training=False)
        self._take_turn("training")
        return self.student.run(work.divergences_held, with_loss=with_loss)

    def _hold(self, batch: Scored, *, training: bool) -> None:
        student, teacher = batch.readings.student, batch.readings.teacher
        while not all(self.student.run_all(work.hold, student, batch.rows, training, _LOST)):
            logger.warning("teacher: rows were lost with a worker; scoring again")
            batch.rows = self.score(teacher)

    def sync(self) -> Metrics:
        """All engines sample with the student's weights from here on."""
        self.version = self._training().run(work.version)
        return self._push() if self.by_vllm else self._publish()

    def _publish(self) -> Metrics:
        with self._mending:
            while True:
                if self.published is None or self.published[1] != self.version:
                    self.published = (self.student.keep(work.publish), self.version)
                if self._give(range(len(self.engines))):
                    return {"sync/megabytes": self.published[0].nbytes / 1e6}
                self.published = None

    def _give(self, ranks: Iterable[int]) -> bool:
        """These engines take the newest weights; False when those are lost, without the training group being so.

        Engines that sample ahead are not waited for: they take them after the batch they are at, before the next one.
        What became of it is heard at the next sync.
        """
        assert self.published is not None
        calls = [self.engines.submit_to(rank, work.receive, *self.published, _LOST) for rank in ranks]
        if self.recipe.distillation.max_off_policy_steps:
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

    def _push(self) -> Metrics:
        """Through vLLM's weight transfer, and probed. A lost engine breaks the connection of all."""
        with self._mending:
            while True:
                failure = "" if self.connected else self._connect()
                if not failure:
                    found, failure = self.student.run(engine_actors.push)
                    if not failure:
                        if self.turns is not None:
                            self.turns.holds("generation")  # new weights wake an engine
                        return found
                self.connected = False
                dead = [error for error in map(self._death_of, range(len(self.engines))) if error is not None]
                if not dead:
                    raise WorkerFailed("generation", 0, self.engines.slots.nodes[0].name, failure)
                for error in dead:
                    self._replace_engine(error)

    def _connect(self) -> str:
        inputs = self.inputs
        text = inputs.train.render([0], inputs.train.problems.rows[:1])[0].tokens
        vocab = inputs.student_vocab or len(inputs.tokenizer)
        workers = [devices_per_worker(self.recipe, "generation")] * len(self.engines)
        failure = self.student.run(engine_actors.connect, self.recipe, self.engines.handles, workers, text, vocab)
        self.connected = not failure
        return failure

    def _death_of(self, rank: int) -> WorkerDied | None:
        try:
            self.engines.submit_to(rank, work.alive).result()
        except WorkerDied as error:
            return error
        return None

    def export(self, path: Path) -> None:
        """``Student.export``."""
        self._training().run(Student.export, path)

    def memory(self) -> Metrics:
        """The most that one worker of a role uses."""
        found = {f"memory/{role}_gib": max(pool.gib.values()) for role, pool in self.pools.items() if pool.gib}
        for pool in self.pools.values():
            pool.gib.clear()
        return found

    def take_work(self) -> list[Work]:
        """All calls done since the last time."""
        found: list[Work] = []
        for pool in self.pools.values():
            done, pool.work[:] = list(pool.work), []
            found += done
        return found

    @property
    def sizes(self) -> dict[str, int]:
        """Workers by role."""
        return {role: len(pool) for role, pool in self.pools.items()}

    # --- losses -------------------------------------------------------------------------------------------------

    def revive(self, error: BaseException) -> None:
        """A training group that lost a rank is built anew; anything else is raised."""
        if not isinstance(error, WorkerDied) or error.role != "training":
            raise error
        with self._mending:
            self.published, self.connected = None, False  # both were the group's
            if not self.student.replaced(error):
                self._restart(self.student, error)

    def engine_lost(self, error: WorkerDied) -> None:
        """Replace an engine, and those that went with its node; they get the newest weights."""
        with self._mending:
            ranks = self._replace_engine(error)
            if ranks and self.by_vllm:
                self._push()
            elif ranks and self.published is not None and not self._give(ranks):
                self._publish()

    def _replace_engine(self, error: WorkerDied) -> list[int]:
        """The ranks that were built anew; none when that was done for another call."""
        if self.engines.replaced(error):
            return []
        self.connected = False
        return self._restart(self.engines, error, error.rank)

    def teacher_lost(self, error: WorkerDied) -> None:
        """Replace the teacher group, unless that was done for another call."""
        if self.teacher_shares:
            raise error
        with self._mending:
            if not self.teacher.replaced(error):
                self._restart(self.teacher, error)

    def _restart(self, pool: RayPool[Any], error: WorkerDied, rank: int | None = None) -> list[int]:
        self._count(pool.role, error)
        if self.turns is not None:
            self.turns.holds(pool.role)
        try:
            return pool.restart(rank, timeout=NODE_SECONDS)
        except UserError as none:
            if none.key != "cluster.num_nodes":
                raise
            # No mistake of the user's: nothing that the recipe says has changed.
            what = f"the node is gone, and {none.rule}. {none.remedy}"
            raise NodeLost(error.role, error.rank, error.node, what) from None

    def _count(self, role: str, error: WorkerDied) -> None:
        if self.closed:  # whoever collects ahead sees its workers end with the run
            raise error
        self.restarts[role] += 1
        most = self.recipe.cluster.max_restarts
        if self.restarts[role] > most:
            error.add_note(f"(the {role} role was restarted {most} times before: cluster.max_restarts={most})")
            raise error
        logger.warning(f"{error}; restart {self.restarts[role]} of at most {most}")


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

"""What the loop asks of the three roles, and how one process answers.

``Roles`` is the whole of what ``runner`` and ``validate`` know of workers. Here student, teacher and generation live in
this process on one device; ``fastkd.ray_roles`` has the same verbs over pools of actors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from fastkd.batch import Prompt, Rollout
from fastkd.checkpoint import Workers
from fastkd.context_distillation import Readings
from fastkd.driver import Inputs
from fastkd.kernels import TopK
from fastkd.metrics import Metrics
from fastkd.pools import LocalPool, local_device
from fastkd.profiling import memory_gib
from fastkd.rollout import Generation, Request
from fastkd.shared_weights import shares_student
from fastkd.student import Student
from fastkd.teacher import Teacher
from fastkd.timeline import Work

Phase = Callable[[str, str], AbstractContextManager[None]]
"""phase("sampling", "generation"): shows a bar and measures the time inside."""


@dataclass(slots=True)
class Scored:
    """The rollouts of one step with the teacher's rows: what the student trains on."""

    rollouts: Sequence[Rollout]
    readings: Readings
    """As the student and as the teacher read them."""
    rows: Sequence[TopK | None]
    """One entry per rollout; in a cluster, references to where the rows are."""
    consumed: int = 0
    """Training prompts used up to and with this step."""

    def drop_stale(self, version: int, limit: int) -> Metrics:
        """How old the rollouts are, in optimizer steps; those beyond the limit are left out of training.

        Args:
            version: optimizer steps that the student has taken.
            limit: the most that a rollout's weights may lack of them.
        """
        sampled = [rollout for rollout in self.rollouts if rollout.response]
        ages = [version - rollout.weights_version for rollout in sampled]
        if max(ages, default=0) > limit:
            # Without a response nobody asks for its rows, which may be anywhere.
            student = [
                replace(one, response=()) if version - rollout.weights_version > limit else one
                for one, rollout in zip(self.readings.student, self.rollouts, strict=True)
            ]
            self.readings = replace(self.readings, student=student)
        return {
            "rollout/staleness_mean": sum(ages) / max(len(ages), 1),
            "rollout/staleness_max": float(max(ages, default=0)),
            "rollout/dropped_stale": float(sum(age > limit for age in ages)),
        }


class Roles(Protocol):
    """Student, teacher and generation, wherever they run."""

    workers: Workers
    """How checkpoints reach the student's ranks."""

    @property
    def version(self) -> int:
        """Optimizer steps that the student had taken at the last ``sync``."""
        ...

    def collect(self, prompts: Sequence[Prompt], request: Request, phase: Phase) -> Scored:
        """Sample every prompt with the newest weights and score what was sampled."""
        ...

    def sample(self, prompts: Sequence[Prompt], request: Request, batch_size: int | None = None) -> list[Rollout]:
        """``Generation.sample``."""
        ...

    def sample_teacher(self, prompts: Sequence[Prompt], request: Request, batch_size: int) -> list[Rollout]:
        """The teacher's own answers, once per run."""
        ...

    def score(self, rollouts: Sequence[Rollout]) -> Sequence[TopK | None]:
        """``Teacher.score``."""
        ...

    def calibrate(self, rollouts: Sequence[Rollout]) -> None:
        """``Student.calibrate``; generation samples with the quantised weights from the next ``sync`` on."""
        ...

    def train(self, batch: Scored) -> Metrics:
        """``Student.train``."""
        ...

    def divergences(self, batch: Scored, *, with_loss: bool) -> Metrics:
        """``Student.divergences``."""
        ...

    def sync(self) -> Metrics:
        """Generation samples with the student's weights from here on; what it took."""
        ...

    def revive(self, error: BaseException) -> None:
        """Replace a training group that was lost; its state is that of a new student. Raises ``error`` otherwise."""
        ...

    def export(self, path: Path) -> None:
        """``Student.export``."""
        ...

    def memory(self) -> Metrics:
        """Memory in use by role, in GiB: ``memory/<role>_gib``."""
        ...

    def queues(self) -> Metrics:
        """What waited for each role since the last time, on average: ``timing/queue_<role>``, where any can."""
        ...

    @property
    def sizes(self) -> dict[str, int]:
        """Workers by role, of those whose work ``take_work`` tells."""
        ...

    def take_work(self) -> list[Work]:
        """What workers did since the last time; nothing where the loop itself is the worker."""
        ...

    def close(self) -> None:
        """End all workers."""
        ...


class LocalRoles:
    """One process, one device; the student's own tensors generate."""

    def __init__(self, inputs: Inputs):
        recipe = inputs.recipe
        self.inputs, self.recipe = inputs, recipe
        self.device = local_device(recipe.cluster)
        self.student = LocalPool("student", Student, recipe, self.device, inputs.student_vocab)
        student = self.student.worker
        shared = student if shares_student(recipe) else None
        self.teacher = LocalPool("teacher", Teacher, recipe, self.device, inputs.teacher_vocab, None, shared)
        self.generation = LocalPool(
            "generation",
            Generation.embedded,
            recipe,
            student.causal_lm,
            inputs.tokenizer,
            inputs.student_vocab,
            student.autocast_dtype,
        )
        self.workers = Workers(
            save=lambda path, asynchronous: self.student.run(Student.save, path, asynchronous),
            saved=lambda wait: self.student.run(Student.saved, wait),
            load=lambda path: self.student.run(Student.load, path),
        )

    @property
    def version(self) -> int:
        return self.student.worker.version

    def collect(self, prompts: Sequence[Prompt], request: Request, phase: Phase) -> Scored:
        with phase("sampling", "generation"):
            rollouts = self.sample(prompts, request)
        readings = self.inputs.readings(rollouts)
        with phase("scoring", "teacher"):
            return Scored(rollouts, readings, self.score(readings.teacher))

    def sample(self, prompts: Sequence[Prompt], request: Request, batch_size: int | None = None) -> list[Rollout]:
        return self.generation.run(Generation.sample, prompts, request, batch_size=batch_size)

    def sample_teacher(self, prompts: Sequence[Prompt], request: Request, batch_size: int) -> list[Rollout]:
        teacher: Any = self.teacher.worker
        pool = LocalPool(
            "generation",
            Generation.embedded,
            self.recipe,
            teacher.causal_lm,
            self.inputs.tokenizer,
            self.inputs.teacher_vocab,
            base=True,
            max_total_tokens=self.recipe.teacher.max_total_sequence_length,
        )
        return pool.run(Generation.sample, prompts, request, batch_size=batch_size)

    def score(self, rollouts: Sequence[Rollout]) -> Sequence[TopK | None]:
        return self.teacher.run(Teacher.score, rollouts)

    def calibrate(self, rollouts: Sequence[Rollout]) -> None:
        self.student.run(Student.calibrate, rollouts)

    def train(self, batch: Scored) -> Metrics:
        return self.student.run(Student.train, batch.readings.student, batch.rows)

    def divergences(self, batch: Scored, *, with_loss: bool) -> Metrics:
        return self.student.run(Student.divergences, batch.readings.student, batch.rows, with_loss=with_loss)

    def sync(self) -> Metrics:
        # The tensors are the student's own: there is nothing to move.
        self.generation.run(Generation.adopt, self.student.worker.version)
        return {}

    def revive(self, error: BaseException) -> None:
        raise error

    def export(self, path: Path) -> None:
        self.student.run(Student.export, path)

    def memory(self) -> Metrics:
        # On a GPU it is the peak since it was last asked.
        return {"memory/all_gib": memory_gib(self.device)}

    def queues(self) -> Metrics:
        return {}

    @property
    def sizes(self) -> dict[str, int]:
        return {}

    def take_work(self) -> list[Work]:
        return []

    def close(self) -> None:
        pass

"""Roles that take a known time, for bench_overlap.py: the real workers of the arithmetic models, and a wait per sample.

A node that does nothing but wait costs no processor here, so three roles can be busy at once on two cores.
"""

from __future__ import annotations

import time
from typing import Any

from fastkd import cluster_workers as real
from fastkd.rollout import Generation
from fastkd.teacher import Teacher

SECONDS = {"generation": 12.0, "teacher": 8.0, "training": 10.0}
"""Of one step, all its samples together; generation shares it among its engines."""


class SlowGeneration(Generation):
    """Waits for every rollout that it samples."""

    wait = 0.0

    def sample(self, prompts: Any, request: Any, *, batch_size: int | None = None) -> Any:
        time.sleep(self.wait * len(prompts) * request.generations)
        return Generation.sample(self, prompts, request, batch_size=batch_size)


class SlowLearner(real.Learner):
    """Waits in every step."""

    def train(self, rollouts: Any, targets: Any) -> Any:
        time.sleep(SECONDS["training"])
        return real.Learner.train(self, rollouts, targets)


def generator(seat: Any, recipe: Any, *args: Any) -> Any:
    worker = real.generator(seat, recipe, *args)
    slow = SlowGeneration(**{name: getattr(worker, name) for name in worker.__slots__ if not name.startswith("_")})
    engines = recipe.role_sizes.generation
    SlowGeneration.wait = SECONDS["generation"] * engines / recipe.distillation.batch_size
    return slow


def scorer(seat: Any, recipe: Any, *args: Any) -> Any:
    wait, score = SECONDS["teacher"] / recipe.distillation.batch_size, Teacher.score

    def slow(worker: Any, rollouts: Any) -> Any:
        """Waits for every rollout that it scores."""
        time.sleep(wait * len(rollouts))
        return score(worker, rollouts)

    Teacher.score = slow  # in this process; the pool calls the class's own function
    return real.scorer(seat, recipe, *args)


def learner(seat: Any, *args: Any) -> Any:
    worker = real.learner(seat, *args)
    worker.__class__ = SlowLearner
    return worker

"""The pool of each role that a recipe asks for: what its workers are, and what all pools are asked together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fastkd import cluster_workers as work
from fastkd import engine_actors
from fastkd.driver import Inputs
from fastkd.health import Limits
from fastkd.metrics import Metrics
from fastkd.placement import Placement
from fastkd.ray_pools import Options, RayPool
from fastkd.timeline import Work


class RolePools(dict[str, RayPool[Any]]):
    """Pools by role; ``close`` ends those that were started, whatever happened to the others.

    Each method that starts one raises UserError where a node is unhealthy or a worker rejects what the recipe gives.

    Args:
        inputs: recipe, tokenizer and vocabularies.
        placement: where the workers of each role go.
    """

    def __init__(self, inputs: Inputs, placement: Placement):
        super().__init__()
        self.inputs, self.placement = inputs, placement
        cluster = inputs.recipe.cluster
        threads = cluster.cpu_threads if cluster.device == "cpu" else None
        limits = Limits(disk_path=str(inputs.recipe.checkpointing.checkpoint_dir))
        self.group = Options(threads=threads, limits=limits)
        self.alone = Options(False, threads=threads, limits=limits)

    def training(self) -> RayPool[work.Learner]:
        """Start the training group."""
        inputs = self.inputs
        return self._start(
            "training", self.group, work.learner, inputs.recipe, inputs.student_vocab, inputs.teacher_vocab
        )

    def teacher(self) -> RayPool[Any]:
        """Start the teacher: a group, or vLLM engines."""
        recipe, vocab = self.inputs.recipe, self.inputs.teacher_vocab
        if recipe.teacher.backend == "vllm":
            count = len(self.placement.slots("teacher"))
            return self._start("teacher", self.alone, engine_actors.build_scorer, recipe, vocab, count)
        return self._start("teacher", self.group, work.scorer, recipe, vocab)

    def generation(self) -> RayPool[Any]:
        """Start the engines: vLLM's, or transformers models."""
        inputs, recipe = self.inputs, self.inputs.recipe
        if recipe.policy.generation.backend == "vllm":
            eos = inputs.tokenizer.eos_token_id
            # Weights come while it samples.
            options = replace(self.alone, at_once=engine_actors.CALLS_AT_ONCE)
            return self._start("generation", options, engine_actors.build_engine, recipe, eos, inputs.student_vocab)
        return self._start("generation", self.alone, work.generator, recipe, inputs.tokenizer, inputs.student_vocab)

    def _start(self, role: str, options: Options, build: Callable[..., Any], *args: Any) -> RayPool[Any]:
        pool = self[role] = RayPool(self.placement.slots(role), options, build, *args)
        return pool

    def memory(self) -> Metrics:
        """The most that one worker of a role uses, since it was last asked."""
        found = {f"memory/{role}_gib": max(pool.gib.values()) for role, pool in self.items() if pool.gib}
        for pool in self.values():
            pool.gib.clear()
        return found

    def take_work(self) -> list[Work]:
        """All calls done since the last time."""
        found: list[Work] = []
        for pool in self.values():
            done, pool.work[:] = list(pool.work), []
            found += done
        return found

    def close(self, *, at_once: bool = False) -> None:
        """End all workers; ``at_once``: without their own ``close``."""
        for pool in self.values():
            pool.close(at_once=at_once)

"""The loop of a rehearsal: the runner itself, with a clock around its parts and eyes on what they leave behind."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fastkd.batch import Rollout
from fastkd.checkpoint import TrainingInfo
from fastkd.log import logger
from fastkd.metrics import Metrics
from fastkd.rehearse import probes
from fastkd.rehearse.memory import PeakMemory
from fastkd.roles import Scored
from fastkd.runner import Runner
from fastkd.timeline import Work


@dataclass(slots=True)
class Stage:
    """A part of the rehearsal."""

    name: str
    seconds: float
    gib: float
    """Peak while it lasted; 0 where it is not known."""
    failed: bool = False


@dataclass(slots=True)
class Seen:
    """What was seen over both runs."""

    memory: PeakMemory
    stages: list[Stage] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What is wrong, in sentences."""
    nodes: dict[str, list[str]] = field(default_factory=dict)
    """Role → its workers' nodes, by rank."""
    degrees: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Role → (dp, cp, tp)."""
    prompts: list[list[int]] = field(default_factory=list)
    """Indices of the training prompts of every step."""
    engines: set[int] = field(default_factory=set)
    """Those that sampled."""
    weights: list[tuple[int, float]] = field(default_factory=list)
    """Version and sum of the engines' weights: after every sync."""
    saved: tuple[int, float] | None = None
    """The same when the checkpoint was written that the second run resumes from."""
    validated: int = 0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure what happens inside, and say so in a line."""
        self.memory.take()
        began, failed = time.monotonic(), True
        try:
            yield
            failed = False
        finally:
            one = Stage(name, time.monotonic() - began, self.memory.take(), failed)
            self.stages.append(one)
            logger.info(
                f"rehearsal: {name}{' FAILED' if failed else ''}, {one.seconds:.1f} s"
                + (f", {one.gib:.1f} GiB" if one.gib else "")
            )

    def expect(self, right: bool, problem: str) -> None:
        """Note a problem unless all is right."""
        if not right:
            self.problems.append(problem)


class Rehearsal(Runner):
    """``Runner`` under observation."""

    def __init__(self, *args: Any, seen: Seen, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.seen = seen
        self.pools: dict[str, Any] = getattr(self.roles, "pools", {})
        self._where()

    def _where(self) -> None:
        seen, sizes = self.seen, self.recipe.role_sizes
        seen.nodes = {role: [node.name for node in pool.slots.nodes] for role, pool in self.pools.items()}
        for role, model in (("training", self.recipe.policy), ("teacher", self.recipe.teacher)):
            if role not in self.pools:
                continue
            found = seen.degrees[role] = self.pools[role].run(probes.degrees)
            tensor, context = model.dtensor_cfg.tensor_parallel_size, model.dtensor_cfg.context_parallel_size
            devices = getattr(sizes, role)
            wanted = (devices // (tensor * context), context, tensor)
            seen.expect(found == wanted, f"{role}: the mesh is {found}, and the recipe asks for {wanted} (dp, cp, tp)")
        if self.config.resource_isolation.enabled:
            for role, nodes in seen.nodes.items():
                others = {node for other, its in seen.nodes.items() if other != role for node in its}
                shared = sorted(others & set(nodes))
                seen.expect(not shared, f"{role}: shares {', '.join(shared)} with another role")

    # --- the parts ------------------------------------------------------------------------------------------------

    def step(self) -> Metrics:
        with self.seen.stage(f"step {self.step_number + 1}"):
            found = super().step()
        self._engine_weights(f"after step {self.step_number}")
        wrong = [f"{name}={value}" for name, value in found.items() if not math.isfinite(value)]
        self.seen.expect(not wrong, f"step {self.step_number}: not finite: {', '.join(wrong)}")
        return found

    def _collect(self, step: int, sampled: Callable[[], None]) -> Scored:
        batch = super()._collect(step, sampled)
        self._sampled(step, batch.rollouts)
        return batch

    def _sampled(self, step: int, rollouts: Sequence[Rollout]) -> None:
        self.seen.prompts.append(sorted({rollout.prompt.index for rollout in rollouts}))
        self.seen.expect(
            all(rollout.response for rollout in rollouts),
            f"step {step}: a rollout has no response: all prompts are short",
        )
        if self.config.max_off_policy_steps == 0:
            versions, own = {rollout.weights_version for rollout in rollouts}, self.roles.version
            self.seen.expect(
                versions == {own},
                f"step {step}: sampled with weights of version {sorted(versions)}, the student's is {own}",
            )

    def _validate(self, *, first: bool) -> Metrics:
        with self.seen.stage(f"validate at step {self.step_number}"):
            found = super()._validate(first=first)
        self.seen.validated += 1
        return found

    def _save(self, found: Metrics, elapsed: float) -> None:
        with self.seen.stage(f"save step {self.step_number}"):
            super()._save(found, elapsed)
            self.checkpoints.finish()  # in the background or not, it is to be seen here
        self.seen.expect(
            self.step_number in self.checkpoints.steps(), f"step {self.step_number}: there is no whole checkpoint of it"
        )
        if self.seen.saved is None and self.seen.weights:
            self.seen.saved = self.seen.weights[-1]

    def _resume(self) -> TrainingInfo | None:
        again = bool(self.checkpoints.steps())
        with self.seen.stage("resume" if again else "first sync"):
            info = super()._resume()
        self._engine_weights("after the resume" if again else "at the start", first=True)
        if again:
            self._resumed(info)
        return info

    def _resumed(self, info: TrainingInfo | None) -> None:
        seen, each = self.seen, self.config.num_prompts_per_step
        if info is None:
            seen.problems.append("the second run found no checkpoint")
            return
        consumed = info.step * each
        seen.expect(
            info.consumed_prompts == consumed, f"resumed behind {info.consumed_prompts} prompts, not {consumed}"
        )
        updates = self.config.batch_size // self.recipe.policy.train_global_batch_size * info.step
        if self.pools:
            counts = set(self.pools["training"].run_all(probes.optimizer_steps))
            seen.expect(counts == {updates}, f"resumed optimizers have taken {sorted(counts)} steps, not {updates}")
        if seen.saved and seen.weights:
            seen.expect(
                math.isclose(seen.saved[1], seen.weights[-1][1], rel_tol=1e-9),
                "after the resume the engines do not have the weights that were saved",
            )

    def _engine_weights(self, when: str, *, first: bool = False) -> None:
        """Every engine has the same new weights. vLLM's are compared by the probe of every sync instead."""
        if "generation" not in self.pools or self.recipe.policy.generation.backend == "vllm":
            return
        found = self.pools["generation"].run_all(probes.engine_weights)
        self.seen.expect(len(set(found)) == 1, f"{when}: the engines do not all have the same weights")
        version, total = found[0]
        self.seen.expect(
            version == self.roles.version,
            f"{when}: engines are at version {version}, the student at {self.roles.version}",
        )
        if not first and self.seen.weights:
            self.seen.expect(total != self.seen.weights[-1][1], f"{when}: the engines' weights did not change")
        self.seen.weights.append((version, total))

    def _trace(self) -> list[Work]:
        done = super()._trace()
        self.seen.engines |= {one.rank for one in done if one.role == "generation" and one.name == "sample"}
        return done

    def _finish(self) -> None:
        with self.seen.stage("export"):
            self.folder.replace("export", self._export)
        files = list((self.folder.path / "export").glob("*.safetensors"))
        self.seen.expect(bool(files), "the export holds no safetensors")
        self.folder.write_summary({"steps": self.step_number})

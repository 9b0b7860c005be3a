"""What to turn when a role does not fit, in the order in which the runbook says to: each with the figure it leads to.

Engines first get fewer sequences (``generation_batch_size``), then less of the device (``gpu_memory_utilization``),
then smaller validations. Training recomputes, updates without temporaries, cuts micro-batches, spreads over more ranks,
and at last takes host memory or more nodes. Knobs are turned one after another, each with the ones before it left
turned; those that would gain nothing are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastkd.config import Policy, Teacher
from fastkd.plan.assemble import Plan
from fastkd.plan.changes import changed, legal, value_of, yaml_value
from fastkd.plan.layout import RoleName

FIRST = 3
"""Knobs that are always shown; more follow until it fits."""
MOST = 6


@dataclass(frozen=True, slots=True)
class Knob:
    """One key to turn."""

    key: str
    value: Any
    """None: turning it gains nothing here."""
    note: str
    total: float
    """Bytes on the role's device then, this and the knobs before it turned."""
    fits: bool

    @property
    def override(self) -> str:
        """For the command line."""
        return f"{self.key}={yaml_value(self.value)}"


def knobs(plan: Plan, role: RoleName) -> list[Knob]:
    """The first knobs for a role that does not fit, at least ``FIRST`` of them, and more until it fits."""
    found: list[Knob] = []
    now = plan
    fitted = False
    for key, value, note in _candidates(plan, role):
        if len(found) >= (FIRST if fitted else MOST):
            break
        if value is None:  # in the runbook's order all the same
            found.append(Knob(key, None, note, _total(now, role), role not in now.tight))
            continue
        after = changed(now, _with_nodes(now, key, _best(now, key, value, role)))
        if not legal(after):
            continue
        if _total(after, role) >= _total(now, role) and not (after.fits and not now.fits):
            continue
        now, fitted = after, role not in after.tight
        found.append(Knob(key, value_of(now.layout.recipe, key), note, _total(now, role), fitted))
    return found


def _with_nodes(plan: Plan, key: str, value: Any) -> dict[str, Any]:
    """A role's nodes are more of the cluster's."""
    if not key.endswith(".num_nodes"):
        return {key: value}
    recipe = plan.layout.recipe
    return {key: value, "cluster.num_nodes": recipe.cluster.num_nodes + value - value_of(recipe, key)}


def _total(plan: Plan, role: RoleName) -> float:
    return plan.used(next(pool for pool in plan.layout.pools if role in pool))


def _candidates(plan: Plan, role: RoleName) -> Iterator[tuple[str, Any, str]]:
    """(key, value, what it does). A tuple of values: the first that fits."""
    recipe, layout = plan.layout.recipe, plan.layout
    pool = next(pool for pool in layout.pools if role in pool)
    if "generation" in pool:
        yield from _generation(plan)
    if "training" in pool:
        yield from _sharded("policy", recipe.policy, layout.train.devices, training=True)
    if "teacher" in pool and layout.teacher_engines is not None:
        yield from _teacher_engine(plan, beside_generation="generation" in pool)
    elif "teacher" in pool:
        yield from _sharded("teacher", recipe.teacher, layout.score.devices, training=False)
    if recipe.distillation.resource_isolation.enabled:
        where = f"distillation.resource_isolation.roles.{role}.num_nodes"
        nodes = value_of(recipe, where)
        yield where, tuple(nodes * factor for factor in (2, 3, 4)), "and cluster.num_nodes with it"


def _generation(plan: Plan) -> Iterator[tuple[str, Any, str]]:
    recipe = plan.layout.recipe
    policy, engine = recipe.policy, recipe.policy.generation.vllm_cfg
    vllm = policy.generation.backend == "vllm"
    if vllm:
        yield "policy.generation_batch_size", None, "not read with backend vllm, whose engines schedule by themselves"
        yield _engine_share(plan, plan.short("generation"))
        yield "distillation.val_batch_size", None, "no effect with backend vllm: its cache is as large either way"
        values = tuple(size for size in (2, 4, 8) if size > engine.tensor_parallel_size)
        yield "policy.generation.vllm_cfg.tensor_parallel_size", values, "GPUs that share an engine's weights and cache"
        yield "policy.generation.vllm_cfg.max_model_len", None, "not below policy.max_total_sequence_length"
        return
    yield "policy.generation_batch_size", _halves(policy.generation_batch_size), "rows decoded together"
    yield "policy.generation.vllm_cfg.gpu_memory_utilization", None, "read with backend vllm alone"
    yield (
        "distillation.val_batch_size",
        _halves(recipe.distillation.val_batch_size),
        "rows decoded together in validation",
    )


def _teacher_engine(plan: Plan, *, beside_generation: bool) -> Iterator[tuple[str, Any, str]]:
    """Of a teacher in vLLM; its share of the device is the key of generation's engines."""
    engines = plan.layout.score
    if not (beside_generation and plan.layout.recipe.policy.generation.backend == "vllm"):
        yield _engine_share(plan, plan.short("teacher"))
    values = tuple(size for size in (2, 4, 8) if size > engines.tp and engines.devices % size == 0)
    if values:
        yield "teacher.dtensor_cfg.tensor_parallel_size", values, "GPUs that share an engine's weights and cache"


def _engine_share(plan: Plan, short: bool) -> tuple[str, Any, str]:
    share = plan.layout.recipe.policy.generation.vllm_cfg.gpu_memory_utilization
    steps = range(10, 100, 5) if short else range(95, 5, -5)  # up, or down
    values = tuple(step / 100 for step in steps if (step / 100 > share) is short)
    return "policy.generation.vllm_cfg.gpu_memory_utilization", values, "an engine's share of the device"


def _sharded(name: str, model: Teacher, devices: int, *, training: bool) -> Iterator[tuple[str, Any, str]]:
    sharding, where = model.dtensor_cfg, f"{name}.dtensor_cfg"
    if training and not sharding.activation_checkpointing:
        yield f"{where}.activation_checkpointing", True, "blocks run again in backward instead of keeping activations"
    if training and isinstance(model, Policy) and model.optimizer.name.lower().endswith(("adam", "adamw")):
        yield "policy.optimizer.kwargs.fused", True, "updates without a copy of the second moments"
    budget = model.train_mb_tokens if training else model.logprob_mb_tokens
    longest = model.max_total_sequence_length
    kind = "sequence_packing" if model.sequence_packing.enabled else "dynamic_batching"
    field = "train_mb_tokens" if training else "logprob_mb_tokens"
    if budget is not None and budget > longest:
        yield f"{name}.{kind}.{field}", longest, "tokens of a micro-batch; the longest sequence must fit"
    elif budget is None:
        size = "train_micro_batch_size" if training else "logprob_batch_size"
        if getattr(model, size) > 1:
            yield f"{name}.{size}", 1, "sequences of a micro-batch"
    if sharding.tensor_parallel_size > 1 and not sharding.sequence_parallel:
        yield f"{where}.sequence_parallel", True, "norms and residuals by tokens"
    for key, note in (
        ("tensor_parallel_size", "GPUs that split every layer"),
        ("context_parallel_size", "GPUs that split every sequence"),
    ):
        most = devices // (sharding.tensor_parallel_size * sharding.context_parallel_size)
        now = getattr(sharding, key)
        values = tuple(now * factor for factor in (2, 4, 8) if factor <= most)
        if values:
            yield f"{where}.{key}", values, note
    if devices > 1 and not sharding.cpu_offload:
        yield f"{where}.cpu_offload", True, "weights and optimizer in host memory: fits, and is slow"


def _best(plan: Plan, key: str, value: Any, role: RoleName) -> Any:
    """Of several values the first that fits, else the one that needs least."""
    if not isinstance(value, tuple):
        return value
    tried = [(one, changed(plan, {key: one})) for one in value]
    tried = [(one, after) for one, after in tried if legal(after)]
    for one, after in tried:
        if role not in after.tight:
            return one
    if not tried:
        return value_of(plan.layout.recipe, key)
    return min(tried, key=lambda pair: _total(pair[1], role))[0]


def _halves(number: int) -> tuple[int, ...]:
    found = []
    while number > 1:
        number //= 2
        found.append(number)
    return tuple(found)

"""Other splits of the same nodes over the roles, and other tensor degrees, by predicted step time.

Every role is planned for every number of devices it could have; a role's best degree does not depend on the others, so
only the numbers are combined. What does not fit, or does not divide, is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastkd.plan.assemble import Plan
from fastkd.plan.changes import changed, legal, value_of, yaml_value
from fastkd.plan.layout import RoleName
from fastkd.plan.shapes import legal_tensor_degree

DEGREES = (1, 2, 4, 8, 16)
_KEYS: dict[RoleName, str] = {
    "training": "policy.dtensor_cfg.tensor_parallel_size",
    "generation": "policy.generation.vllm_cfg.tensor_parallel_size",
    "teacher": "teacher.dtensor_cfg.tensor_parallel_size",
}


@dataclass(frozen=True)
class Proposal:
    """A split, as changes of the recipe."""

    changes: dict[str, Any]
    """Only keys whose value differs."""
    plan: Plan

    @property
    def overrides(self) -> list[str]:
        """For the command line."""
        return [f"{key}={yaml_value(value)}" for key, value in self.changes.items()]


def better_splits(plan: Plan, most: int = 5) -> list[Proposal]:
    """The fastest splits that fit, best first; only those faster than the plan, or any when the plan does not fit."""
    found: list[Proposal] = []
    seen: set[tuple[str, ...]] = set()
    for shares in _shares(plan):
        changes = dict(shares)
        at_shares = changed(plan, changes)
        for role in _KEYS:
            degree = _best_degree(at_shares, role)
            if degree is None:
                break
            changes[_KEYS[role]] = degree
        else:
            proposal = Proposal(_differing(plan, changes), changed(plan, changes))
            name = tuple(sorted(proposal.overrides))
            if name in seen or not name or not proposal.plan.fits or not legal(proposal.plan):
                continue
            seen.add(name)
            if not plan.fits or proposal.plan.step_seconds < 0.99 * plan.step_seconds:
                found.append(proposal)
    return sorted(found, key=lambda one: (one.plan.step_seconds, len(one.changes)))[:most]


def _shares(plan: Plan) -> Iterator[dict[str, Any]]:
    """Every way to deal the nodes (or the one node's GPUs) to the roles, in the recipe's own mode."""
    recipe = plan.layout.recipe
    nodes, per_node = recipe.cluster.num_nodes, max(recipe.cluster.gpus_per_node, 1)
    if recipe.distillation.resource_isolation.enabled:
        where = "distillation.resource_isolation.roles"
        for training in range(1, nodes - 1):
            for generation in range(1, nodes - training):
                yield {
                    f"{where}.training.num_nodes": training,
                    f"{where}.generation.num_nodes": generation,
                    f"{where}.teacher.num_nodes": nodes - training - generation,
                }
    elif recipe.policy.generation.colocated.enabled:
        yield {}
    else:
        where = "policy.generation.colocated.resources"
        key, most = (f"{where}.num_nodes", nodes) if nodes > 1 else (f"{where}.gpus_per_node", per_node)
        for apart in range(1, most):
            yield {key: apart}


def _best_degree(plan: Plan, role: RoleName) -> int | None:
    """The fastest tensor degree with which a role fits alone; None: there is none."""
    layout = plan.layout
    key, shape = _KEYS[role], layout.teacher if role == "teacher" else layout.student
    now = value_of(layout.recipe, key)
    if role == "generation" and layout.recipe.policy.generation.backend != "vllm":
        return now
    if role == "teacher" and layout.teacher_shares_weights:
        return value_of(layout.recipe, _KEYS["training"]) if layout.devices("training") else None
    per_node = layout.train.per_node
    best: tuple[float, int] | None = None
    for degree in sorted({*DEGREES, now}):
        if degree > max(per_node, now) or not legal_tensor_degree(shape, degree):
            continue
        if role == "generation" and layout.pools == [("training", "generation", "teacher")] and degree > 1:
            continue  # an engine that shares its GPU is one GPU wide
        if role == "teacher" and layout.teacher_engines is not None:
            apart = layout.recipe.distillation.resource_isolation.enabled
            if per_node % degree or (degree > 1 and not apart):
                continue
        tried = changed(plan, {key: degree})
        mesh = tried.layout.score if role == "teacher" else tried.layout.train
        if role == "generation":
            engines = tried.layout.engines
            whole = engines.devices == engines.count * engines.tp * engines.pp
        else:
            whole = mesh.devices == mesh.tp * mesh.cp * mesh.dp
        if role == "training":
            loop, policy = layout.recipe.distillation, layout.recipe.policy
            whole = whole and loop.batch_size % mesh.dp == 0 and policy.train_global_batch_size % mesh.dp == 0
        if not whole or tried.short(role) or tried.memory[role].total > tried.capacity:
            continue
        seconds = tried.time[role].seconds
        if best is None or seconds < best[0] * 0.999:
            best = (seconds, degree)
    return None if best is None else best[1]


def _differing(plan: Plan, changes: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in changes.items() if value_of(plan.layout.recipe, key) != value}

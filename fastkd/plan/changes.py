"""A plan of the same recipe with some keys changed: what knobs and other splits are judged by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from fastkd.config import Recipe
from fastkd.plan.assemble import Plan
from fastkd.plan.layout import arrange
from fastkd.plan.shapes import legal_tensor_degree


def changed(plan: Plan, changes: Mapping[str, Any]) -> Plan:
    """The plan after setting recipe keys.

    Args:
        changes: full key → value. Nothing is validated: give legal values.
    """
    layout = plan.layout
    recipe = layout.recipe
    for key, value in changes.items():
        recipe = _set(recipe, key.split("."), value)
    return Plan(arrange(recipe, layout.rates, layout.student, layout.teacher))


def value_of(recipe: Recipe, key: str) -> Any:
    """What a key has now."""
    found: Any = recipe
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else getattr(found, part)
    return found


def _set(section: Any, parts: list[str], value: Any) -> Any:
    if isinstance(section, Mapping):  # keyword arguments
        assert len(parts) == 1, parts
        return {**section, parts[0]: value}
    assert isinstance(section, BaseModel), parts
    inner = value if len(parts) == 1 else _set(getattr(section, parts[0]), parts[1:], value)
    return section.model_copy(update={parts[0]: inner})


def legal(plan: Plan) -> bool:
    """Whether a plan's degrees divide its devices, its batch and its models."""
    layout, recipe = plan.layout, plan.layout.recipe
    loop, policy = recipe.distillation, recipe.policy
    for mesh, shape in ((layout.train, layout.student), (layout.score, layout.teacher)):
        if mesh.devices < 1 or mesh.devices != mesh.tp * mesh.cp * mesh.dp or not legal_tensor_degree(shape, mesh.tp):
            return False
    if loop.batch_size % layout.train.dp or policy.train_global_batch_size % layout.train.dp:
        return False
    engines = layout.engines
    return engines.devices == engines.count * engines.tp * engines.pp and legal_tensor_degree(
        layout.student, engines.tp
    )


def yaml_value(value: Any) -> str:
    """As an override writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)

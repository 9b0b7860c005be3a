"""Interpolations: OmegaConf's ``${a.b}`` and ``${..a}``, and the arithmetic add, mul, div and max."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fastkd.errors import RecipeError

_ABSENT: Any = object()


def _divide(left: Any, right: Any) -> Any:
    # Whole when it can be: a token budget must stay a whole number.
    exact = isinstance(left, int) and isinstance(right, int) and left % right == 0
    return left // right if exact else left / right


_RESOLVERS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda left, right: left + right,
    "mul": lambda left, right: left * right,
    "div": _divide,
    "max": lambda left, right: max(left, right),
}


def resolve(tree: dict[str, Any]) -> tuple[dict[str, Any], list[RecipeError]]:
    """Plain data with every interpolation resolved, and an error for each that cannot be. ``???`` is
    absent."""
    for name, function in _RESOLVERS.items():
        OmegaConf.register_resolver(name, function, replace=True)
    errors: list[RecipeError] = []

    def visit(node: Any, prefix: str) -> Any:
        if isinstance(node, DictConfig):
            entries = {key: get(node, key, f"{prefix}{key}") for key in node}
            return {str(key): value for key, value in entries.items() if value is not _ABSENT}
        if isinstance(node, ListConfig):
            entries = [get(node, index, f"{prefix}{index}") for index in range(len(node))]
            return [value for value in entries if value is not _ABSENT]
        return node

    def get(node: Any, key: Any, name: str) -> Any:
        if OmegaConf.is_missing(node, key):
            return _ABSENT
        try:
            return visit(node[key], f"{name}.")
        except (OmegaConfBaseException, RecursionError) as error:
            raw = OmegaConf.to_container(node, resolve=False)
            reason = str(error).splitlines()[0] if not isinstance(error, RecursionError) else "it refers to itself"
            errors.append(
                RecipeError(
                    name,
                    f"the interpolation cannot be resolved: {reason}",
                    "Refer to a key of the recipe by its full name, ${policy.model_name}, or relatively, ${..name}",
                    value=raw[key] if isinstance(raw, (dict, list)) else raw,
                )
            )
            return _ABSENT

    return visit(OmegaConf.create(tree), ""), errors


def escape(value: Any) -> Any:
    """A literal "${" in resolved text was escaped in the source; without its backslash it would resolve
    again."""
    if isinstance(value, dict):
        return {key: escape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [escape(item) for item in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value

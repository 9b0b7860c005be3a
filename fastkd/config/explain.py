"""Validation failures as sentences: key, value, the rule it breaks, and what to write instead."""

from __future__ import annotations

import difflib
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

from fastkd.config.base import section_of
from fastkd.config.names import find, nearest, siblings_of
from fastkd.errors import RecipeError

_WORDS = {
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "list_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
    "model_attributes_type": "must be a mapping",
    "missing": "is required",
    "string_too_short": "must not be empty",
    "too_short": "must name at least one",
}
_HINTS = {
    "string_type": "Put it in quotes",
    "list_type": "Write [a, b]",
    "dict_type": "Write the keys below it, indented",
    "model_type": "Write the keys below it, indented",
    "model_attributes_type": "Write the keys below it, indented",
}


def unknown_key(name: str) -> RecipeError:
    """The error for a key that is neither in the tree nor in the table of ignored keys."""
    suggestion = nearest(name)
    if suggestion:
        return RecipeError(name, "unknown key", f"Did you mean {suggestion}?")
    beside = siblings_of(name)
    return RecipeError(name, "unknown key", f"Valid keys here: {', '.join(beside)}" if beside else "Remove it")


def explain(error: ValidationError, raw: dict[str, Any]) -> list[RecipeError]:
    """One RecipeError per problem; `raw` is the mapping that was validated (to name keys as the user wrote
    them)."""
    problems = [_explain(detail, raw) for detail in error.errors(include_url=False)]
    # A union reports every arm it tried; the first says enough.
    return list({problem.key: problem for problem in reversed(problems)}.values())[::-1]


def _explain(detail: ErrorDetails, raw: dict[str, Any]) -> RecipeError:
    parts = _parts(detail, raw)
    name, kind, value, context = ".".join(parts), detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "recipe_rule":
        name = f"{name}.{context['key']}" if context["key"] else name
        shown = {"value": context["value"]} if "value" in context else {}
        return RecipeError(name, context["rule"], context["remedy"], **shown)
    if kind == "extra_forbidden":
        return unknown_key(name)
    if kind == "missing":
        return RecipeError(name, "is required", f"Write {name}: ... in the recipe, or give {name}=... as an override")
    shown = {} if isinstance(value, (dict, list)) or len(repr(value)) > 200 else {"value": value}
    return RecipeError(name, _rule(kind, parts, context, detail["msg"]), _remedy(kind, parts, value), **shown)


def _parts(detail: ErrorDetails, raw: dict[str, Any]) -> list[str]:
    """The key's path. Tags of union arms are dropped, and the index of a list that the user wrote as one
    mapping."""
    parts: list[str] = []
    node: Any = raw
    for part in detail["loc"]:
        if isinstance(node, dict) and isinstance(part, str) and (part in node or find([*parts, part]) is not None):
            node = node.get(part)
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
        else:
            continue
        parts.append(str(part))
    return parts


def _rule(kind: str, parts: list[str], context: dict[str, Any], fallback: str) -> str:
    if kind == "literal_error":
        return f"must be one of {', '.join(str(choice) for choice in _choices(parts))}"
    bounds = {"greater_than": ("gt", "above"), "greater_than_equal": ("ge", "at least")}
    bounds |= {"less_than": ("lt", "below"), "less_than_equal": ("le", "at most")}
    if kind in bounds:
        word, relation = bounds[kind]
        return f"must be {relation} {context[word]:g}"
    if kind == "string_pattern_mismatch":
        return "does not have the right form"
    return _WORDS.get(kind, fallback)


def _remedy(kind: str, parts: list[str], value: Any) -> str:
    field = find(parts)
    if kind == "literal_error" and isinstance(value, str):
        words = [choice for choice in _choices(parts) if isinstance(choice, str)]
        if close := difflib.get_close_matches(value.lower(), words, n=1, cutoff=0.5):
            return f"Did you mean {close[0]}?"
    hint = _HINTS.get(kind, "")
    if field is None:
        return hint
    if kind == "string_pattern_mismatch" or not hint:
        hint = " ".join((field.description or "").split())
    if section_of(field.annotation) is not None:
        return hint
    default = field.get_default(call_default_factory=True)
    if default not in (PydanticUndefined, None, [], {}):
        spelt = str(default).lower() if isinstance(default, bool) else default
        hint = f"{hint.rstrip('.')}. Default: {spelt}" if hint else f"Default: {spelt}"
    return hint


def _choices(parts: list[str]) -> list[Any]:
    """The words of a Literal field, also inside ``Literal[...] | None``."""
    field = find(parts)

    def leaves(annotation: Any) -> list[Any]:
        arms = get_args(annotation)
        if not arms:
            return [annotation] if not isinstance(annotation, type) else []
        return [leaf for arm in arms for leaf in leaves(arm)]

    return leaves(field.annotation) if field is not None else []

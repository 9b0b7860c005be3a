"""Names of keys: which exist, what type each has, and which one a misspelt name was meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from fastkd.config import Recipe
from fastkd.config.base import Section, items_of, section_of
from fastkd.config.ignored import IgnoredKey, ignored_names, reason_ignored


class Key(NamedTuple):
    """One key of the tree: its full name, its field, and the section that holds it."""

    name: str
    field: FieldInfo
    owner: type[Section]


def keys(kind: type[Section] = Recipe, prefix: str = "") -> Iterator[Key]:
    """Every key of the tree depth first, in the order of the source; items of lists without an index."""
    for name, field in kind.model_fields.items():
        yield Key(prefix + name, field, kind)
        inner = section_of(field.annotation) or items_of(field.annotation)
        if inner is not None:
            yield from keys(inner, f"{prefix}{name}.")


@cache
def _valid_names() -> tuple[str, ...]:
    return (*(key.name for key in keys()), *ignored_names())


def find(parts: list[str]) -> FieldInfo | None:
    """The field at a path (list indices are skipped); None when unknown or inside a free mapping."""
    kind: type[Section] | None = Recipe
    field: FieldInfo | None = None
    for part in parts:
        if part.isdigit() and field is not None and items_of(field.annotation):
            continue
        if kind is None or part not in kind.model_fields:
            return None
        field = kind.model_fields[part]
        kind = section_of(field.annotation) or items_of(field.annotation)
    return field


def scalars(annotation: Any) -> set[type]:
    """The scalar types a field accepts: ``int | None`` gives {int, NoneType}, a choice of words gives
    {str}."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return scalars(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return set().union(*(scalars(arm) for arm in get_args(annotation)))
    if origin is Literal:
        return {type(choice) for choice in get_args(annotation)}
    return {annotation} if annotation in (str, int, float, bool, NoneType) else {object}


def classify(tree: dict[str, Any]) -> tuple[list[IgnoredKey], list[str]]:
    """(ignored keys, unknown full names) of a recipe mapping. Values that are not mappings are not
    entered."""
    ignored: list[IgnoredKey] = []
    unknown: list[str] = []

    def visit(node: Any, kind: type[Section], prefix: str) -> None:
        if not isinstance(node, dict):
            return
        for raw, value in node.items():
            key = str(raw)
            name = prefix + key
            if key in kind.model_fields:
                field = kind.model_fields[key]
                inner, item = section_of(field.annotation), items_of(field.annotation)
                if inner is not None:
                    visit(value, inner, f"{name}.")
                elif item is not None and isinstance(value, list):
                    for position, entry in enumerate(value):
                        visit(entry, item, f"{name}.{position}.")
                elif item is not None:
                    visit(value, item, f"{name}.")
            elif reason := reason_ignored(_without_indices(name)):
                ignored.append(IgnoredKey(name, value, reason))
            else:
                unknown.append(name)

    visit(tree, Recipe, "")
    return ignored, unknown


def nearest(name: str) -> str | None:
    """The valid full name most like a misspelt one: a sibling, else the same last part elsewhere, else
    any."""
    head, _, leaf = name.rpartition(".")
    bare = _without_indices(head)
    siblings = [one.rpartition(".")[2] for one in _valid_names() if one.rpartition(".")[0] == bare]
    if close := difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.6):
        return f"{head}.{close[0]}".lstrip(".")
    full = _without_indices(name)
    elsewhere = [one for one in _valid_names() if one.rpartition(".")[2] == leaf]
    if elsewhere:
        return max(elsewhere, key=lambda one: difflib.SequenceMatcher(None, full, one).ratio())
    close = difflib.get_close_matches(full, _valid_names(), n=1, cutoff=0.8)
    return close[0] if close else None


def siblings_of(name: str) -> list[str]:
    """The valid keys beside a name, for an error that has no near match."""
    parent = _without_indices(name).rpartition(".")[0]
    return [key.name.rpartition(".")[2] for key in keys() if key.name.rpartition(".")[0] == parent]


def _without_indices(name: str) -> str:
    return ".".join(part for part in name.split(".") if not part.isdigit())

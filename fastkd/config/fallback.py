"""Keys that are absent: the teacher's come from the student, a dataset's from ``data.default``, the rest by default.

Works on the merged mapping before interpolations resolve: a relative one (``tokenizer.name: ${..model_name}``) that
is copied from ``policy`` to ``teacher`` follows the teacher's own name, as it does with YAML anchors.
"""

from __future__ import annotations

import copy
from typing import Any

from fastkd.config import Dataset, Teacher
from fastkd.config.base import Section, default_tree, section_of
from fastkd.config.inherit import merge

_ONCE_UNDER_DATA = ("prompt_file", "system_prompt_file", "env_name", "processor")


def older_layout(tree: dict[str, Any]) -> None:
    """Keys that recipes once had directly under ``data`` go to ``data.default``, in place; what is there stays."""
    data = tree.get("data")
    if isinstance(data, dict) and (found := [key for key in _ONCE_UNDER_DATA if key in data]):
        if data.get("default") is None:
            data["default"] = {}
        if isinstance(data["default"], dict):
            for key in found:
                data["default"].setdefault(key, data.pop(key))


def fall_back(tree: dict[str, Any], without: list[str]) -> set[str]:
    """Fill absent keys of the teacher and of every dataset in place; returns the full names of those filled.

    `without`: names (ignored or unknown) that are not passed on.
    """
    source = copy.deepcopy(tree)
    for name in without:
        remove(source, name)
    remove(source, "policy.dtensor_cfg.lora_cfg")  # adapters belong to the student
    filled: set[str] = set()

    # The name of the teacher never falls back: a forgotten one would distil the student into itself, unnoticed.
    policy = {key: value for key, value in _mapping(source.get("policy")).items() if key != "model_name"}
    if tree.get("teacher") is None:
        tree["teacher"] = {}
    _fill(tree["teacher"], policy, Teacher, "teacher", filled)

    data = tree.get("data")
    if isinstance(data, dict):
        default = _mapping(_mapping(source.get("data")).get("default"))
        for name in ("train", "validation"):
            if isinstance(data.get(name), list):
                for position, entry in enumerate(data[name]):
                    _fill(entry, default, Dataset, f"data.{name}.{position}", filled)
            else:
                _fill(data.get(name), default, Dataset, f"data.{name}", filled)
    return filled


def _fill(target: Any, source: dict[str, Any], kind: type[Section], where: str, filled: set[str]) -> None:
    if not isinstance(target, dict):
        return
    for name, field in kind.model_fields.items():
        inner = section_of(field.annotation)
        absent = name not in target or (inner is not None and target[name] is None)
        if name in source and absent:
            target[name] = copy.deepcopy(source[name])
            filled.add(f"{where}.{name}")
        elif inner is not None and isinstance(source.get(name), dict):
            _fill(target[name], source[name], inner, f"{where}.{name}", filled)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def over_defaults(defaults: dict[str, Any], tree: Any, kind: type[Section]) -> Any:
    """The user's mapping over the defaults. ``null`` for a section means: as if it were not written."""
    if tree is None:
        return defaults
    if not isinstance(tree, dict):
        return tree
    merged = dict(defaults)
    for key, value in tree.items():
        field = kind.model_fields.get(key)
        inner = section_of(field.annotation) if field is not None else None
        if inner is not None:
            merged[key] = over_defaults(default_tree(inner) if key not in defaults else defaults[key], value, inner)
        else:
            merged[key] = merge(defaults.get(key), value)
    return merged


def remove(tree: Any, name: str) -> None:
    """Delete a key by its full name (list indices included), if it is there."""
    *parents, leaf = name.split(".")
    for part in parents:
        tree = tree[int(part)] if isinstance(tree, list) else tree.get(part) if isinstance(tree, dict) else None
    if isinstance(tree, dict):
        tree.pop(leaf, None)


def is_written(name: str, tree: Any, filled: set[str]) -> bool:
    """Whether the user wrote this key, rather than a fallback or a default."""
    if any(name == one or name.startswith(f"{one}.") for one in filled):
        return False
    for part in name.split("."):
        if isinstance(tree, list) and part.isdigit() and int(part) < len(tree):
            tree = tree[int(part)]
        elif isinstance(tree, dict) and part in tree:
            tree = tree[part]
        else:
            # Below an interpolation or a scalar the text is the user's own.
            return isinstance(tree, str)
    return True

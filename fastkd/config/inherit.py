"""Recipe files: YAML with line numbers in its errors, and ``defaults:`` inheritance.

``defaults:`` is a path or a list of paths relative to the file that names them. Parents are read depth
first and merged left to right, then the child over them: mappings merge, lists and scalars are replaced. A
top-level mapping that holds ``_override_: true`` replaces its parent's whole. Anchors and merge keys (``<<:
*POLICY``) are YAML's own and work within one file.
"""

from __future__ import annotations

import copy
import difflib
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fastkd.errors import RecipeError


def merge(base: Any, over: Any) -> Any:
    """`over` laid on `base`: mappings merge key by key, anything else replaces. Neither argument is
    changed."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return copy.deepcopy(over)
    merged = copy.deepcopy(base)
    for key, value in over.items():
        merged[key] = merge(merged[key], value) if key in merged else copy.deepcopy(value)
    return merged


def read_recipe(path: Path) -> tuple[dict[str, Any], list[Path]]:
    """The merged mapping of a recipe and its parents, interpolations unresolved, and every file read.

    The recipe itself comes first in the list. Raises RecipeError for a missing file, a circular chain, or
    malformed YAML (with the line).
    """
    files: list[Path] = []
    return _read(path, (), files), files


def _read(path: Path, chain: tuple[Path, ...], files: list[Path]) -> dict[str, Any]:
    where = path.expanduser().resolve()
    if where in chain:
        names = " -> ".join(_short(one) for one in (*chain[chain.index(where) :], where))
        raise RecipeError("defaults", f"the files inherit from each other in a circle: {names}", "Remove one link")
    tree = _load_yaml(path, chain)
    if where not in files:
        files.append(where)

    parents = tree.pop("defaults", None) or []
    if isinstance(parents, str):
        parents = [parents]
    if not isinstance(parents, list) or not all(isinstance(one, str) for one in parents):
        raise RecipeError(
            f"{_short(path)}: defaults",
            "must be a path or a list of paths",
            "Write defaults: parent.yaml",
            value=parents,
        )
    merged: dict[str, Any] = {}
    for parent in parents:
        merged = merge(merged, _read(path.parent / Path(parent).expanduser(), (*chain, where), files))
    for key, value in tree.items():
        if isinstance(value, dict) and value.pop("_override_", False):
            merged.pop(key, None)
    return merge(merged, tree)


def _load_yaml(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    if not path.is_file():
        named_by = f" (named by defaults of {_short(chain[-1])})" if chain else ""
        rule = f"is a folder, not a recipe file{named_by}" if path.is_dir() else f"no such file{named_by}"
        raise RecipeError(str(path), rule, _similar_file(path))
    try:
        config = OmegaConf.load(path)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = " ".join((error.problem or error.context or "it cannot be read").split())
        raise RecipeError(
            f"{_short(path)}{line}",
            f"not valid YAML: {problem}",
            "Check indentation, quotes and colons there",
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException, OSError) as error:
        problem = " ".join(str(error).split())
        raise RecipeError(_short(path), f"cannot be read as YAML: {problem}", "Give a UTF-8 text file") from None
    tree = OmegaConf.to_container(config, resolve=False)
    if not isinstance(tree, dict):
        raise RecipeError(_short(path), "a recipe is a mapping of keys", "Start with policy: and teacher:")
    return {str(key): value for key, value in tree.items()}


def _short(path: Path) -> str:
    """The path as the user would type it: relative to the current folder when it lies below it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _similar_file(path: Path) -> str:
    siblings = sorted(path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, [one.name for one in siblings], n=1)
    if close:
        return f"Did you mean {path.parent / close[0]}?"
    if siblings:
        return f"Recipes in {path.parent}: {', '.join(one.name for one in siblings[:8])}"
    return "Give the path of a recipe, for example recipes/distillation_math.yaml"

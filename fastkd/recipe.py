"""YAML to Recipe: files, overrides, fallbacks, interpolation and validation, every problem reported at once.

The order is fixed: parents and file are merged; overrides apply; unknown and ignored keys are found;
``teacher`` falls back to ``policy`` and every dataset to ``data.default``; the tree's defaults go
underneath; interpolations resolve; the typed tree validates. Fallback copies interpolations unresolved, so
that a relative one (``tokenizer.name: ${..model_name}``) follows the section it lands in, as it does with
YAML anchors.

Imports neither torch nor transformers nor numpy: ``--check`` must answer at once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from fastkd.config import Dataset, Recipe, Teacher
from fastkd.config.base import Section, default_tree, section_of
from fastkd.config.explain import explain, unknown_key
from fastkd.config.ignored import IgnoredKey
from fastkd.config.inherit import merge, read_recipe
from fastkd.config.names import classify
from fastkd.config.overrides import apply_overrides
from fastkd.errors import RecipeError, RecipeErrors
from fastkd.files import write_text

__all__ = ["IgnoredKey", "LoadedRecipe", "load_recipe", "recipe_from", "resolve_path"]


@dataclass(frozen=True)
class LoadedRecipe:
    """A validated recipe with what one may want to know about its loading."""

    recipe: Recipe
    """The typed tree."""
    ignored: list[IgnoredKey]
    """Keys without effect here, each with the reason."""
    resolved: dict[str, Any]
    """The whole recipe as plain data: defaults filled in, interpolations resolved, ignored keys left out."""
    path: Path
    """The recipe file."""
    folders: tuple[Path, ...] = ()
    """Where relative paths are looked up after the current folder: the recipe's, then its parents'."""

    def locate(self, name: str) -> str:
        """`resolve_path` with this recipe's folders."""
        return resolve_path(name, *self.folders)

    def to_yaml(self) -> str:
        """The resolved recipe as YAML text; loading it gives an equal Recipe."""
        return OmegaConf.to_yaml(OmegaConf.create(_escape(self.resolved)))

    def dump(self, path: str | Path) -> None:
        """Write `to_yaml` to a file, atomically."""
        write_text(Path(path), self.to_yaml())


def resolve_path(name: str, *folders: Path) -> str:
    """A model, dataset or prompt name as an absolute path if it exists on disk, else unchanged (a Hugging
    Face id).

    Looked up as given (so relative to the current folder), then in each of `folders`. ``~`` is expanded.
    """
    given = Path(name).expanduser()
    for candidate in (given, *(folder / given for folder in folders)):
        if candidate.exists():
            return str(candidate.resolve())
    return name


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read, merge and validate a recipe file.

    Raises RecipeError when a file is missing, circular or malformed; RecipeErrors with every problem
    otherwise.
    """
    path = Path(path)
    tree, files = read_recipe(path)
    folders = tuple(dict.fromkeys(file.parent for file in files))
    return _load(tree, overrides, path, folders)


def recipe_from(mapping: Mapping[str, Any], overrides: Sequence[str] = (), name: str = "recipe") -> LoadedRecipe:
    """`load_recipe` for a mapping in place of a file (no ``defaults:``), for programs and tests."""
    return _load(copy.deepcopy(dict(mapping)), overrides, Path(f"{name}.yaml"), (Path.cwd(),))


def _load(tree: dict[str, Any], overrides: Sequence[str], path: Path, folders: tuple[Path, ...]) -> LoadedRecipe:
    errors = apply_overrides(tree, overrides)
    ignored, unknown = classify(tree)
    filled = _fall_back(tree, without=[*(key.name for key in ignored), *unknown])

    defaults = default_tree(Recipe)
    defaults["logger"]["log_dir"] = f"runs/{path.stem}"
    plain, broken = _resolve(_under(defaults, tree, Recipe))
    errors += broken
    # Once more: an interpolation may have brought in a whole mapping.
    ignored, unknown = classify(plain)
    errors += [unknown_key(name) for name in unknown]
    for name in [*(key.name for key in ignored), *unknown]:
        _remove(plain, name)

    try:
        recipe = Recipe.model_validate(plain)
    except ValidationError as error:
        raise RecipeErrors(_original(explain(error, plain), tree, filled, errors)) from None
    if errors:
        raise RecipeErrors(errors)
    return LoadedRecipe(recipe, ignored, recipe.model_dump(), path, folders)


# --- fallback -------------------------------------------------------------------------------------------------


def _fall_back(tree: dict[str, Any], without: list[str]) -> dict[str, str]:
    """Fill absent keys of the teacher and of every dataset in place. Returns {filled name: where it came
    from}."""
    source = copy.deepcopy(tree)
    for name in without:
        _remove(source, name)
    filled: dict[str, str] = {}

    # The name of the teacher never falls back: a forgotten one would distil the student into itself, unnoticed.
    policy = {key: value for key, value in _mapping(source.get("policy")).items() if key != "model_name"}
    if tree.get("teacher") is None:
        tree["teacher"] = {}
    _fill(tree["teacher"], policy, Teacher, "teacher", "policy", filled)

    data = tree.get("data")
    if isinstance(data, dict):
        default = _mapping(_mapping(source.get("data")).get("default"))
        for name in ("train", "validation"):
            one = isinstance(data.get(name), dict)
            for position, entry in enumerate([data[name]] if one else data.get(name) or []):
                where = f"data.{name}" if one else f"data.{name}.{position}"
                _fill(entry, default, Dataset, where, "data.default", filled)
    return filled


def _fill(
    target: Any, source: dict[str, Any], kind: type[Section], where: str, origin: str, filled: dict[str, str]
) -> None:
    if not isinstance(target, dict):
        return
    for name, field in kind.model_fields.items():
        inner = section_of(field.annotation)
        absent = name not in target or (inner is not None and target[name] is None)
        if name in source and absent:
            target[name] = copy.deepcopy(source[name])
            filled[f"{where}.{name}"] = f"{origin}.{name}"
        elif inner is not None and isinstance(source.get(name), dict):
            _fill(target[name], source[name], inner, f"{where}.{name}", f"{origin}.{name}", filled)


def _original(
    problems: list[RecipeError], tree: dict[str, Any], filled: dict[str, str], errors: list[RecipeError]
) -> list[RecipeError]:
    """Earlier errors and those problems that are not an echo: of an earlier error, a fallback or a derived
    default."""
    known = {one.key for one in errors}
    own = [
        one
        for one in problems
        if one.key not in known and (one.rule == "is required" or _is_written(one.key, tree, filled))
    ]
    return errors + own or problems


def _is_written(name: str, tree: Any, filled: dict[str, str]) -> bool:
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


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


# --- defaults and interpolation -------------------------------------------------------------------------------


def _under(defaults: dict[str, Any], tree: Any, kind: type[Section]) -> Any:
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
            merged[key] = _under(default_tree(inner) if key not in defaults else defaults[key], value, inner)
        else:
            merged[key] = merge(defaults.get(key), value)
    return merged


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


def _resolve(tree: dict[str, Any]) -> tuple[dict[str, Any], list[RecipeError]]:
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


_ABSENT: Any = object()


def _remove(tree: Any, name: str) -> None:
    *parents, leaf = name.split(".")
    for part in parents:
        tree = tree[int(part)] if isinstance(tree, list) else tree.get(part) if isinstance(tree, dict) else None
    if isinstance(tree, dict):
        tree.pop(leaf, None)


def _escape(value: Any) -> Any:
    """A literal "${" in resolved text was escaped in the source; without its backslash it would resolve
    again."""
    if isinstance(value, dict):
        return {key: _escape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escape(item) for item in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value

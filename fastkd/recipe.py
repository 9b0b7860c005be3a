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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pydantic import ValidationError

from fastkd.config import Recipe
from fastkd.config.base import default_tree
from fastkd.config.explain import explain, unknown_key
from fastkd.config.fallback import fall_back, is_written, older_layout, over_defaults, remove
from fastkd.config.ignored import IgnoredKey
from fastkd.config.inherit import read_recipe
from fastkd.config.interpolate import escape, resolve
from fastkd.config.names import classify, nearest
from fastkd.config.overrides import apply_overrides
from fastkd.config.shipped import find_recipe
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
        return OmegaConf.to_yaml(OmegaConf.create(escape(self.resolved)))

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
    """Read, merge and validate a recipe file, or a shipped recipe by its name or by the name it has elsewhere.

    Raises RecipeError when a file is missing, circular or malformed; RecipeErrors with every problem
    otherwise.
    """
    path = find_recipe(Path(path))
    tree, files = read_recipe(path)
    folders = tuple(dict.fromkeys(file.parent for file in files))
    return _load(tree, overrides, path, folders)


def recipe_from(mapping: Mapping[str, Any], overrides: Sequence[str] = (), name: str = "recipe") -> LoadedRecipe:
    """`load_recipe` for a mapping in place of a file (no ``defaults:``), for programs and tests."""
    return _load(copy.deepcopy(dict(mapping)), overrides, Path(f"{name}.yaml"), (Path.cwd(),))


def _load(tree: dict[str, Any], overrides: Sequence[str], path: Path, folders: tuple[Path, ...]) -> LoadedRecipe:
    errors = apply_overrides(tree, overrides)
    older_layout(tree)
    ignored, unknown = classify(tree)
    filled = fall_back(tree, without=[*(key.name for key in ignored), *unknown])

    defaults = default_tree(Recipe)
    defaults["logger"]["log_dir"] = f"runs/{path.stem}"
    plain, broken = resolve(over_defaults(defaults, tree, Recipe))
    # Once more, because an interpolation may have brought in a whole mapping.
    ignored, unknown = classify(plain)
    errors += [unknown_key(name) for name in unknown]
    for key in ignored:
        remove(plain, key.name)
        broken = [one for one in broken if not one.key.startswith(f"{key.name}.") and one.key != key.name]
    for name in unknown:
        remove(plain, name)

    try:
        recipe = Recipe.model_validate(plain)
    except ValidationError as error:
        known = {one.key for one in errors + broken}
        found = broken + [one for one in explain(error, plain) if one.key not in known]
    else:
        if not errors and not broken:
            return LoadedRecipe(recipe, ignored, recipe.model_dump(), path, folders)
        found = broken
    # What fell back or was derived only echoes a mistake that was made elsewhere.
    own = [one for one in found if one.rule == "is required" or is_written(one.key, tree, filled)]
    raise RecipeErrors(errors + own or found)


def without_mistakes(
    path: str | Path, overrides: Sequence[str], errors: Sequence[RecipeError]
) -> tuple[LoadedRecipe, set[str]] | None:
    """A recipe whose mistakes are taken out, and their names, so that its other keys can be checked at the same time.

    Keys go back to their defaults, and a required one is the text "?". None where that is not enough.
    """
    path = find_recipe(Path(path))
    try:
        tree, files = read_recipe(path)
    except RecipeError:
        return None
    apply_overrides(tree, overrides)
    names: set[str] = set()
    for _ in range(3):  # what refers to a mistake comes out with it, the second or third time
        for error in errors:
            remove(tree, error.key)
            if error.rule in ("is required", "must name at least one"):
                placeholder = "{data_path: '?'}" if error.key == "data.train" else "?"
                apply_overrides(tree, [f"{error.key}={placeholder}"])
        # A misspelt key was meant to be another, which is at its default now.
        names |= {error.key for error in errors} | {near for error in errors if (near := nearest(error.key))}
        try:
            loaded = _load(copy.deepcopy(tree), (), path, tuple(dict.fromkeys(file.parent for file in files)))
        except RecipeErrors as again:
            errors = again.errors
        else:
            return loaded, names
    return None

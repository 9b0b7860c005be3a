"""The other rules, when a recipe does not even load: every problem is reported at once.

The keys at fault are taken out, and each rule runs on what is left while it is watched: what it says is dropped when it
has read one of those keys, whose default would only mislead it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from fastkd.checks.finding import Finding
from fastkd.errors import RecipeError
from fastkd.recipe import LoadedRecipe


class Watched:
    """A section of a recipe that notes the full name of every key that is read."""

    def __init__(self, section: BaseModel, name: str, read: set[str]):
        self._section, self._name, self._read = section, name, read

    def __getattr__(self, key: str) -> Any:
        kind = type(self._section)
        if key not in kind.model_fields:
            # Properties and methods read keys too: of this object, so that they are noted.
            derived: Any = getattr(kind, key)
            return derived.__get__(self, kind)
        name = f"{self._name}{key}"
        self._read.add(name)
        return self._wrap(getattr(self._section, key), name)

    def _wrap(self, value: Any, name: str) -> Any:
        if isinstance(value, BaseModel):
            return Watched(value, f"{name}.", self._read)
        if isinstance(value, list):
            return [self._wrap(one, f"{name}.{position}") for position, one in enumerate(value)]
        return value


def other_errors(rules: Sequence[Any], loaded: LoadedRecipe, wrong: set[str]) -> Iterator[RecipeError]:
    """Errors of the rules that have not read a wrong key.

    Args:
        loaded: the recipe without its mistakes.
        wrong: full names of the keys that were taken out.
    """
    # What is absent falls back: a dataset's keys to data.default, the teacher's to the student's.
    wrong = wrong | {f"teacher.{name.removeprefix('policy.')}" for name in wrong if name.startswith("policy.")}
    for rule in rules:
        read: set[str] = set()
        recipe: Any = Watched(loaded.recipe, "", read)
        findings: list[Finding] = list(rule(dataclasses.replace(loaded, recipe=recipe)))
        if not any(_touches(name, read) for name in wrong):
            yield from (one for one in findings if isinstance(one, RecipeError))


def _touches(name: str, read: set[str]) -> bool:
    """Whether one of the keys read is this one, is below it, or lies on the way to it as a list of datasets."""
    if name.startswith("data.default."):
        name = "data.train"
    bare = ".".join(part for part in name.split(".") if not part.isdigit())
    keys = {".".join(part for part in one.split(".") if not part.isdigit()) for one in read}
    return any(one == bare or one.startswith(f"{bare}.") for one in keys)

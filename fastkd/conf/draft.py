"""A recipe in the making: values of variables come out, keys go in, and every step leaves a row of the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fastkd.conf import variables
from fastkd.conf.secrets import HIDDEN, Secrets, is_secret
from fastkd.conf.shell import ShellFile

Outcome = Literal["mapped", "default", "ignored", "error"]


@dataclass(frozen=True, slots=True)
class Row:
    """What became of one variable."""

    variable: str
    value: str
    outcome: Outcome
    text: str
    """The key it is in the recipe, why it has none, or what is wrong and what to do."""


@dataclass(slots=True)
class Conversion:
    """The recipe and what became of each variable."""

    recipe: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    @property
    def errors(self) -> list[Row]:
        """What must be settled before there can be a recipe."""
        return [row for row in self.rows if row.outcome == "error"]


class Draft:
    """What the parts of the conversion share."""

    def __init__(self, shell: ShellFile, environment: Mapping[str, str], take_hugging_face: bool):
        self.shell, self.take_hugging_face = shell, take_hugging_face
        # What the shell exports reaches the scripts too, unless the file sets it.
        inherited = {name: value for name, value in environment.items() if name in variables.MAPPED and value}
        self.values = inherited | {name: one.value for name, one in shell.variables.items()}
        self.secrets = Secrets(dict(environment) | self.values)
        self.done = Conversion()
        self.used: set[str] = set()
        self.student = self.teacher = ""
        """The models in Hugging Face format."""
        self.sequence_length = "4096"
        """Unless MAX_SEQ says otherwise."""
        self.experts = False
        """Whether the student has experts."""

    def get(self, name: str, default: str = "") -> str:
        """The value of a variable; an empty one counts as absent."""
        self.used.add(name)
        return self.values.get(name, "") or default

    def row(self, variable: str, outcome: Outcome, text: str, value: str | None = None) -> None:
        """Report on a variable; secrets are hidden. ``value``: what to show in place of its own."""
        shown = self.values.get(variable, "") if value is None else value
        shown = HIDDEN if is_secret(variable) and shown else self.secrets.hide(shown)
        self.done.rows.append(Row(variable, shown, outcome, self.secrets.hide(text)))

    def set(self, key: str, value: Any) -> None:
        """Set a key of the recipe by its full name."""
        tree = self.done.recipe
        *parents, leaf = key.split(".")
        for part in parents:
            tree = tree.setdefault(part, {})
        tree[leaf] = value

    def map(self, variable: str, key: str, value: Any, note: str = "") -> None:
        """Set a key and report that a variable, or its default, became it."""
        self.set(key, value)
        given = bool(self.values.get(variable))
        shown = str(value).lower() if isinstance(value, bool) else str(value)
        self.row(
            variable,
            "mapped" if given else "default",
            f"{key}: {shown}" + (f" ({note})" if note else ""),
            None if given else "",
        )

    def number(
        self,
        name: str,
        default: str = "",
        kind: Callable[[str], Any] = int,
        least: float = 0,
        *,
        required: bool = False,
    ) -> Any:
        """A number; None, with a row that says so, when it is missing or not one."""
        text = self.get(name, default)
        if not text:
            if required:
                self.row(name, "error", f"is required; give {name}=… in the file or on the command line")
            return None
        try:
            value = kind(text)
            if not math.isfinite(value) or value < least:
                raise ValueError
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            self.row(name, "error", f"must be {what} of at least {least:g}")
            return None
        return value

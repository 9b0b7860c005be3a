"""The text of a teacher's prefix with named places: ``{problem}``, ``{trace}`` and columns of the dataset.

A literal brace is doubled, as in ``\\boxed{{}}``. Names are looked up as they are written: no attributes, indices,
conversions or formats, so a recipe cannot reach into anything but the texts that it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from string import Formatter

PROBLEM, TRACE = "problem", "trace"


@lru_cache(maxsize=16)
def _parts(template: str) -> tuple[tuple[str, str | None], ...]:
    """(literal text, name of the place after it or None) in order. Raises ValueError."""
    found = []
    for literal, name, form, conversion in Formatter().parse(template):
        if name is not None and (not name or name.isdigit()):
            raise ValueError("a place has no name; name it, or double the braces")
        if form or conversion:
            raise ValueError(f"{{{name}}} has a format; a place is a name alone")
        found.append((literal, name))
    return tuple(found)


def places(template: str) -> tuple[str, ...]:
    """The names in a template, each once, in the order of their first use.

    Raises:
        ValueError: unbalanced braces, or a place that is not a name.
    """
    return tuple(dict.fromkeys(name for _, name in _parts(template) if name is not None))


def fill(template: str, texts: Mapping[str, str]) -> str:
    """The template with a text in every place. Braces inside the texts stay as they are.

    Raises:
        KeyError: a place has no text.
    """
    return "".join(literal + (texts[name] if name is not None else "") for literal, name in _parts(template))


def read(template: str, locate: Callable[[str], str]) -> str:
    """The text of a template: itself, or without braces the content of the file it names.

    Args:
        template: as the recipe has it.
        locate: gives the path of a file that the recipe names.

    Raises:
        OSError: no such file.
    """
    return template if "{" in template or "}" in template else Path(locate(template)).read_text("utf-8").rstrip("\n")

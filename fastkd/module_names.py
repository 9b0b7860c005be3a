"""Names of a model's modules, as recipes write them: in full, by their end, or as a pattern."""

from __future__ import annotations

import fnmatch


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` is a module's full name, or an end of it that starts at a dot; * and ? stand for anything."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[start:]), pattern) for start in range(len(parts)))

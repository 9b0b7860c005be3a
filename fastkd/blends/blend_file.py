"""Reads a Megatron blend file: which sources, in which proportions, for training, validation and test.

The format is what Megatron-LM takes as ``--per-split-data-args-path``: one JSON object with a list per split, weights
and sources in turn. Weights are relative, may be numbers or strings of numbers, and may be left out altogether: the
proportions are then the sources' sizes.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fastkd.errors import DataError

SPLITS = ("train", "valid", "test")
KEY = "data.blend.path"


@dataclass(frozen=True, slots=True)
class Entry:
    """One source of a split."""

    path: str
    """As written: a file, or the prefix of a .bin/.idx pair."""
    weight: float | None
    """Relative to the others of the split; None when the file gives no weights."""


@dataclass(frozen=True, slots=True)
class BlendFile:
    """A blend file, read and checked."""

    path: Path
    splits: dict[str, list[Entry]]
    """train, valid and test; an empty list for a split that the file leaves out."""


def read_blend(path: str | Path) -> BlendFile:
    """Read a blend file.

    Raises:
        DataError: no such file, not JSON, an unknown split, or a list that is not weights and sources in turn; a
            weight that is negative, not finite, or all of them zero.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise DataError(
            KEY, f"the blend file cannot be read ({error.strerror})", "Check the path", value=str(path)
        ) from error
    except ValueError as error:
        raise DataError(
            KEY, f"not a JSON file ({error})", 'It looks like {"train": [0.7, "a", 0.3, "b"]}', value=str(path)
        ) from error
    if not isinstance(content, dict):
        raise _wrong(path, "the file must hold one object", 'It looks like {"train": [0.7, "a", 0.3, "b"]}')
    for name in content:
        if name not in SPLITS:
            near = get_close_matches(name, SPLITS, n=1, cutoff=0.4)
            raise _wrong(
                path, f"{name!r} is not a split; they are {', '.join(SPLITS)}", f"Write {near[0] if near else SPLITS}"
            )
    splits = {name: _entries(path, name, content.get(name)) for name in SPLITS}
    if not splits["train"]:
        raise _wrong(path, "there is nothing to train on", 'Give "train": [weight, source, …]')
    return BlendFile(path, splits)


def _wrong(path: Path, rule: str, remedy: str) -> DataError:
    return DataError(KEY, rule, remedy, value=str(path))


def _entries(path: Path, split: str, value: Any) -> list[Entry]:
    if value is None:
        return []
    if isinstance(value, str):
        value = value.split()
    if not isinstance(value, list):
        raise _wrong(path, f"{split} must be a list", f'Write "{split}": [weight, source, …]')
    # As in Megatron: pairs when every other item is a number, sources alone otherwise.
    weights = [_number(item) for item in value[::2]]
    if all(isinstance(item, str) for item in value) and (len(value) % 2 or all(weight is None for weight in weights)):
        return [Entry(_source(path, split, item), None) for item in value]
    if len(value) % 2:
        raise _wrong(path, f"{split} has {len(value)} items, so some source or weight lacks its other", "Write pairs")
    entries = []
    for place, (weight, item) in enumerate(zip(weights, value[1::2], strict=True), 1):
        where = f"{split}, source {place}"
        if weight is None:
            raise _wrong(path, f"{where}: the weight {value[2 * place - 2]!r} is not a number", "Write 0.3")
        if not math.isfinite(weight) or weight < 0:
            raise _wrong(path, f"{where}: the weight is {weight:g}, must be at least 0", "Weights are relative shares")
        entries.append(Entry(_source(path, where, item), weight))
    if entries and not any(entry.weight for entry in entries):
        raise _wrong(path, f"{split}: all weights are 0, so nothing would be drawn", "Give one of them weight 1")
    return entries


def _number(item: Any) -> float | None:
    if isinstance(item, bool):
        return None
    if isinstance(item, (int, float)):
        return float(item)
    try:
        return float(item)
    except (TypeError, ValueError):
        return None


def _source(path: Path, where: str, item: Any) -> str:
    if not isinstance(item, str) or not item.strip():
        raise _wrong(path, f"{where}: {item!r} is not a source", "Give the path of a file or the prefix of a .bin/.idx")
    return item.strip()

"""Opens a source of a blend, whatever its kind, and checks that it can be used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastkd.blends.indexed import IndexedSource, Pieces
from fastkd.blends.places import find_source
from fastkd.blends.text_files import JsonlSource, ParquetSource
from fastkd.errors import DataError

Source = IndexedSource | Pieces | JsonlSource | ParquetSource
"""Each has a path, a length, ``where(document)`` for messages, and either ``tokens`` or ``record`` of a document."""

_SAMPLE = 1000
"""Records looked at when a source is opened: all of a small file, evenly spread ones of a large one."""


def open_source(
    name: str, folders: Sequence[Path], columns: Sequence[str]
) -> IndexedSource | JsonlSource | ParquetSource:
    """Open a source by its path, as ``places.find_source`` finds it.

    Args:
        name: as the blend file writes it.
        folders: where relative paths may lie.
        columns: columns that records may need.

    Raises:
        DataError: not there, empty, of an unknown kind, or damaged.
    """
    place = find_source(name, folders)
    if place.kind == "indexed":
        source = IndexedSource(Path(place.name))
    elif place.kind == "jsonl":
        source = JsonlSource(place.files[0])
    else:
        source = ParquetSource(place.name, place.files, columns)
    if len(source) == 0:
        raise DataError("data.blend", f"the source {source.path} is empty", "Give one with at least one document")
    return source


def try_records(source: JsonlSource | ParquetSource, use: Callable[[dict[str, Any], str], object]) -> None:
    """Do to some records what will be done to all, so that a mistake shows before training. Raises DataError."""
    for document in range(0, len(source), max(len(source) // _SAMPLE, 1)):
        use(source.record(document), source.where(document))

"""Records from JSON lines and from Parquet, read at random without holding the file in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastkd.errors import DataError, reason

Record = dict[str, Any]
_CHUNK = 1 << 24
_BLANK = b" \t\r"


class JsonlSource:
    """A file of one JSON object per line; blank lines are passed over.

    The places of its lines are found in one pass when it is opened (about a gigabyte per second, 12 bytes per line).
    """

    def __init__(self, path: Path):
        self.path = str(path)
        self._file = path.open("rb")
        self._starts, self._lengths, self._lines = self._scan()

    def _scan(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        breaks, size, newline = [], 0, False
        while chunk := self._file.read(_CHUNK):
            breaks.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + size)
            size += len(chunk)
            newline = chunk.endswith(b"\n")
        ends = np.concatenate([*breaks, np.zeros(0, np.int64)]).astype(np.int64)
        if size and not newline:
            ends = np.append(ends, size)
        starts = np.concatenate([np.zeros(1, np.int64), ends[:-1] + 1]) if len(ends) else ends
        lengths = (ends - starts).astype(np.int32)
        short = np.flatnonzero(lengths < 8)  # a record is longer: only these can be blank
        blank = [i for i in short if not self._read(int(starts[i]), int(lengths[i])).strip(_BLANK)]
        if not blank:
            return starts, lengths, None
        kept = np.delete(np.arange(len(starts)), blank)
        return starts[kept], lengths[kept], kept.astype(np.int32)

    def _read(self, start: int, length: int) -> bytes:
        return os.pread(self._file.fileno(), length, start)

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, document: int) -> str:
        """File and line of a document, as an editor takes it."""
        line = document if self._lines is None else int(self._lines[document])
        return f"{self.path}:{line + 1}"

    def record(self, document: int) -> Record:
        """One object. DataError, with file and line: not UTF-8, not JSON, or not an object."""
        raw = self._read(int(self._starts[document]), int(self._lengths[document]))
        try:
            record = json.loads(raw)
        except ValueError as error:  # of JSON, or of UTF-8
            raise DataError(self.where(document), f"is not a line of JSON ({reason(error)})", "Mend it") from error
        if not isinstance(record, dict):
            raise DataError(self.where(document), f"holds a {type(record).__name__}, not an object", "Write {…}")
        return record


class ParquetSource:
    """Rows of one or more Parquet files, mapped through an Arrow cache (the one of Hugging Face ``datasets``)."""

    def __init__(self, name: str, files: Sequence[Path], columns: Sequence[str]):
        """``columns``: those that may be wanted; others are not read."""
        import datasets
        import pyarrow.parquet as parquet

        datasets.disable_progress_bars()
        self.path = name
        try:
            present = parquet.read_schema(files[0]).names
            wanted = [column for column in columns if column in present]
            self.columns = present
            self._rows = datasets.Dataset.from_parquet([str(file) for file in files], columns=wanted or None)
        except Exception as error:  # pyarrow and datasets raise a dozen kinds; all mean that it cannot be read
            rule = f"cannot be read as Parquet ({type(error).__name__}: {reason(error)})"
            raise DataError("data.blend", f"{name} {rule}", "Check the file") from error

    def __len__(self) -> int:
        return len(self._rows)  # pyright: ignore[reportArgumentType]

    def where(self, document: int) -> str:
        """What to call a row in a message."""
        return f"{self.path}, row {document}"

    def record(self, document: int) -> Record:
        """One row."""
        return dict(self._rows[document])  # pyright: ignore[reportArgumentType, reportCallIssue, reportIndexIssue]

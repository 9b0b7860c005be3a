"""Megatron's indexed datasets: a ``.bin`` of token ids behind one another and an ``.idx`` that says where each begins.

The index, little-endian: the 9 bytes ``MMIDIDX\\0\\0``; uint64 version 1; uint8 number format; uint64 S sequences;
uint64 D + 1; int32 [S] lengths in tokens; int64 [S] byte offsets into the .bin; int64 [D + 1] first sequence of each
document, and S last. (Megatron-LM, ``core/datasets/indexed_dataset.py``.) Both files are mapped, not read.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastkd.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = 34
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


class IndexedSource:
    """The documents of one .bin/.idx pair.

    Args:
        prefix: the path of both files without their ending; they exist.

    Raises:
        DataError: they do not fit each other: truncated, another format, offsets beyond the end.
    """

    def __init__(self, prefix: Path):
        self.path = str(prefix)
        index, self._bin_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        raw = np.memmap(index, np.uint8, "r") if index.stat().st_size else np.zeros(0, np.uint8)
        if len(raw) < _HEADER or raw[: len(_MAGIC)].tobytes() != _MAGIC:
            raise self._broken("does not begin as a Megatron index does", "Make it with Megatron's preprocess_data")
        version = int(raw[9:17].view(np.uint64)[0])
        code = int(raw[17])
        if version != 1 or code not in _DTYPES:
            rule = f"has version {version} and number format {code}; version 1 with whole numbers can be read"
            raise self._broken(rule, "Make it anew with Megatron's preprocess_data")
        self.dtype = np.dtype(_DTYPES[code])
        sequences, marks = (int(raw[at : at + 8].view(np.uint64)[0]) for at in (18, 26))
        need = _HEADER + 12 * sequences + 8 * marks
        if len(raw) < need:
            raise self._broken(f"has {len(raw)} bytes, its header promises {need}", "Copy it again")
        self._lengths = raw[_HEADER : _HEADER + 4 * sequences].view(np.int32)
        begin = _HEADER + 4 * sequences
        self._offsets = raw[begin : begin + 8 * sequences].view(np.int64)
        self._documents = raw[begin + 8 * sequences : need].view(np.int64)
        self._check(sequences)
        size = self._bin_path.stat().st_size
        self._bin = np.memmap(self._bin_path, np.uint8, "r") if size else np.zeros(0, np.uint8)

    def _broken(self, rule: str, remedy: str) -> DataError:
        return DataError("data.blend", f"{self.path}.idx {rule}", remedy)

    def _check(self, sequences: int) -> None:
        marks = self._documents
        if len(marks) and (marks[0] != 0 or marks[-1] != sequences or np.any(np.diff(marks) < 0)):
            raise self._broken("has documents that do not cover its sequences", "Make it anew")
        if np.any(self._lengths < 0):
            raise self._broken("has a sequence of negative length", "Make it anew")
        ends = self._offsets + self._lengths.astype(np.int64) * self.dtype.itemsize
        size = self._bin_path.stat().st_size
        if sequences and (self._offsets.min() < 0 or ends.max() > size):
            raise self._broken(f"points to byte {int(ends.max())}, but {self._bin_path.name} has {size}", "Copy both")

    def __len__(self) -> int:
        return max(len(self._documents) - 1, 0)

    def tokens(self, document: int) -> list[int]:
        """The token ids of a document: its sequences end to end."""
        first, last = self._documents[document], self._documents[document + 1]
        found: list[int] = []
        for sequence in range(first, last):
            begin = int(self._offsets[sequence])
            count = int(self._lengths[sequence])
            data = self._bin[begin : begin + count * self.dtype.itemsize].tobytes()
            found += np.frombuffer(data, self.dtype).tolist()
        return found

    def where(self, document: int) -> str:
        """What to call a document in a message."""
        return f"{self.path}.bin, document {document}"

    def lengths(self) -> np.ndarray:
        """[D] tokens of each document."""
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(self._lengths, dtype=np.int64)])
        return np.diff(ends[self._documents])


class Pieces:
    """The documents of an indexed dataset, long ones cut into several samples.

    A piece begins with the last token of the one before, which is read and not predicted again: so every token but the
    first of a document is predicted once, as in Megatron's windows.

    Args:
        source: whose documents.
        limit: most tokens of a piece, at least 2.
    """

    def __init__(self, source: IndexedSource, limit: int):
        self.source, self.path, self.limit = source, source.path, max(limit, 2)
        counts = np.maximum(-(-(source.lengths() - 1) // (self.limit - 1)), 1)
        self._ends = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _find(self, piece: int) -> tuple[int, int]:
        """(document, number of the piece in it)."""
        document = int(np.searchsorted(self._ends, piece, side="right"))
        return document, piece - (int(self._ends[document - 1]) if document else 0)

    def tokens(self, piece: int) -> list[int]:
        """The token ids of a piece."""
        document, number = self._find(piece)
        begin = number * (self.limit - 1)
        return self.source.tokens(document)[begin : begin + self.limit]

    def where(self, piece: int) -> str:
        """What to call a piece in a message."""
        return self.source.where(self._find(piece)[0])

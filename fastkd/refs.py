"""Results that stay where they were made: a list whose items are references, fetched where they are used.

A worker puts each item into its node's object store and returns a ``Refs``: references, lengths and sizes, some 200
bytes an item. The driver passes it on. In the worker that gets it, it is a sequence like any other: indexing fetches
the item from the node that holds it, so a rank moves only those it works on. Teacher rows travel in four bytes per
entry (``fastkd.payload``), tensors as their bytes, other items as they are.

A reference dies with the worker that made it: fetching then raises ``ray.exceptions.ObjectLostError``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, overload

import numpy as np
import ray  # pyright: ignore[reportMissingImports]
import torch

from fastkd.kernels import TopK
from fastkd.payload import Payload, compress, expand


class Kept(NamedTuple):
    """One item in an object store."""

    reference: Any
    """Ray's ObjectRef."""
    length: int
    """len(item): rows of a TopK; 1 for what has no length."""
    nbytes: int
    """Size of teacher rows or of a tensor in the object store; 0 for other items, which are small."""


class Refs(Sequence[Any]):
    """Items that live in object stores; None where there is none."""

    def __init__(self, items: Iterable[Kept | None]):
        self.items = list(items)

    @classmethod
    def keep(cls, values: Iterable[Any]) -> Refs:
        """Put each value into this node's object store."""
        return cls(None if value is None else _put(value) for value in values)

    @classmethod
    def merge(cls, parts: Sequence[Refs]) -> Refs:
        """One list from those of several workers: of each item, what the first that has it says."""
        same = zip(*(part.items for part in parts), strict=True)
        return cls(next((one for one in items if one is not None), None) for items in same)

    @property
    def lengths(self) -> list[int]:
        """Of all items, without fetching any; 0 for none."""
        return [0 if one is None else one.length for one in self.items]

    @property
    def nbytes(self) -> int:
        """Bytes of teacher rows and tensors in the object stores."""
        return sum(one.nbytes for one in self.items if one is not None)

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Refs: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return Refs(self.items[index])
        one = self.items[index]
        return None if one is None else _value(ray.get(one.reference))


class _Rows(NamedTuple):
    """A Payload as numpy arrays: Ray writes them into shared memory as they are, torch tensors by way of pickle."""

    arrays: tuple[np.ndarray | None, ...]


class _Flat(NamedTuple):
    """A tensor as bytes, for the same reason."""

    data: np.ndarray
    dtype: torch.dtype
    shape: tuple[int, ...]


def _put(value: Any) -> Kept:
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return Kept(ray.put(_Flat(data, value.dtype, tuple(value.shape))), len(data), data.nbytes)
    if not isinstance(value, TopK):
        return Kept(ray.put(value), len(value) if hasattr(value, "__len__") else 1, 0)
    payload = compress(value)
    rows = _Rows(tuple(None if part is None else part.cpu().numpy() for part in payload))
    return Kept(ray.put(rows), len(value.indices), payload.nbytes)


def _value(stored: Any) -> Any:
    if isinstance(stored, _Flat):
        return torch.from_numpy(stored.data.copy()).view(stored.dtype).view(stored.shape)
    if not isinstance(stored, _Rows):
        return stored
    # Copied: the arrays are read-only views of memory that Ray reclaims.
    parts: list[Any] = [None if array is None else torch.from_numpy(array.copy()) for array in stored.arrays]
    return expand(Payload(*parts))

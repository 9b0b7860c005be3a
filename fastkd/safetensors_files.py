"""The safetensors files of a model, in a folder or the Hugging Face cache: which file holds a tensor, and its parts.

A file is mapped, never read whole: a slice costs its own size. Everything that may be wrong with the files becomes a
ModelError here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from fastkd.errors import ModelError, reason

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Names of floating-point dtypes in safetensors headers."""

_INCOMPLETE = (
    "Give a complete folder that save_pretrained wrote, or a Hugging Face id that is cached or reachable "
    "(HF_HUB_OFFLINE=1 uses the cache alone)"
)


class SafetensorsFiles:
    """Finds the files of one model.

    Args:
        key: the recipe key named in errors.
        name: a folder, or a Hugging Face id.

    Raises:
        ModelError: no safetensors files, or one of them is missing or unreadable.
    """

    def __init__(self, key: str, name: str):
        self.key, self.name = key, name
        self.paths: dict[str, Path] = {}
        """The file of every tensor."""
        if (whole := self._find(SAFE_WEIGHTS_NAME)) is not None:
            with self.open(whole) as file:
                self.paths = dict.fromkeys(file.keys(), whole)
        elif (index := self._find(SAFE_WEIGHTS_INDEX_NAME)) is not None:
            self.paths = self._indexed(index)
        elif self._find("pytorch_model.bin") or self._find("pytorch_model.bin.index.json"):
            raise self.error(
                "it has pickled weights only (pytorch_model.bin)",
                "Convert them once: AutoModelForCausalLM.from_pretrained(model).save_pretrained(folder), and give "
                "that folder",
            )
        else:
            raise self.error(f"it has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}")

    def _find(self, file: str) -> Path | None:
        try:
            path = cached_file(self.name, file)
        except OSError:  # not there, or out of reach
            return None
        return None if path is None else Path(path)

    def _indexed(self, index: Path) -> dict[str, Path]:
        try:
            entries = dict(json.loads(index.read_text())["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self.error(f"cannot load its weights ({index}: {reason(error)})") from error
        found = {}
        for file in sorted(set(entries.values())):
            found[file] = self._find(file)
            if found[file] is None:
                raise self.error(f"{index.name} names {file}, which is missing")
        return {tensor: found[file] for tensor, file in entries.items()}

    def error(self, rule: str, remedy: str = _INCOMPLETE) -> ModelError:
        """What to raise about this model."""
        return ModelError(self.key, rule, remedy, value=self.name)

    @contextmanager
    def open(self, path: Path) -> Iterator[Any]:
        """The mapped file, for :meth:`read`."""
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except (OSError, SafetensorError) as error:
            remedy = "The file is incomplete or damaged: copy or download it again"
            raise self.error(f"cannot load its weights ({path}: {reason(error)})", remedy) from error

    def read(self, file: Any, tensor: str, shape: Sequence[int], part: tuple[slice, ...]) -> Tensor:
        """One part of a tensor, on the host, in the file's dtype.

        Args:
            file: the mapped file that holds it.
            tensor: its name there.
            shape: what the whole must have.
            part: one slice per dimension.

        Raises:
            ModelError: the shape or the kind of numbers is another.
        """
        stored = file.get_slice(tensor)
        where = f"{tensor!r} in {self.paths[tensor]}"
        if list(stored.get_shape()) != list(shape):
            raise self.error(
                f"{where} has shape {list(stored.get_shape())}, but config.json asks for {list(shape)}",
                "config.json and the weights belong to different models: copy both from one place",
            )
        if stored.get_dtype() not in DTYPES.values():
            raise self.error(
                f"{where} holds {stored.get_dtype()} numbers, which need a quantisation scheme to read",
                "Give the model in bfloat16 or float32",
            )
        return stored[part] if part else file.get_tensor(tensor)

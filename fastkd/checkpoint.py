"""Checkpoints: ``step_N`` folders that are either whole or absent, and the choice of which to keep.

A checkpoint is written under ``tmp_step_N`` and renamed when complete. Inside: ``state/`` (torch.distributed.
checkpoint: weights, optimizer, schedule, keyed by parameter name, so that another sharding can read it),
``training_info.json`` (step, data position, metrics), ``recipe.yaml``, and ``manifest.json`` with the size and
SHA-256 of every file: a checkpoint that was damaged later is found out before it is loaded, not after.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from fastkd.config import Checkpointing
from fastkd.errors import CheckpointError, reason
from fastkd.files import sync_folder, write_json
from fastkd.log import logger

_STEP = re.compile(r"step_(\d+)")


@dataclass(frozen=True, slots=True)
class TrainingInfo:
    """Where a run stands, beside the tensors."""

    step: int
    consumed_prompts: int
    total_tokens: int
    elapsed_seconds: float
    """Wall-clock time spent up to here, over all restarts."""
    metrics: dict[str, float]
    """Metrics of this step, validation included when it ran."""


class Checkpoints:
    """The checkpoint folder of one run."""

    def __init__(self, config: Checkpointing):
        self.config = config
        self.folder = Path(config.checkpoint_dir)

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        if not self.folder.is_dir():
            return []
        found = (_STEP.fullmatch(path.name) for path in self.folder.iterdir() if path.is_dir())
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        """The folder of one step."""
        return self.folder / f"step_{step}"

    def save(
        self,
        info: TrainingInfo,
        state: dict[str, Any],
        recipe_yaml: str,
        export: Callable[[Path], None] | None = None,
    ) -> Path:
        """Write a checkpoint and drop those that retention does not keep.

        Args:
            info: counters and metrics.
            state: nested tensors and plain values.
            recipe_yaml: the resolved recipe.
            export: writes a Hugging Face folder at the path it is given, when wanted.
        """
        temporary, final = self.folder / f"tmp_step_{info.step}", self.path(info.step)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        with _single_process():
            dcp_save(state, checkpoint_id=temporary / "state", no_dist=True)
        (temporary / "recipe.yaml").write_text(recipe_yaml)
        (temporary / "training_info.json").write_text(json.dumps(asdict(info), indent=2))
        if export is not None:
            export(temporary / "hf")
        write_json(temporary / "manifest.json", _manifest(temporary))
        if final.exists():  # the same step again, after resuming from an earlier one
            shutil.rmtree(final)
        os.rename(temporary, final)
        sync_folder(self.folder)
        self._retain()
        return final

    def load_newest(self, template: Callable[[], dict[str, Any]]) -> tuple[TrainingInfo, dict[str, Any]] | None:
        """The newest checkpoint that is intact, or None when there is none at all.

        A damaged one is renamed to ``corrupt_step_N``, said in the log, and the one before is tried.

        Args:
            template: gives a state of the right structure, whose tensors are overwritten.

        Raises:
            CheckpointError: there are checkpoints, but not one is intact.
        """
        for leftover in self.folder.glob("tmp_step_*") if self.folder.is_dir() else ():
            shutil.rmtree(leftover)  # a save that a crash cut short
        steps = self.steps()
        for step in reversed(steps):
            path = self.path(step)
            try:
                _verify(path)
                info = TrainingInfo(**json.loads((path / "training_info.json").read_text()))
                state = template()
                with _single_process():
                    dcp_load(state, checkpoint_id=path / "state", no_dist=True)
                return info, state
            # CheckpointException derives from BaseException, so `except Exception` would miss it.
            except (Exception, CheckpointException) as error:
                corrupt = self.folder / f"corrupt_step_{step}"
                shutil.rmtree(corrupt, ignore_errors=True)
                path.rename(corrupt)
                logger.warning(
                    f"checkpoint step_{step} is damaged ({reason(error)}): kept as {corrupt.name}, "
                    "trying the one before"
                )
        if steps:
            raise CheckpointError(
                "checkpointing.checkpoint_dir",
                "holds checkpoints, but none is intact (see corrupt_step_*)",
                "Restore one from a copy, or give another folder to start afresh",
                value=str(self.folder),
            )
        return None

    def _ranked(self) -> list[int]:
        name = self.config.metric_name
        if name is None:
            return []
        group, _, metric = name.partition(":")
        name = f"{'validation' if group == 'val' else group}/{metric}"
        sign = -1 if self.config.higher_is_better else 1
        scored = []
        for step in self.steps():
            try:
                value = json.loads((self.path(step) / "training_info.json").read_text())["metrics"].get(name)
            except (OSError, ValueError, KeyError):
                continue
            if value is not None:
                scored.append((sign * value, -step))  # ties: the newer one
        return [-step for _, step in sorted(scored)]

    def _retain(self) -> None:
        if self.config.keep_top_k is None:
            return
        steps = self.steps()
        # The newest two, not one: should the newest turn out damaged, there is one before it.
        keep = {*steps[-2:], *self._ranked()[: self.config.keep_top_k]}
        if self.config.metric_name is None:
            keep.update(steps[-self.config.keep_top_k :])
        for step in steps:
            if step not in keep:
                shutil.rmtree(self.path(step))


@contextmanager
def _single_process() -> Iterator[None]:
    """Without the warning that torch.distributed is not initialised: here that is intended."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest(folder: Path) -> dict[str, list]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): [path.stat().st_size, _digest(path)] for path in files}


def _verify(folder: Path) -> None:
    expected = json.loads((folder / "manifest.json").read_text())
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            raise OSError(f"{name} is missing")
        if path.stat().st_size != size:
            raise OSError(f"{name} has {path.stat().st_size} bytes instead of {size}")
        if _digest(path) != digest:
            raise OSError(f"{name} does not match its checksum")

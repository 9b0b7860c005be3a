"""Checkpoints: ``step_N`` folders that are either whole or absent, and the choice of which to keep.

A checkpoint is written under ``tmp_step_N`` and renamed when complete. Inside: ``state/`` (torch.distributed.
checkpoint: weights, optimizer, schedule, keyed by parameter name, so that another sharding can read it),
``training_info.json`` (step, data position, metrics), ``recipe.yaml``, and ``manifest.json`` with the size and
SHA-256 of every file: a checkpoint that was damaged later is found out before it is loaded, not after.

Two parties act. The workers write, hash and read ``state/`` (``fastkd.state_files``), in the background if asked to.
The driver does the rest, here: once the workers are done it finishes the folder, at the next step (``poll``) or when
it has to wait for it (``finish``). Both must see the same file system.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from fastkd.config import Checkpointing
from fastkd.errors import CheckpointError, UserError, WorkerError, reason
from fastkd.files import sync_folder, write_json, write_text
from fastkd.log import logger
from fastkd.state_files import Files, digest

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


@dataclass(frozen=True, slots=True)
class Workers:
    """How the driver reaches the ranks that hold the tensors. Each call acts on all of them."""

    save: Callable[[Path, bool], None]
    """Write the state into this folder; in the background if True. The weights may change once it returns."""
    saved: Callable[[bool], Files | None]
    """The files written since, or None while they are being written; True waits. Raises what went wrong."""
    load: Callable[[Path], None]
    """Take up the state in this folder. Raises CheckpointError when it is that of another model."""


class Checkpoints:
    """The checkpoint folder of one run."""

    def __init__(self, config: Checkpointing, workers: Workers):
        self.config, self.workers = config, workers
        self.folder = Path(config.checkpoint_dir)
        self._saving: int | None = None
        """The step whose state is being written."""

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        if not self.folder.is_dir():
            return []
        found = (_STEP.fullmatch(path.name) for path in self.folder.iterdir() if path.is_dir())
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        """The folder of one step."""
        return self.folder / f"step_{step}"

    def _temporary(self, step: int) -> Path:
        return self.folder / f"tmp_step_{step}"

    # --- writing ------------------------------------------------------------------------------------------------

    def save(self, info: TrainingInfo, recipe_yaml: str, export: Callable[[Path], None] | None = None) -> None:
        """Write a checkpoint of what the workers hold now, or begin to (``checkpointing.is_async``).

        Args:
            info: counters and metrics.
            recipe_yaml: the resolved recipe.
            export: writes a Hugging Face folder at the path it is given, when wanted.

        Raises:
            CheckpointError: this one, or the one before, could not be written.
        """
        self.finish()
        temporary = self._temporary(info.step)
        with self._or_none(info.step):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            write_text(temporary / "recipe.yaml", recipe_yaml)
            write_json(temporary / "training_info.json", asdict(info))
            if export is not None:
                export(temporary / "hf")
            self.workers.save(temporary / "state", self.config.is_async)
        self._saving = info.step
        if not self.config.is_async:
            self.finish()

    def poll(self) -> None:
        """Finish the last save if the workers are done with it. Raises CheckpointError as ``finish`` does."""
        self._complete(wait=False)

    def finish(self) -> None:
        """Wait until the last save is a whole checkpoint.

        Raises:
            CheckpointError: it could not be written; nothing of it is left.
            WorkerError: a rank died with its part of it; nothing of it is left.
        """
        self._complete(wait=True)

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Ends with ``finish``. When the block fails, that is what is raised, and a failed save is only logged."""
        try:
            yield
        except BaseException:
            try:
                self.finish()
            except (CheckpointError, WorkerError) as error:
                logger.warning(str(error))
            raise
        self.finish()

    def _complete(self, *, wait: bool) -> None:
        step = self._saving
        if step is None:
            return
        with self._or_none(step):
            self._saving = None
            files = self.workers.saved(wait)
            if files is None:
                self._saving = step
                return
            self._publish(step, files)
        self._retain()

    @contextmanager
    def _or_none(self, step: int) -> Iterator[None]:
        """What fails inside leaves nothing of this checkpoint."""
        try:
            yield
        except Exception as error:
            shutil.rmtree(self._temporary(step), ignore_errors=True)
            if isinstance(error, WorkerError) and error.gone:
                raise  # the run goes on from the checkpoint before
            kept = self.steps()
            raise CheckpointError(
                "checkpointing.checkpoint_dir",
                f"step_{step} could not be written ({reason(error)})",
                f"Make sure that all workers can write there, then start the run again: it resumes "
                f"{f'from step_{kept[-1]}' if kept else 'at its beginning'}",
                value=str(self.folder),
            ) from error

    def _publish(self, step: int, written: Files) -> None:
        temporary, final = self._temporary(step), self.path(step)
        state = {f"state/{name}": entry for name, entry in written.items()}
        found = sorted(str(path.relative_to(temporary)) for path in temporary.rglob("*") if path.is_file())
        unseen = state.keys() - set(found)
        if unseen:
            raise OSError(
                f"a worker wrote {min(unseen)}, which is not here: the folder must be on a shared file system"
            )
        entries = dict(
            zip(found, _parallel(lambda name: state.get(name) or digest(temporary / name), found), strict=True)
        )
        write_json(temporary / "manifest.json", entries)
        if final.exists():  # the same step again, after resuming from an earlier one
            shutil.rmtree(final)
        os.rename(temporary, final)
        sync_folder(self.folder)

    # --- reading ------------------------------------------------------------------------------------------------

    def load_newest(self) -> TrainingInfo | None:
        """Have the workers take up the newest checkpoint that is intact; None when there is none at all.

        A damaged one is renamed to ``corrupt_step_N``, said in the log, and the one before is tried.

        Raises:
            CheckpointError: there are checkpoints, but not one is intact, or they are those of another model.
        """
        for leftover in self.folder.glob("tmp_step_*") if self.folder.is_dir() else ():
            shutil.rmtree(leftover)  # a save that a crash cut short
        steps = self.steps()
        for step in reversed(steps):
            path = self.path(step)
            try:
                _verify(path)
                info = TrainingInfo(**json.loads((path / "training_info.json").read_text()))
                self.workers.load(path / "state")
                return info
            except UserError:
                raise  # intact, but of another model: renaming it would lose it
            except Exception as error:
                if isinstance(error, WorkerError) and error.gone:
                    raise  # who was to take it up is lost, not the checkpoint
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

    # --- retention ----------------------------------------------------------------------------------------------

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


def _parallel(function: Callable[[str], tuple[int, str]], names: list[str]) -> list[tuple[int, str]]:
    """Hashing lets go of the interpreter lock, so threads share the work."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return list(threads.map(function, names))


def _verify(folder: Path) -> None:
    expected = json.loads((folder / "manifest.json").read_text())
    for name, (size, _) in expected.items():
        path = folder / name
        if not path.is_file():
            raise OSError(f"{name} is missing")
        if path.stat().st_size != size:
            raise OSError(f"{name} has {path.stat().st_size} bytes instead of {size}")
    names = list(expected)
    for name, (_, found) in zip(names, _parallel(lambda name: digest(folder / name), names), strict=True):
        if found != expected[name][1]:
            raise OSError(f"{name} does not match its checksum")

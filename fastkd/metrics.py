"""Metrics of a run: one JSONL line per step is the record of truth; other sinks mirror it.

Names are ``group/name`` everywhere: train/, validation/, rollout/, timing/ (seconds, tokens per second), memory/ (GiB).
Everything outside timing/ and memory/ is reproducible bit for bit when a run resumes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastkd.config import Logger
from fastkd.errors import MissingDependency
from fastkd.files import write_text

Metrics = dict[str, float]
_NAN = float("nan")  # shown for a step that had nothing to learn from
Sink = Callable[[int, Mapping[str, float]], None]


class Recorder:
    """Appends metrics to ``metrics.jsonl`` and to the sinks that the recipe enables.

    Args:
        path: metrics.jsonl.
        config: recipe.logger.
        resumed_step: lines after it are cut: they belong to work that is done again. None cuts all of them.
        recipe: the resolved recipe, for sinks that show it.
    """

    def __init__(self, path: Path, config: Logger, resumed_step: int | None, recipe: dict[str, Any]):
        self.path = path
        if path.exists():
            kept = [line for line in read(path) if resumed_step is not None and line["step"] <= resumed_step]
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a")
        self._sinks: list[Sink] = []
        self._closers: list[Callable[[], None]] = []
        if config.tensorboard_enabled:
            self._add_tensorboard(config, resumed_step)
        if config.wandb_enabled:
            self._add_wandb(config, recipe)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record one step."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        for sink in self._sinks:
            sink(step, metrics)

    def close(self) -> None:
        """Flush and release every sink."""
        self._file.close()
        for close in self._closers:
            close()

    def _add_tensorboard(self, config: Logger, resumed_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(config.tensorboard.log_dir, purge_step=0 if resumed_step is None else resumed_step + 1)

        def sink(step: int, metrics: Mapping[str, float]) -> None:
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        self._sinks.append(sink)
        self._closers.append(writer.close)

    def _add_wandb(self, config: Logger, recipe: dict[str, Any]) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        run = wandb.init(
            project=config.wandb.project or "fastkd",
            name=config.wandb.name,
            entity=config.wandb.entity,
            dir=config.log_dir,
            config=recipe,
            resume="allow",
            id=_wandb_id(Path(config.log_dir)),
        )
        self._sinks.append(lambda step, metrics: run.log(dict(metrics), step=step))
        self._closers.append(run.finish)


def require_sinks(config: Logger) -> None:
    """Check, before anything is written, that the packages of the enabled sinks are there. Raises MissingDependency."""
    from importlib.util import find_spec

    for key, package, extra in (
        ("tensorboard_enabled", "tensorboard", "tensorboard"),
        ("wandb_enabled", "wandb", "wandb"),
        ("monitor_gpus", "pynvml", "monitor"),
    ):
        if getattr(config, key) and find_spec(package) is None:
            raise MissingDependency(
                f"logger.{key}",
                f"the package {package} is not installed",
                f"Run: pip install 'fastkd[{extra}]', or set logger.{key}=false",
                value=True,
            )


def _wandb_id(folder: Path) -> str:
    # The same run folder continues the same W&B run after a resume.
    import hashlib

    return hashlib.blake2b(str(folder.resolve()).encode(), digest_size=8).hexdigest()


def read(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl; a last line that a crash cut short is left out."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def step_line(step: int, last: int, m: Mapping[str, float], loss: str = "kl") -> str:
    """The one line per step, in a fixed order with units; ``loss`` is what to call the loss ("kl" or "jsd")."""
    times = " ".join(
        f"{short} {seconds:.{1 if seconds >= 10 else 2}f}s"
        for short, name in (
            ("gen", "generation"),
            ("teacher", "teacher"),
            ("train", "training"),
            ("sync", "sync"),
        )
        for seconds in (m.get(f"timing/{name}", 0.0),)  # ahead of training, it may have been done in another step
    )
    memory = " ".join(f"{name[7:-4]} {value:.1f}" for name, value in m.items() if name.startswith("memory/"))
    return (
        f"step {step}/{last} | {loss} {m.get('train/loss', _NAN):.4f} | grad {m.get('train/grad_norm', _NAN):.2f}"
        f" | {_thousands(m['timing/tokens_per_second'])} tok/s | {times} | mem {memory} GiB"
    )


def _thousands(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"

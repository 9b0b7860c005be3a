"""The one logger, the one console, and the progress bars of a run.

On a terminal: rich output, with bars that vanish when their phase ends. Anywhere else (a pipe, a Slurm log,
CI): plain lines, no control characters, and no bars, so that a log file stays readable.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

console = Console(soft_wrap=True, highlight=False)
logger = logging.getLogger("fastkd")


def configure(level: int = logging.INFO, prefix: str = "") -> None:
    """Route the ``fastkd`` logger to the console; ``prefix`` names role and rank in worker processes."""
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_time=False, show_path=False, show_level=False, markup=False)
    else:
        handler = logging.StreamHandler(console.file)
    handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False


class _BarsAndTable(Progress):
    """Progress bars with a table below."""

    table: RenderableType | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.table is not None:
            yield self.table


class Bars:
    """Nested progress bars: one for the run, one for the phase under way.

    ``advance`` is what workers call as they go; it does nothing outside a phase or off a terminal.
    """

    def __init__(self) -> None:
        self._progress = _BarsAndTable(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        # A thread that samples ahead of training has phases of its own.
        self._own = threading.local()

    @property
    def _phase(self) -> list[TaskID]:
        if not hasattr(self._own, "phase"):
            self._own.phase = []
        return self._own.phase

    @contextmanager
    def run(self, total: int, done: int) -> Iterator[None]:
        """Show the bar of the whole run while inside."""
        with self._progress:
            self._run_task = self._progress.add_task("distilling", total=total, completed=done)
            yield
            self._progress.remove_task(self._run_task)

    def stepped(self, table: RenderableType | None = None) -> None:
        """One step of the run is done; the table says how it went."""
        self._progress.table = table
        self._progress.advance(self._run_task)

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[None]:
        """Show a bar for one phase (sampling, scoring, training) while inside."""
        task = self._progress.add_task(name, total=total)
        self._phase.append(task)
        try:
            yield
        finally:
            self._phase.pop()
            self._progress.remove_task(task)

    def advance(self, amount: int = 1) -> None:
        """The phase under way has done ``amount`` more."""
        if self._phase:
            self._progress.advance(self._phase[-1], amount)


bars = Bars()

"""How much memory a process and all its descendants use, and whether a rehearsal will fit.

Sums of resident sets count a shared library once per process: forty workers that import torch would be twice what they
are. The proportional set size (PSS) of Linux shares such pages out, so that the sum is right.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from pathlib import Path
from types import TracebackType

from fastkd.errors import UserError
from fastkd.profiling import available_gib

PER_WORKER_GIB, PER_NODE_GIB, REST_GIB = 0.33, 0.13, 0.8
"""Measured with torch 2.13, transformers 5.23 and Ray 2.60; ``docs/rehearse.md`` has the totals."""
PER_VLLM_WORKER_GIB = 1.6


def proportional_bytes(root: int) -> int:
    """PSS of a process and its descendants; processes that end meanwhile count nothing, 0 where Linux does not say."""
    total = 0
    for process in _descendants(root):
        try:
            text = Path(f"/proc/{process}/smaps_rollup").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("Pss:"))
    return total


def _descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = defaultdict(list)
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        children[parent].append(int(folder.name))
    found, waiting = [], [root]
    while waiting:
        found.append(process := waiting.pop())
        waiting += children[process]
    return found


class PeakMemory:
    """Samples this process and its descendants every few seconds while inside its ``with`` block."""

    def __init__(self, every_seconds: float = 2.0):
        self.every, self.gib = every_seconds, 0.0
        self._since = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def take(self) -> float:
        """The most since the last call, in GiB; 0 where it cannot be measured."""
        self._sample()
        found, self._since = self._since, 0.0
        return found

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self.every):
            self._sample()

    def _sample(self) -> None:
        now = proportional_bytes(os.getpid()) / 2**30
        self.gib, self._since = max(self.gib, now), max(self._since, now)


def needed_gib(workers: int, nodes: int, vllm_workers: int = 0) -> float:
    """What a rehearsal takes at its peak.

    Args:
        workers: processes that hold torch and transformers.
        nodes: simulated nodes.
        vllm_workers: processes of vLLM engines.
    """
    return REST_GIB + PER_NODE_GIB * nodes + PER_WORKER_GIB * workers + PER_VLLM_WORKER_GIB * vllm_workers


def require(need: float) -> None:
    """Raises UserError when this machine has less memory left than ``need`` GiB."""
    free = available_gib()
    if free is not None and free < need:
        raise UserError(
            "--rehearse",
            f"needs about {need:.1f} GiB of memory for a process per worker, and {free:.1f} GiB are free here",
            "Close other programs, use a machine with more, or rehearse a recipe with fewer workers "
            "(distillation.resource_isolation.roles.training.num_nodes)",
        )

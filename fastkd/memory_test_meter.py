"""Bytes that tensors take while some work is done: the allocator's own count, on a GPU and on a CPU.

On a GPU torch counts. On a CPU the profiler reports every allocation and every release, temporaries inside operators
included; those of other threads are not among them, so the work should run in the calling one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True, slots=True)
class Reading:
    """Bytes above what was there before."""

    peak: int
    """At the worst moment."""
    kept: int
    """At the end."""


class Meter:
    """Counts between ``start`` and ``stop``. On a CPU there can be one at a time."""

    def __init__(self, device: torch.device):
        self.device = device
        self._seen: Any = None
        self._before = 0

    def start(self) -> None:
        """Count from here."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._seen = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
            with _silent():
                self._seen.__enter__()

    def stop(self) -> Reading:
        """What was taken since ``start``."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            now = torch.cuda.memory_allocated(self.device)
            return Reading(torch.cuda.max_memory_allocated(self.device) - self._before, now - self._before)
        seen, self._seen = self._seen, None
        with _silent():
            seen.__exit__(None, None, None)
        level = highest = 0
        for _, size in sorted(_changes(seen)):
            level += size
            highest = max(highest, level)
        return Reading(highest, level)

    def of(self, work: Callable[[], object]) -> Reading:
        """``start``, the work, ``stop``."""
        self.start()
        try:
            work()
        finally:
            reading = self.stop()
        return reading


@contextmanager
def _silent() -> Iterator[None]:
    """The profiler says on the process's stderr when it starts and stops, and has no switch for that."""
    sys.stderr.flush()
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


def _changes(seen: Any) -> list[tuple[int, int]]:
    """(time, bytes) of every allocation, and of every release as a negative number."""
    found: list[tuple[int, int]] = []
    waiting = list(seen.profiler.kineto_results.experimental_event_tree())
    while waiting:
        node = waiting.pop()
        if node.name == "[memory]":
            found.append((node.start_time_ns, node.extra_fields.alloc_size))
        waiting += node.children
    return found


def peak_bytes(work: Callable[[], object]) -> int:
    """The peak of some work on the CPU."""
    return Meter(torch.device("cpu")).of(work).peak

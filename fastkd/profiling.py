"""Where the time of a step goes, and how much memory is in use."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


class Spans:
    """Wall-clock seconds by name, summed until taken.

    Args:
        listener: told (name, beginning, end) of every span, in seconds since the epoch.
    """

    def __init__(self, listener: Callable[[str, float, float], None] | None = None) -> None:
        self._seconds: dict[str, float] = {}
        self._listener = listener

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time inside to ``name``; a GPU is awaited, or kernels still queued would go uncounted."""
        start, clock = time.perf_counter(), time.time()
        try:
            yield
        finally:
            if torch.cuda.is_available() and torch.cuda.is_initialized():
                torch.cuda.synchronize()
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start
            if self._listener is not None:
                self._listener(name, clock, time.time())

    def seconds(self, name: str) -> float:
        """What ``name`` has summed up to."""
        return self._seconds[name]

    def peek(self) -> dict[str, float]:
        """The spans so far as metrics, ``timing/<name>``."""
        return {f"timing/{name}": seconds for name, seconds in self._seconds.items()}

    def take(self) -> dict[str, float]:
        """What ``peek`` gives; starts anew."""
        taken = self.peek()
        self._seconds = {}
        return taken


def memory_gib(device: torch.device) -> float:
    """Memory in use now: the device's peak since the last call on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 2**30
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**30


def available_gib() -> float | None:
    """Memory that programs may still take; None where it is not known. A container's own limit counts."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) / 2**20
    except (OSError, StopIteration):
        return None
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most, taken = (int((Path("/sys/fs/cgroup") / name).read_text()) for name in (limit, used))
        except (OSError, ValueError):  # no such group, or "max"
            continue
        free = min(free, max(0.0, (most - taken) / 2**30))
    return free

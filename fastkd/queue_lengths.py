"""How much waits for each role, on average over time: where a pool is the bottleneck, its queue is long."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable


class QueueLengths:
    """Integrates lengths over time; threads may share it.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self._lengths: Counter[str] = Counter()
        self._areas: dict[str, float] = {}
        """Length times seconds by role, of those that something waited for."""
        self._lock = threading.Lock()
        self._began = self._now = clock()

    def change(self, role: str, by: int) -> None:
        """So many more (or fewer) wait for a role from now on."""
        with self._lock:
            self._advance()
            self._lengths[role] += by
            self._areas.setdefault(role, 0.0)

    def take(self) -> dict[str, float]:
        """Mean lengths since the last time, ``timing/queue_<role>``."""
        with self._lock:
            self._advance()
            seconds = max(self._now - self._began, 1e-9)
            found = {f"timing/queue_{role}": area / seconds for role, area in self._areas.items()}
            self._areas = dict.fromkeys(self._areas, 0.0)
            self._began = self._now
            return found

    def _advance(self) -> None:
        now = self.clock()
        for role in self._areas:
            self._areas[role] += self._lengths[role] * (now - self._now)
        self._now = now

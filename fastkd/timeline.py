"""What every role did when, as a trace file for https://ui.perfetto.dev or chrome://tracing.

Chrome's JSON array format, whose closing bracket may be missing: events are appended as they come, and a run's file
opens even if it was killed. A process of the trace is a role, a thread is a rank.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple


class Work(NamedTuple):
    """Something that a worker did."""

    role: str
    rank: int
    name: str
    began: float
    """Seconds since the epoch, by the worker's clock."""
    ended: float


def busy(done: Iterable[Work], workers: Mapping[str, int], seconds: float) -> dict[str, float]:
    """Share of ``seconds`` that each role's workers worked, on average; ``workers`` says how many it has."""
    spent = dict.fromkeys(workers, 0.0)
    for one in done:
        if one.role in spent:
            spent[one.role] += one.ended - one.began
    return {role: total / (workers[role] * max(seconds, 1e-9)) for role, total in spent.items()}


class Timeline:
    """Appends events to a trace file, or begins it.

    Args:
        path: ``trace.json`` in the run folder.
    """

    def __init__(self, path: Path):
        new = not path.exists() or path.stat().st_size == 0
        self._file = path.open("a")
        self._roles: dict[str, int] = {}
        self._lock = threading.Lock()
        if new:
            self._file.write("[\n")

    def add(self, work: Work) -> None:
        """One more event."""
        with self._lock:
            self._write(
                {
                    "name": work.name,
                    "ph": "X",
                    "pid": self._number(work.role),
                    "tid": work.rank,
                    "ts": round(work.began * 1e6),
                    "dur": max(round((work.ended - work.began) * 1e6), 1),
                }
            )

    def close(self) -> None:
        """Write what is buffered."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def flush(self) -> None:
        """Let a reader see what there is."""
        self._file.flush()

    def _number(self, role: str) -> int:
        if role not in self._roles:
            self._roles[role] = len(self._roles) + 1
            self._write({"name": "process_name", "ph": "M", "pid": self._roles[role], "args": {"name": role}})
        return self._roles[role]

    def _write(self, event: dict) -> None:
        self._file.write(json.dumps(event) + ",\n")

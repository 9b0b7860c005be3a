"""Ctrl-C and SIGTERM: the run stops where its state is whole, saves, and ends in good order.

Sampling and scoring leave the student as it is, so there a signal acts at once; a step that is training ends first. A
second signal ends the process as if nobody listened.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Stopped(BaseException):
    """Somebody wants this run to end; nothing is wrong. No Exception: nothing on the way may take it for a failure."""


class Stop:
    """Listens while inside its ``with`` block; in another thread than the main one it hears nothing."""

    def __init__(self) -> None:
        self.asked: str | None = None
        """Name of the signal that came."""
        self._may_raise = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if self._before or self.asked:
            return self  # it listens, or has heard enough
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        self._forget()

    def _forget(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number).name
        self._forget()
        if self._may_raise:
            self._may_raise = False
            raise Stopped(self.asked)

    def check(self) -> None:
        """Raises Stopped if a signal has come."""
        if self.asked:
            raise Stopped(self.asked)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal raises Stopped wherever the code is."""
        self.check()
        self._may_raise = True
        try:
            yield
        finally:
            self._may_raise = False

"""Batches collected before they are trained on: generation and teacher work on the next steps while this one trains."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Calls ``collect(step, sampled)`` for one step after another, in order.

    With ``lead`` 0 a step is collected when it is asked for. Otherwise, once step t is asked for, t + 1 is begun as
    soon as t is sampled, up to t + lead: its rollouts are sampled with weights that are up to ``lead`` steps older than
    those they train. So the teacher ends one step while the next one is sampled.

    Args:
        collect: makes the batch of a step, and calls ``sampled()`` once the engines are free for the next one; with a
            lead it runs in a thread of its own.
        lead: ``distillation.max_off_policy_steps``.
        last: the last step there is.
    """

    def __init__(self, collect: Callable[[int, Callable[[], None]], T], lead: int, last: int):
        self.collect, self.lead, self.last = collect, lead, last
        self._begun: dict[int, Future[T]] = {}
        self._sampled: threading.Event | None = None  # of the last step that was begun
        self._dropped = threading.Event()
        self._threads: ThreadPoolExecutor | None = None

    def next(self, step: int) -> T:
        """The batch of a step; raises what collecting it raised."""
        if self.lead == 0:
            return self.collect(step, lambda: None)
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.lead + 1, thread_name_prefix="collect")
        for later in range(step, min(step + self.lead, self.last) + 1):
            if later not in self._begun:
                before, self._sampled = self._sampled, threading.Event()
                self._begun[later] = self._threads.submit(self._turn, later, before, self._sampled, self._dropped)
        return self._begun.pop(step).result()

    def _turn(self, step: int, before: threading.Event | None, sampled: threading.Event, dropped: threading.Event) -> T:
        try:
            if before is not None:
                before.wait()
            if dropped.is_set():
                raise CancelledError(f"step {step} is no longer wanted")
            return self.collect(step, sampled.set)
        except BaseException:
            dropped.set()  # the steps after it would take their prompts before it has its own again
            raise
        finally:
            sampled.set()

    def reset(self) -> None:
        """Drop all that was begun; returns when nothing is under way."""
        for one in self._drop():
            with suppress(BaseException):
                one.result()

    def close(self) -> None:
        """End the threads, without waiting for what they do."""
        self._drop()
        if self._threads is not None:
            self._threads.shutdown(wait=False)
            self._threads = None

    def _drop(self) -> list[Future[T]]:
        """What was begun; of that, what waits for its turn ends without having begun to collect."""
        begun, self._begun = list(self._begun.values()), {}
        self._dropped.set()
        self._dropped, self._sampled = threading.Event(), None
        return begun

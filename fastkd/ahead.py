"""Batches collected before they are trained on: generation and teacher work on the next steps while this one trains."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Calls ``collect(step)`` for one step after another, in order, never two at a time.

    With ``lead`` 0 a step is collected when it is asked for. Otherwise, as soon as step t is collected, t + 1 is begun,
    up to t + lead: its rollouts are sampled with weights that are up to ``lead`` steps older than those they train.

    Args:
        collect: makes the batch of a step; with a lead it runs in a thread of its own.
        lead: ``distillation.max_off_policy_steps``.
        last: the last step there is.
    """

    def __init__(self, collect: Callable[[int], T], lead: int, last: int):
        self.collect, self.lead, self.last = collect, lead, last
        self._begun: dict[int, Future[T]] = {}
        self._thread: ThreadPoolExecutor | None = None

    def next(self, step: int) -> T:
        """The batch of a step; raises what collecting it raised."""
        if self.lead == 0:
            return self.collect(step)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="collect")
        for later in range(step, min(step + self.lead, self.last) + 1):
            if later not in self._begun:
                self._begun[later] = self._thread.submit(self.collect, later)
        return self._begun.pop(step).result()

    def reset(self) -> None:
        """Drop all that was begun; returns when nothing is under way."""
        begun, self._begun = self._begun, {}
        for one in begun.values():
            one.cancel()
        for one in begun.values():
            if not one.cancelled():
                with suppress(BaseException):
                    one.result()

    def close(self) -> None:
        """End the thread, without waiting for what it does."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._thread = None

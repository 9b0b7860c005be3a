"""Roles that share their devices take turns with the memory: who works has it, the others' state waits on the host.

Sampling wants room for keys and values, scoring for the teacher's weights, training for the optimizer state. Each role
has a pair of calls, one that gives its memory back and one that takes it again; ``Turns.take`` makes those that are
needed before a role works. A vLLM engine sleeps and wakes; a torch model moves to host memory (``give_memory``), which
costs its bytes over the host link twice per turn.

The worker's half needs neither Ray nor vLLM. Where the device is the host itself, nothing moves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


class Turns:
    """Which roles hold the memory of the devices that they share."""

    def __init__(self, calls: Mapping[str, tuple[Callable[[], None], Callable[[], None]]]):
        """
        Args:
            calls: role → (give the memory back, take it). All hold theirs at first, as workers that were just built do.
        """
        self.calls = calls
        self.holding = set(calls)

    def take(self, role: str) -> None:
        """This role alone holds its memory from here on."""
        for other in sorted(self.holding - {role}):
            self.holding.remove(other)
            self.calls[other][0]()
        if role not in self.holding:
            self.calls[role][1]()
            self.holding.add(role)

    def holds(self, role: str) -> None:
        """It took its memory by itself: its workers are new, or an update of weights woke them."""
        self.holding.add(role)


def give_memory(worker: Any) -> None:
    """Weights and optimizer state of a student, teacher or generation worker move to host memory."""
    device: torch.device = worker.device
    worker.causal_lm.fastkd_home = device
    if device.type != "cpu":
        _move(worker, torch.device("cpu"))
        torch.cuda.empty_cache()


def take_memory(worker: Any) -> None:
    """They come back; the worker computes what it would have computed. Nothing where none was given."""
    home: torch.device | None = getattr(worker.causal_lm, "fastkd_home", None)
    if home is not None and home.type != "cpu":
        _move(worker, home)


def _move(worker: Any, device: torch.device) -> None:
    # Parameters stay the same objects, so the optimizer and FSDP2 find them: Module.to swaps what they hold.
    worker.causal_lm.to(device)
    optimizer = getattr(worker, "optimizer", None)
    for state in optimizer.state.values() if optimizer is not None else ():
        for name, value in state.items():
            # Adam's step count is a number on the host unless the optimizer is fused; it stays where it is.
            if isinstance(value, Tensor) and value.dim():
                state[name] = value.to(device)

"""The worker of test_ray_pool.py, imported by the test and inside the actors: no models, so that it starts soon."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist

from fastkd.errors import DataError


class Member:
    """Says where it is, adds with its group, and fails in all the ways a worker can."""

    def __init__(self, seat, start: float = 0.0):
        if start < 0:
            raise DataError("start", "must not be negative", value=start)
        self.seat, self.value = seat, start

    def where(self):
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
        return os.getpid(), self.seat.node, {name: os.environ.get(name) for name in names}

    def add(self, amount: float) -> float:
        self.value += amount
        total = torch.tensor(self.value)
        dist.all_reduce(total)
        return float(total)

    def pair(self, own: str, common: str) -> str:
        return f"{own}-{common}-{self.seat.rank}"

    def fail(self, rank: int):
        """One rank raises, the others wait for it in a collective."""
        if self.seat.rank == rank:
            raise ZeroDivisionError("one by nothing")
        dist.barrier()

    def refuse(self, unpicklable: bool):
        """All ranks raise a mistake of the user's."""
        error = DataError("data.train", "is empty", "Give another file", value="x.jsonl")
        if unpicklable:
            error.stream = open(os.devnull)  # noqa: SIM115
        raise error

    def wait(self, seconds: float):
        """Busy, and then in a collective."""
        print("waiting", flush=True)
        time.sleep(seconds)
        dist.barrier()

    def items(self, count: int):
        """A list of which this rank has every second item."""
        return [f"{i} of {self.seat.rank}" if i % 2 == self.seat.rank else None for i in range(count)]

    def read(self, items):
        return [items[i] for i in range(len(items))]

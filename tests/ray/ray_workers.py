"""Workers of test_ray_pool.py and test_ray_step.py, imported by the test and inside the actors."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist

from fastkd.errors import DataError
from fastkd.kernels import TopK
from fastkd.student import Student
from fastkd.teacher import Teacher


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


def student(seat, recipe, vocab):
    return Student(recipe, seat.device, vocab, seat.mesh(recipe.policy))


def teacher(seat, recipe, vocab):
    return Teacher(recipe, seat.device, vocab, seat.mesh(recipe.teacher))


def train(worker: Student, rollouts, targets):
    """What a step reports, and what its weights are afterwards."""
    from student_worker import weights

    metrics = worker.train(rollouts, targets) | worker.divergences(rollouts, targets)
    return metrics, weights(worker)


def wide_rows(worker: Teacher, count: int, rows: int):
    """As a teacher returns them, at K = 512; row values tell the item."""
    ids = torch.arange(512, dtype=torch.int32).expand(rows, -1) * 100
    even = torch.zeros(rows)
    return [TopK(ids, -torch.arange(512.0).expand(rows, -1), even + item, even) for item in range(count)]


def digest(worker: Student, items) -> float:
    """Every row, fetched."""
    for one in items:
        torch.testing.assert_close(one.logits, -torch.arange(512.0).expand(len(one.logits), -1), rtol=0, atol=0.01)
    return sum(float(one.logsumexp.sum()) for one in items)


def process(worker) -> int:
    """Whose process id to kill."""
    return os.getpid()

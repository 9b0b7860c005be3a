"""Workers of test_ray_step.py and what test_run.py calls in workers; imported by the test and inside the actors."""

from __future__ import annotations

import os

import torch

from fastkd.kernels import TopK
from fastkd.student import Student
from fastkd.teacher import Teacher


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

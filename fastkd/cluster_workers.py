"""What runs inside the actors of a cluster run: how each role is built, and calls that exist only between actors.

Every function takes the worker (or its seat) first: ``fastkd.ray_pools`` calls them where the worker lives. None
needs Ray: rows and weights come as sequences, whose items are fetched by being read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fastkd import models, weights, weights_export
from fastkd.batch import Prompt, Rollout
from fastkd.config import Recipe
from fastkd.metrics import Metrics
from fastkd.rollout import Generation, Request
from fastkd.shared_weights import shares_student
from fastkd.student import Student
from fastkd.teacher import Teacher


class Learner(Student):
    """A student that keeps what it is given between two calls, and lends its model to a teacher if asked to."""

    lent: Teacher | None = None
    held: tuple[Sequence[Rollout], list[Any]] | None = None


def learner(seat: Any, recipe: Recipe, student_vocab: int | None, teacher_vocab: int | None) -> Learner:
    """The student on its rank of the training group."""
    worker = Learner(recipe, seat.device, student_vocab, seat.mesh(recipe.policy))
    if shares_student(recipe):
        worker.lent = Teacher(recipe, seat.device, teacher_vocab, worker.mesh, worker)
    return worker


def scorer(seat: Any, recipe: Recipe, vocab: int | None) -> Teacher:
    """The teacher on its rank of the teacher group."""
    mesh: DeviceMesh = seat.mesh(recipe.teacher)
    return Teacher(recipe, seat.device, vocab, mesh)


def score_lent(worker: Learner, rollouts: Sequence[Rollout]) -> Sequence[Any]:
    """``Teacher.score`` of a teacher that shares the student's model."""
    assert worker.lent is not None
    return worker.lent.score(rollouts)


# --- training -------------------------------------------------------------------------------------------------------


def hold(
    worker: Learner,
    rollouts: Sequence[Rollout],
    rows: Sequence[Any],
    training: bool,
    lost: tuple[type[BaseException], ...],
):
    """Fetch the teacher's rows of this rank's share before anything changes; False when one of them is gone.

    A rank that found rows missing in the middle of a step would leave the others waiting for it.
    """
    worker.held = None
    mine = worker.share(rollouts, training=training)
    try:
        found = [rows[index] if index in mine else None for index in range(len(rollouts))]
    except lost:
        return False
    worker.held = (rollouts, found)
    return True


def train_held(worker: Learner) -> Metrics:
    """``Student.train`` on what ``hold`` fetched."""
    assert worker.held is not None
    held, worker.held = worker.held, None
    return worker.train(*held)


def divergences_held(worker: Learner, *, with_loss: bool) -> Metrics:
    """``Student.divergences`` on what ``hold`` fetched."""
    assert worker.held is not None
    held, worker.held = worker.held, None
    return worker.divergences(*held, with_loss=with_loss)


def version(worker: Student) -> int:
    """Optimizer steps taken."""
    return worker.version


def alive(worker: Any) -> None:
    """Nothing; it returns if the process is there."""


# --- weights from the student to generation ---------------------------------------------------------------------------


def publish(worker: Student) -> list[Tensor | None]:
    """Whole tensors in the recipe's precision on the first rank, adapters merged; every rank calls it."""
    tensors, _ = weights.stored_tensors(worker.causal_lm)
    dtype = models.DTYPES[worker.policy.precision]
    host = torch.device("cpu")
    found: list[Tensor | None] = []
    for tensor in weights_export.gathered(worker.causal_lm, tensors, dtype, host):
        found.append(None if tensor is None else tensor.detach().clone())
    return found


@torch.no_grad()
def receive(worker: Generation, tensors: Sequence[Tensor], version: int, lost: tuple[type[BaseException], ...]) -> bool:
    """Take up what ``publish`` gave, and sample with it from here on; False when some of it is gone."""
    own, _ = weights.stored_tensors(worker.causal_lm)
    try:
        found = list(tensors)
    except lost:
        return False
    for (name, mine), tensor in zip(own.items(), found, strict=True):
        if mine.shape != tensor.shape:
            raise ValueError(f"weight sync: {name} is {tuple(tensor.shape)} in training, {tuple(mine.shape)} here")
        mine.copy_(tensor)
    worker.adopt(version)
    return True


# --- generation -----------------------------------------------------------------------------------------------------


def sample(worker: Any, prompts: Sequence[Prompt], request: Request, batch_size: int) -> list[Rollout]:
    """``sample`` of whatever generates."""
    return worker.sample(prompts, request, batch_size=batch_size)


def generator(seat: Any, recipe: Recipe, tokenizer: Any, vocab: int | None) -> Generation:
    """A generation worker with a transformers model of its own."""
    return _transformers(seat.device, recipe, recipe.policy.model_name, tokenizer, vocab)


def teacher_answers(
    worker: Any,
    prompts: Sequence[Prompt],
    recipe: Recipe,
    tokenizer: Any,
    vocab: int | None,
    request: Request,
    batch_size: int,
) -> list[Rollout]:
    """Samples of the teacher's checkpoint, loaded for this call alone."""
    device = getattr(worker, "device", torch.device("cpu"))
    limit = recipe.teacher.max_total_sequence_length
    teacher = _transformers(device, recipe, recipe.teacher.model_name, tokenizer, vocab, limit)
    return teacher.sample(prompts, request, batch_size=batch_size)


def _transformers(
    device: torch.device, recipe: Recipe, name: str, tokenizer: Any, vocab: int | None, max_total: int | None = None
) -> Generation:
    dtype = models.DTYPES[recipe.policy.precision]
    model = models.load_causal_lm("policy.model_name", name, dtype=dtype, device=device)
    model.requires_grad_(False)
    return Generation.embedded(recipe, model, tokenizer, vocab, max_total_tokens=max_total)

"""The teacher worker: reads rollouts, ships the top-K of every response token and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch.distributed.device_mesh import DeviceMesh

from fastkd import models, packing, parallel
from fastkd.batch import Rollout, idle, pack
from fastkd.config import Recipe
from fastkd.kernels import TopK
from fastkd.log import bars
from fastkd.losses import FusedTopK, PackedModel


class Lender(Protocol):
    """A student whose model can be the teacher too."""

    model: PackedModel

    def as_teacher(self) -> AbstractContextManager[None]:
        """Inside, the model is the teacher."""
        ...


class Teacher:
    """A frozen model that scores the student's samples.

    With a mesh it is one rank of a group: every rank calls the same methods with the same rollouts.
    """

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        valid_vocab: int | None,
        mesh: DeviceMesh | None = None,
        shared: Lender | None = None,
    ):
        """``shared``: the student on the same device whose model the teacher is; see ``shares_student``."""
        self.policy = recipe.teacher
        self.device, self.mesh = device, mesh
        dtype = models.DTYPES[self.policy.precision]
        self.shared = shared
        if shared is None:
            self.model = PackedModel.load("teacher", self.policy, device, mesh, dtype, trained=False)
        else:
            self.model = shared.model
        self.causal_lm = self.model.causal_lm
        self.head = FusedTopK(recipe.distillation.topk_logits_k, recipe.loss_fn.temperature, valid_vocab)

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout]) -> list[TopK | None]:
        """Top-K rows of each rollout, [n, K] for its n response tokens.

        None for a rollout without a response and, in a group, for those that other data-parallel ranks scored.
        """
        if self.shared is None:
            return self._score(rollouts)
        with self.shared.as_teacher():
            return self._score(rollouts)

    def _score(self, rollouts: Sequence[Rollout]) -> list[TopK | None]:
        scored: list[TopK | None] = [None] * len(rollouts)
        lengths = [rollout.packed_length for rollout in rollouts]
        bins = packing.for_policy(self.policy, lengths, training=False)
        rank, ranks = parallel.data_rank(self.mesh)
        for indices in packing.assign(bins, lengths, ranks)[rank]:
            batch = pack([rollouts[index] for index in indices]) if indices else idle()
            rows = self.model(batch.to(self.device), self.head)
            if not indices:
                continue
            # One split per field keeps the rows as views of one tensor: nothing is copied until it is shipped.
            fields = [field.split(batch.responses) if field is not None else (None,) * len(indices) for field in rows]
            for index, parts in zip(indices, zip(*fields, strict=True), strict=True):
                scored[index] = TopK(*parts)
            bars.advance(len(indices))
        return scored

"""The teacher worker: reads rollouts, ships the top-K of every response token and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastkd import models, packing
from fastkd.batch import Rollout, pack
from fastkd.config import Recipe
from fastkd.kernels import TopK
from fastkd.log import bars
from fastkd.losses import TeacherModel


class Teacher:
    """A frozen model that scores the student's samples."""

    def __init__(self, recipe: Recipe, device: torch.device, valid_vocab: int | None):
        self.policy = recipe.teacher
        self.device = device
        causal_lm = models.load_causal_lm(
            "teacher.model_name",
            self.policy.model_name,
            dtype=models.DTYPES[self.policy.precision],
            device=device,
        )
        self.causal_lm = causal_lm.requires_grad_(False).eval()
        self.model = TeacherModel(causal_lm, recipe.distillation.topk_logits_k, recipe.loss_fn.temperature, valid_vocab)

    def score(self, rollouts: Sequence[Rollout]) -> list[TopK | None]:
        """Top-K rows of each rollout, [n, K] for its n response tokens; None for a rollout without a response."""
        scored: list[TopK | None] = [None] * len(rollouts)
        lengths = [rollout.packed_length for rollout in rollouts]
        for indices in packing.for_policy(self.policy, lengths, training=False):
            batch = pack([rollouts[index] for index in indices])
            rows = self.model(batch.to(self.device))
            # One split per field keeps the rows as views of one tensor: nothing is copied until it is shipped.
            fields = [field.split(batch.responses) if field is not None else (None,) * len(indices) for field in rows]
            for index, parts in zip(indices, zip(*fields, strict=True), strict=True):
                scored[index] = TopK(*parts)
            bars.advance(len(indices))
        return scored

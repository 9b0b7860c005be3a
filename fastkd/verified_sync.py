"""Weight sync that is checked: the student's weights to its engines, then the probe on both sides.

Every rank of the training group makes one and calls ``push``; the first rank has the engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fastkd import quantization, vllm_setup
from fastkd.config import Recipe
from fastkd.metrics import Metrics
from fastkd.models import DTYPES
from fastkd.sync_probe import TOLERANCE, Probed, SyncMismatch, SyncProbe, probe_tokens, trainer_logprobs
from fastkd.weight_sync import Engines, Weights, WeightSender


class VerifiedSync:
    """The way from one student to its engines.

    Args:
        recipe: number format of the engines, and ``policy.generation.sync_probe``.
        student: a ``fastkd.student.Student``; this rank's part of it.
        engines: their control plane, on the first rank; None on the others.
        transport: as the engines were built with (``weight_sync.transport_for``).
        text: token ids that the model may meet, for the probe.
        vocab: ids that are tokens.
        rank: of this process in the training group.
        address: of this host, as engines reach it.
        folder: of the file transport; all sides see it.
        timeout: of one bucket.
    """

    def __init__(
        self,
        recipe: Recipe,
        student: Any,
        engines: Engines | None,
        transport: str,
        text: Sequence[int],
        vocab: int,
        *,
        rank: int = 0,
        address: str = "127.0.0.1",
        folder: Path | None = None,
        timeout: timedelta = timedelta(minutes=5),
    ):
        settings = recipe.policy.generation.sync_probe
        self.student, self.engines, self.rank, self.period = student, engines, rank, settings.period
        self.tokens = probe_tokens(text, vocab)
        precision = vllm_setup.precision(recipe)
        self.probe = SyncProbe(TOLERANCE[precision] if settings.tolerance is None else settings.tolerance)
        self.count = 0
        weights = Weights(student.causal_lm, DTYPES[precision])
        self.sender = WeightSender(
            weights, engines, transport, rank=rank, address=address, folder=folder, timeout=timeout
        )

    def push(self) -> Metrics:
        """Give the engines the weights that the student has now; what it cost and what the probe found.

        Raises:
            SyncError: they did not arrive.
            SyncMismatch: an engine computes with other weights. Both on all ranks.
        """
        version = self.student.version
        cost = self.sender.send(version)
        found = {"sync/seconds": cost.seconds, "sync/megabytes": cost.nbytes / 1e6}
        due = self.period > 0 and self.count % self.period == 0
        self.count += 1
        return found | self._checked(version).metrics() if due else found

    def _checked(self, version: int) -> Probed:
        outcome: list[Any] = [None]
        engines = self.engines

        def trainer() -> list[float]:
            with quantization.weights_alone(self.student.causal_lm):  # the engines quantise no activations
                return trainer_logprobs(self.student, self.tokens)

        if engines is None:
            trainer()
        else:
            try:
                outcome = [self.probe.run(trainer, lambda: engines.logprobs(self.tokens), version)]
            except Exception as error:  # the other ranks wait to hear of it
                outcome = [error]
        if dist.is_initialized():
            text = str(outcome[0]) if isinstance(outcome[0], Exception) else outcome[0]
            said = [text]
            dist.broadcast_object_list(said, src=0)
            if self.rank:
                outcome = [SyncMismatch(said[0]) if isinstance(said[0], str) else said[0]]
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]

    def close(self) -> None:
        """Release connections."""
        self.sender.close()

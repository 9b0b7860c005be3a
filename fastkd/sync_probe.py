"""The sync probe: do the engines compute with the weights that the trainer has?

A weight sync can go wrong without any error: a head that keeps an old copy, a tensor loaded under another's name, an
expert not reloaded. So a fixed sequence of tokens is scored on both sides: mean |Δ log p| beyond rounding means other
weights. That alone misses an engine that took nothing, as long as training has moved little; so the engine must also
have moved when the trainer has. The reference for "moved" is kept until the engine moves: small steps add up.

Cost: one forward pass of 64 tokens on each side.

Letters: n tokens of the probe.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from fastkd.batch import Prompt, Rollout, pack
from fastkd.kernels import TopK
from fastkd.losses import Divergence, FusedLoss
from fastkd.sampling import stable_seed

LENGTH = 64
TOLERANCE = {"float32": 0.02, "bfloat16": 0.05}
"""Nat, mean over the probe. Float32 engines are within 1e-4. In bfloat16 either side is off by its own rounding:
against float32 on the same weights the trainer by 0.018, transformers' own model too, vLLM by 0.028, where tokens are
improbable (log p = -10). Together that is 0.034, and 0.013 on prompts that the model knows. One wrong tensor makes 0.1
or more."""
MOVED = 1e-4
"""Nat, mean over the probe: a trainer that moved more than this has other weights in any precision."""


class SyncMismatch(RuntimeError):
    """An engine computes with other weights than the trainer's."""


class Probed(NamedTuple):
    """What one probe found, for the log."""

    error: float
    """Mean |Δ log p| between trainer and engine, in nat; the worst engine's."""
    largest: float
    """Largest |Δ log p| of any token and engine."""
    moved: float
    """Mean |Δ log p| of the trainer since the reference."""
    seconds: float
    """Both sides together."""

    def metrics(self) -> dict[str, float]:
        """Under their names in metrics.jsonl."""
        return {
            "sync/probe_error": self.error,
            "sync/probe_largest": self.largest,
            "sync/probe_moved": self.moved,
            "sync/probe_seconds": self.seconds,
        }


def probe_tokens(text: Sequence[int], vocab: int, length: int = LENGTH) -> tuple[int, ...]:
    """``length`` token ids: text that the model may meet (a prompt), filled up with fixed pseudo-random ids.

    Text keeps log-probabilities small, and with them their rounding; the rest reaches rows of the embedding and the
    head that the text does not.
    """
    if vocab < 1:
        raise ValueError(f"probe_tokens: vocab is {vocab}: must be at least 1")
    filled = [stable_seed("sync probe", position) % vocab for position in range(length)]
    kept = list(text)[: length * 3 // 4]
    return (*kept, *filled[len(kept) :])


@torch.no_grad()
def trainer_logprobs(student: Any, tokens: Sequence[int]) -> list[float]:
    """log p(tokens[i] | tokens[:i]), i = 1 …, of a ``fastkd.student.Student``; every rank of its group calls it.

    The forward pass is that of training: sharded weights, packed attention, fused head.
    """
    prompt = Prompt(0, "", None, "", tuple(tokens[:1]))
    batch = pack([Rollout(prompt, 0, tuple(tokens[1:]), True, 0)]).to(student.device)
    rows = len(tokens) - 1
    nothing = torch.zeros(rows, device=student.device)
    # The loss is not used: any teacher will do.
    teacher = TopK(batch.labels_A[:, None].int(), nothing[:, None], nothing, torch.full_like(nothing, -torch.inf))
    counted = torch.ones_like(nothing)  # rows of weight 0 are skipped
    was_training = student.causal_lm.training
    student.causal_lm.eval()
    try:
        with student.autocast():
            head = FusedLoss(Divergence("forward", "bucket"), teacher, counted, student.valid_vocab)
            found = student.model(batch, _Labels(head))
    finally:
        student.causal_lm.train(was_training)
    return found.float().tolist()


class _Labels(NamedTuple):
    """A head whose result is the log-probability of the labels, in the order of the whole batch."""

    loss: FusedLoss

    def __call__(self, hidden_ND: torch.Tensor, shard: Any, batch: Any) -> torch.Tensor:
        return batch.join(self.loss(hidden_ND, shard, batch).label_logprob)


class SyncProbe:
    """Compares one trainer with its engines after a sync; keeps what it needs to see whether they move.

    Args:
        tolerance: mean |Δ log p| in nat beyond which weights differ.
    """

    def __init__(self, tolerance: float = TOLERANCE["float32"]):
        self.tolerance = tolerance
        self._reference: dict[int, tuple[list[float], list[float]]] = {}

    def run(
        self, trainer: Callable[[], Sequence[float]], engines: Callable[[], Sequence[Sequence[float]]], version: int
    ) -> Probed:
        """Score on both sides, and ``check``; timed."""
        start = time.perf_counter()
        ours, theirs = trainer(), engines()
        return self.check(ours, theirs, version)._replace(seconds=time.perf_counter() - start)

    def check(self, trainer: Sequence[float], engines: Sequence[Sequence[float]], version: int) -> Probed:
        """Compare log-probabilities of the probe's tokens.

        Args:
            trainer: n - 1 log-probabilities.
            engines: the same of each engine.
            version: of the weights, named in errors.

        Raises:
            SyncMismatch: an engine is off, did not move although the trainer did, or gives NaN.
        """
        error = largest = moved = 0.0
        for index, engine in enumerate(engines):
            gaps = _gaps(trainer, engine)
            mean = sum(gaps) / len(gaps)
            reference = self._reference.setdefault(index, (list(trainer), list(engine)))
            ours, theirs = (_gaps(now, then) for now, then in zip((trainer, engine), reference, strict=True))
            drift = sum(ours) / len(ours)
            if max(theirs) == 0 and drift > MOVED:
                raise SyncMismatch(
                    f"after the sync to version {version} engine {index} gives the same log-probabilities as before, "
                    f"though the trainer's have moved by {drift:.3g} nat: the weights did not arrive. Make a new "
                    "sender, and sync again"
                )
            if not mean <= self.tolerance:  # NaN too
                raise SyncMismatch(
                    f"after the sync to version {version} engine {index} gives log-probabilities that are off by "
                    f"{mean:.3g} nat (mean over {len(gaps)} tokens, largest {max(gaps):.3g}; at most {self.tolerance} "
                    "are rounding): it computes with other weights than the trainer. Its samples would be off-policy "
                    "without anyone seeing; use another transport, and report the model and version of vLLM"
                )
            if max(theirs) > 0:
                self._reference[index] = (list(trainer), list(engine))
            error, largest, moved = max(error, mean), max(largest, *gaps), max(moved, drift)
        return Probed(error, largest, moved, 0.0)


def _gaps(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [abs(x - y) for x, y in zip(a, b, strict=True)]

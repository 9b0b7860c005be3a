"""vLLM engines as Ray actors (``fastkd.ray_pools``): how one is built, and how a trainer elsewhere calls them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import ray  # pyright: ignore[reportMissingImports]
import torch.distributed as dist
from ray.exceptions import RayError  # pyright: ignore[reportMissingImports]

from fastkd.actors import Failure, Seat
from fastkd.batch import Rollout
from fastkd.config import Recipe
from fastkd.errors import reason
from fastkd.kernels import TopK
from fastkd.metrics import Metrics
from fastkd.verified_sync import VerifiedSync
from fastkd.vllm_generation import VllmGeneration
from fastkd.vllm_teacher import VllmTeacher
from fastkd.weight_sync import Engines, SyncError, transport_for

CALLS_AT_ONCE = 4
"""Of an engine's actor: two batches, an update of weights, and whoever asks whether it is alive."""


def build_engine(seat: Seat, recipe: Recipe, eos_token_id: int, valid_vocab: int | None) -> VllmGeneration:
    """What ``RayPool(slots, Options(group=False, at_once=CALLS_AT_ONCE), build_engine, …)`` runs.

    The first sync brings the weights. A later one may come while it samples: it waits for the token under way, and
    what is in flight goes on afterwards.
    """
    return VllmGeneration.from_recipe(recipe, eos_token_id, valid_vocab, dummy=True)


def build_scorer(seat: Seat, recipe: Recipe, vocab: int | None, count: int) -> Scorer:
    """What ``RayPool(slots, Options(group=False), build_scorer, …, len(slots))`` runs for ``teacher.backend: vllm``."""
    return Scorer(VllmTeacher(recipe, vocab), seat.rank, count)


class Scorer(NamedTuple):
    """One of several engines that score a batch together, each its share of the sequences."""

    teacher: VllmTeacher
    rank: int
    count: int

    def score(self, rollouts: Sequence[Rollout]) -> list[TopK | None]:
        """``VllmTeacher.score`` of every ``count``-th rollout; None for those of the others."""
        scored: list[TopK | None] = [None] * len(rollouts)
        scored[self.rank :: self.count] = self.teacher.score(rollouts[self.rank :: self.count])
        return scored

    def close(self) -> None:
        """End the engine."""
        self.teacher.close()


def connect(
    worker: Any, recipe: Recipe, actors: Sequence[Any], workers: Sequence[int], text: Sequence[int], vocab: int
) -> str:
    """Every training rank joins the engines, anew when one was replaced; why it failed, or "".

    Args:
        worker: a ``fastkd.student.Student``; it keeps the connection as ``engines``.
        recipe: of the run.
        actors: handles of the engines' actors (``fastkd.actors.Shell``).
        workers: per engine, its tensor × pipeline parallel size.
        text: token ids that the model may meet, for the probe.
        vocab: ids that are tokens.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    shares = recipe.policy.generation.colocated.enabled and not recipe.distillation.resource_isolation.enabled
    try:
        worker.engines = VerifiedSync(
            recipe,
            worker,
            _remote(actors, workers) if rank == 0 else None,
            transport_for(worker.device.type, shares_device=shares),
            text,
            vocab,
            rank=rank,
            address=ray.util.get_node_ip_address(),
        )
    except RayError as error:
        return reason(error)
    return ""


def push(worker: Any) -> tuple[Metrics, str]:
    """Every training rank: ``VerifiedSync.push``; its metrics, and why the weights did not arrive, or "".

    An engine that is gone is no failure of the training group, so it is told instead of raised: replace the engine,
    ``connect`` and push again.

    Raises:
        SyncMismatch: an engine computes with other weights.
    """
    try:
        return worker.engines.push(), ""
    except SyncError as error:
        return {}, str(error)


def sleep(worker: VllmGeneration) -> None:
    """``VllmGeneration.sleep``: the weights wait on the host, since no update may come before it samples again."""
    worker.sleep(keep_weights=True)


def wake(worker: VllmGeneration) -> None:
    """``VllmGeneration.wake``."""
    worker.wake()


def _remote(actors: Sequence[Any], workers: Sequence[int]) -> Engines:
    """The control plane of engines in actors, for a trainer in an actor of its own."""

    def call(name: str, args: list[tuple[Any, ...]]) -> list[Any]:
        work = (_Method(name), (), {})
        found = ray.get([actor.run.remote(work, own, True, False) for actor, own in zip(actors, args, strict=True)])
        for one in found:
            if isinstance(one, Failure):
                raise one.error
        return [one.value for one in found]

    return Engines(call, workers)


class _Method(NamedTuple):
    """Calls a worker's method by name."""

    name: str

    def __call__(self, worker: Any, *args: Any) -> Any:
        return getattr(worker, self.name)(*args)

"""Student and teacher on a Ray cluster for texts that exist: the pools of ``ray_roles`` without engines.

Nobody samples, so no generation worker is started, and weights stay where they are trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastkd import cluster_workers as work
from fastkd.metrics import Metrics
from fastkd.ray_roles import RayRoles


class _None(Sequence[Any]):
    """A pool that has no worker."""

    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: Any) -> Any:
        raise IndexError("a run on texts that exist has no engines")


class TextRoles(RayRoles):
    """``roles.Roles`` of a run on a blend; ``started`` makes it."""

    def _engine_pool(self) -> Any:
        return _None()

    def sync(self) -> Metrics:
        """Nobody samples with the weights; counts optimizer steps alone."""
        self.version = self.student.run(work.version)
        return {}

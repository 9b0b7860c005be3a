"""What a rehearsal asks workers on the cluster: which weights they have, and how they are sharded."""

from __future__ import annotations

from typing import Any

import torch

from fastkd.rollout import Generation
from fastkd.student import Student


@torch.no_grad()
def engine_weights(worker: Generation) -> tuple[int, float]:
    """The version that an engine samples with, and a sum over its weights that tells two versions apart."""
    total = 0.0
    for number, parameter in enumerate(worker.causal_lm.parameters()):
        values = parameter.double().flatten()
        total += float(torch.arange(1, values.numel() + 1, dtype=torch.float64).mul_(values).sum()) * (number + 1)
    return worker.weights_version, total


def degrees(worker: Any) -> tuple[int, ...]:
    """(dp, cp, tp) of a rank's mesh."""
    return tuple(worker.mesh.shape) if worker.mesh is not None else (1, 1, 1)


def optimizer_steps(worker: Student) -> int:
    """Optimizer steps that a rank's parameters have behind them, by the optimizer's own count."""
    counts = {int(state["step"]) for state in worker.optimizer.state.values() if "step" in state}
    return max(counts, default=0)

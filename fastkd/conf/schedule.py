"""Megatron's learning-rate schedule, which counts samples, as torch schedulers, which count steps.

Linear from near zero to the peak in the warm-up, then cosine or linear decay to the minimum until the decay ends, then
constant. Unless told otherwise the scripts warm up in the first 1 % of the samples and decay until 99 %.
"""

from __future__ import annotations

import math
from typing import Any

_TORCH = "torch.optim.lr_scheduler"
STYLES = ("cosine", "linear", "constant")


def schedulers(style: str, lr: float, minimum: float, *, steps: int, warmup: int, decay: int) -> list[dict[str, Any]]:
    """The entries of ``policy.scheduler``.

    Args:
        style: cosine, linear or constant.
        lr: peak.
        minimum: where the decay ends.
        steps: steps of the run.
        warmup: steps until the peak.
        decay: the step at which the minimum is reached.
    """
    parts: list[tuple[int, dict[str, Any]]] = []  # (first step, entry)
    begin = 0
    if warmup > 1:
        kwargs = {"start_factor": 1 / warmup, "end_factor": 1.0, "total_iters": warmup - 1}
        parts.append((0, {"name": f"{_TORCH}.LinearLR", "kwargs": kwargs}))
        begin = warmup
    if style == "constant":
        parts.append((begin, {"name": f"{_TORCH}.ConstantLR", "kwargs": {"factor": 1.0, "total_iters": 1}}))
    else:
        length = max(decay - begin, 1)
        if style == "cosine":
            entry = {"name": f"{_TORCH}.CosineAnnealingLR", "kwargs": {"T_max": length, "eta_min": minimum}}
        else:
            kwargs = {"start_factor": 1.0, "end_factor": minimum / lr, "total_iters": length}
            entry = {"name": f"{_TORCH}.LinearLR", "kwargs": kwargs}
        parts.append((begin, entry))
        if style == "cosine" and begin + length < steps:
            # torch's cosine would rise again.
            kwargs = {"factor": minimum / lr, "total_iters": steps}
            parts.append((begin + length, {"name": f"{_TORCH}.ConstantLR", "kwargs": kwargs}))
    entries = [entry for _, entry in parts]
    if len(parts) > 1:
        entries.append({"milestones": [first for first, _ in parts[1:]]})
    return entries


def in_steps(samples: int, batch: int) -> int:
    """Samples as steps, rounded up."""
    return math.ceil(samples / batch)

"""Metrics of a blend by the source of its samples: what each gave to a step, and what the loss is on it.

For a source s of which n_s tokens count in a step, each with the divergence L,

    blend/samples/s                       its samples, those without a token that counts included
    blend/tokens/s  = n_s
    blend/loss/s    = Σ_{tokens of s} L / n_s

so Σ_s n_s · loss_s / Σ_s n_s is the loss over all tokens: ``train/loss``, where a step is one optimizer step. A source
of which nothing counts in a step has no loss there. Tokens are counted on the host; L is summed on the device, by
micro-batch (``losses.LossBySource``), and the sums go with the step's other sums to the other ranks and to the host.

Letters: A loss-active rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.batch import Rollout


def given(names: Sequence[str], rollouts: Sequence[Rollout]) -> dict[str, float]:
    """``blend/samples/…`` and ``blend/tokens/…`` of a step.

    Args:
        names: of all sources: what gave nothing is recorded with 0.
        rollouts: of the step.
    """
    found = {f"blend/{kind}/{name}": 0.0 for kind in ("samples", "tokens") for name in names}
    for rollout in rollouts:
        found[f"blend/samples/{rollout.prompt.source}"] += 1
        found[f"blend/tokens/{rollout.prompt.source}"] += len(rollout.response)
    return found


def tokens(rollouts: Sequence[Rollout]) -> dict[str, int]:
    """Tokens that count, by ``blend/loss/…``, of sources that have any; the same order on all ranks."""
    found: dict[str, int] = {}
    for rollout in rollouts:
        if rollout.response and rollout.prompt.source is not None:
            name = _loss(rollout)
            found[name] = found.get(name, 0) + len(rollout.response)
    return found


def places(rollouts: Sequence[Rollout], names: Sequence[str]) -> Tensor:
    """[A] int64: where in ``names`` (``blend/loss/…``) each active row belongs, in the order of ``batch.pack``; -1:
    nowhere."""
    place = {name: number for number, name in enumerate(names)}
    numbers = torch.tensor([place.get(_loss(rollout), -1) for rollout in rollouts], dtype=torch.int64)
    lengths = torch.tensor([len(rollout.response) for rollout in rollouts], dtype=torch.int64)
    return numbers.repeat_interleave(lengths)


def _loss(rollout: Rollout) -> str:
    return f"blend/loss/{rollout.prompt.source}"

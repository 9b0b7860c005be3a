"""Everything that a resumed student needs, by name: weights, optimizer state, schedule, optimizer steps taken.

Names are those of the transformers model, so a state does not say how it is sharded: tensors are DTensors, and
whoever reads them cuts them anew. A tied weight is there once. Frozen weights (the base under adapters) are left out:
they come from ``policy.model_name`` in any case.

No state of a random number generator is kept. Sampling hashes (seed, step, prompt, generation, position). A module
that draws numbers while training (dropout) must seed its generator from (seed, optimizer step, rank): then there is
nothing to store, and a resume on another number of ranks is as well defined as one on the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def capture(
    model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, version: int, *, room: bool = False
) -> dict[str, Any]:
    """The state: nested dicts whose tensors are the live ones, not copies. Every rank calls it.

    Args:
        model: the transformers model, sharded or not.
        optimizer: over the trainable parameters of ``model``.
        scheduler: over ``optimizer``.
        version: optimizer steps taken.
        room: allocate the optimizer state of parameters that have taken no step, so that it can be read into.
    """
    fresh = not optimizer.state
    # Asks FSDP to give back gathered weights, and allocates the optimizer's state where there is none at all.
    weights, optimizer_state = get_state_dict(model, optimizer)
    if fresh and not room:
        # Saved, it would count as one step taken: Adam would correct its bias wrongly from there on.
        optimizer.state.clear()
        optimizer_state["state"] = {}
    left_out = _left_out(model)
    return {
        "model": {name: tensor for name, tensor in weights.items() if name not in left_out},
        "optimizer": optimizer_state,
        "scheduler": scheduler.state_dict(),
        "version": torch.tensor(version),
    }


def restore(state: dict[str, Any], model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler) -> int:
    """The inverse of ``capture``, on a model of the same layout; returns the optimizer steps taken.

    Raises:
        KeyError: a weight is missing.
    """
    loaded = set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(strict=False),  # what is left out is missing; nothing else may be
    )
    missing = set(loaded.missing_keys) - _left_out(model)
    if missing:
        raise KeyError(f"the state lacks {', '.join(sorted(missing))}")
    scheduler.load_state_dict(state["scheduler"])
    return int(state["version"])


def _left_out(model: nn.Module) -> set[str]:
    """Second names of tied weights, and frozen weights."""
    once = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    names = {name: parameter.requires_grad for name, parameter in model.named_parameters(remove_duplicate=False)}
    return {name for name, trained in names.items() if name not in once or not trained}

"""Optimizers and learning-rate schedules by the names a recipe gives them, and gradient clipping."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedulers

from fastkd.config import Optimizer as OptimizerConfig
from fastkd.config import Policy
from fastkd.errors import RecipeError


def _lookup(key: str, name: str, module: Any, base: type) -> Any:
    known = sorted(n for n, v in vars(module).items() if inspect.isclass(v) and issubclass(v, base) and v is not base)
    short = name.rsplit(".", 1)[-1]
    if short in known:
        return getattr(module, short)
    near = get_close_matches(short, known, n=1)
    raise RecipeError(
        key,
        f"torch has no such {base.__name__.lower()}",
        f"Did you mean {module.__name__}.{near[0]}?" if near else f"Known are {', '.join(known)}",
        value=name,
    )


def _call(key: str, function: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return function(*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise RecipeError(
            key,
            f"{function.__name__} does not accept it ({error})",
            f"See the arguments of {function.__module__}.{function.__name__}",
            value=kwargs,
        ) from error


def build_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The optimizer that policy.optimizer names (any class of torch.optim). Raises RecipeError."""
    cls = _lookup("policy.optimizer.name", config.name, torch.optim, Optimizer)
    kwargs = {name: tuple(value) if isinstance(value, list) else value for name, value in config.kwargs.items()}
    return _call("policy.optimizer.kwargs", cls, list(parameters), **kwargs)


def build_scheduler(policy: Policy, optimizer: Optimizer) -> schedulers.LRScheduler:
    """The schedule of policy.scheduler: torch schedulers in turn, switched at the milestones. Constant when absent.

    It ticks once per distillation step, not once per optimizer step (NeMo RL's semantics).

    Raises:
        RecipeError: an unknown scheduler, bad arguments, or milestones that do not fit.
    """
    parts, milestones = [], policy.milestones
    for number, entry in enumerate(policy.schedulers):
        key = f"policy.scheduler.{number}"
        cls = _lookup(f"{key}.name", entry.name or "", schedulers, schedulers.LRScheduler)
        parts.append(_call(f"{key}.kwargs", cls, optimizer, **entry.kwargs))
    if not parts:
        return schedulers.ConstantLR(optimizer, factor=1.0, total_iters=1)
    if len(parts) == 1:
        return parts[0]
    if len(milestones) != len(parts) - 1:
        raise RecipeError(
            "policy.scheduler",
            f"{len(parts)} schedulers need {len(parts) - 1} milestones",
            "Add a last entry {milestones: [step, …]} with one step per switch",
            value=milestones,
        )
    return schedulers.SequentialLR(optimizer, parts, milestones)


def check(policy: Policy) -> None:
    """Build both on one scalar, so that a mistake in them is found before a model is loaded. Raises RecipeError."""
    build_scheduler(policy, build_optimizer(policy.optimizer, [nn.Parameter(torch.zeros(1))]))

"""A pool runs the workers of one role; the runner talks to pools and never to where they run.

Workers are plain classes. The local pool holds one of them in this process, on one device: nothing to install,
nothing to start. A failure comes out as WorkerError with role and rank, its cause attached.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import torch

from fastkd.config import Cluster
from fastkd.errors import NonFiniteLoss, RecipeError, UserError, WorkerError

W = TypeVar("W")
R = TypeVar("R")
P = ParamSpec("P")


class LocalPool(Generic[W]):
    """One worker of a role, in this process."""

    def __init__(self, role: str, build: Callable[..., W], *args: Any, **kwargs: Any):
        self.role = role
        self.worker = self._guard(build, *args, **kwargs)

    def run(self, method: Callable[Concatenate[W, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a method of the worker's class: ``teacher.run(Teacher.score, rollouts)``."""
        return self._guard(method, self.worker, *args, **kwargs)

    def _guard(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (UserError, NonFiniteLoss):
            raise  # already says what happened and what to do
        except Exception as error:
            raise WorkerError(self.role, 0, error) from error


def local_device(cluster: Cluster) -> torch.device:
    """The one device of an embedded run, with CPU threads set.

    Raises:
        RecipeError: the recipe asks for a GPU and there is none.
    """
    if cluster.cpu_threads is not None:
        torch.set_num_threads(cluster.cpu_threads)
    if cluster.device == "cuda":
        if not torch.cuda.is_available():
            raise RecipeError(
                "cluster.gpus_per_node",
                "torch sees no CUDA device here",
                "Set cluster.gpus_per_node=0 to run on the CPU, or install a CUDA build of torch",
                value=cluster.gpus_per_node,
            )
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")

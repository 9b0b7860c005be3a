"""Joining a worker group: the environment variables of torchrun, one process group, one device per rank.

Whoever starts a group (torchrun, Ray actors, a test) gives every process RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT
and, with several devices on a node, LOCAL_RANK; the workers do not care who it was.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from fastkd.errors import UserError

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def in_group() -> bool:
    """Whether this process was started as one of a group."""
    return dist.is_initialized() or all(name in os.environ for name in _VARIABLES)


@contextmanager
def joined(device_type: str, *, timeout: timedelta = timedelta(minutes=30)) -> Iterator[torch.device]:
    """Member of the group while the context lasts; yields this rank's device.

    Collectives of CUDA tensors run on NCCL, those of CPU tensors (checkpoints, offloaded gradients) on gloo.

    Args:
        device_type: "cpu" or "cuda".
        timeout: of every collective. Generous: one rank may load or save while the others wait.

    Raises:
        UserError: a variable is missing or wrong, or this node has fewer devices than ranks.
    """
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise UserError(
            missing[0], "this variable tells a worker its place in its group", "Start the workers with torchrun"
        )
    rank, world = _number("RANK"), _number("WORLD_SIZE")
    if not 0 <= rank < world:
        raise UserError("RANK", f"must be at least 0 and below WORLD_SIZE={world}", "Start with torchrun", value=rank)
    if device_type == "cuda":
        local, found = _number("LOCAL_RANK", rank), torch.cuda.device_count()
        if local >= found:
            raise UserError(
                "LOCAL_RANK",
                f"this node has {found} CUDA devices",
                f"Start at most {found} ranks here (torchrun --nproc-per-node={max(found, 1)})",
                value=local,
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout, device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo", timeout=timeout)
    try:
        yield device
        dist.barrier()  # a rank that leaves early closes connections that others still use
    finally:
        dist.destroy_process_group()


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdigit():
        raise UserError(name, "must be a whole number", "Start the workers with torchrun", value=text)
    return int(text)

"""What runs inside a Ray actor: the shell around a worker, its place in the group, and how its failures travel.

The worker is a plain class and sees none of this. A user's mistake comes out as it is; every other failure as
WorkerFailed with role, rank, node and the one traceback of that process.
"""

from __future__ import annotations

import os
import pickle
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import ray  # pyright: ignore[reportMissingImports]
import torch
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import DeviceMesh

from fastkd import health, log
from fastkd.config import Teacher
from fastkd.errors import NonFiniteLoss, UserError, WorkerError
from fastkd.process_group import joined
from fastkd.profiling import memory_gib
from fastkd.refs import Refs


class RemoteTraceback(Exception):
    """Shows the traceback of another process."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class WorkerFailed(WorkerError):
    """A worker raised; its own traceback is the cause."""

    def __init__(self, role: str, rank: int, node: str, what: str, trace: str = ""):
        self.role, self.rank, self.node, self.what, self.trace = role, rank, node, what, trace
        RuntimeError.__init__(self, f"{role} rank {rank} on {node}: {what}")
        self.__cause__ = RemoteTraceback(trace) if trace else None


class WorkerDied(WorkerFailed):
    """A worker's process, or its node, is gone."""

    gone = True
    life = 0
    """Which of the processes that this rank had in turn it was."""


class NodeLost(WorkerFailed):
    """A worker's node is gone and no other took its place."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What a shell returns instead of a result."""

    error: BaseException
    when: float
    """Its clock when it happened: the first failure of a group is the cause, the rest follow from it."""


@dataclass(frozen=True, slots=True)
class Timed:
    """What a call returned, and when it ran by the worker's clock (seconds since the epoch)."""

    value: Any
    began: float
    ended: float
    gib: float
    """Memory in use after it; ``profiling.memory_gib``."""


@dataclass(slots=True)
class Seat:
    """A worker's place; the first argument of what builds it."""

    role: str
    rank: int
    size: int
    """Workers of the group: 1 for a worker on its own."""
    node: str
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    replica: bool = False
    """Another rank returns the same items."""

    def mesh(self, model: Teacher) -> DeviceMesh:
        """The mesh of the group, as ``recipe.policy`` or ``recipe.teacher`` asks."""
        from fastkd import parallel  # with all that shards models: seconds that a worker without a mesh does not spend

        degrees = model.dtensor_cfg
        mesh = parallel.build_mesh(degrees.tensor_parallel_size, degrees.context_parallel_size, None, self.device.type)
        self.replica = any(mesh[name].get_local_rank() > 0 for name in ("cp", "tp"))
        return mesh


class Shell:
    """The actor. Its methods return what they found or a Failure, and never raise."""

    def __init__(self, role: str, rank: int, size: int, node: str, device_type: str, threads: int | None):
        log.configure()  # Ray puts repr(actor), the role and the rank, before every line
        if threads is not None:
            torch.set_num_threads(threads)
        self.seat = Seat(role, rank, size, node)
        self.device_type = device_type
        self.report: health.Report | None = None
        self.worker: Any = None
        self.store: TCPStore | None = None
        self.membership: AbstractContextManager[torch.device] | None = None

    def __repr__(self) -> str:
        return f"{self.seat.role}-{self.seat.rank}"

    def examine(self, limits: health.Limits) -> Any:
        """The health report of this worker, the group not yet formed."""
        seat = self.seat
        return self._guarded(lambda: health.examine(seat.role, seat.rank, seat.node, self.device_type, limits))

    def serve(self, timeout: timedelta) -> Any:
        """Start the store where the group meets; (address, port)."""

        def start() -> tuple[str, int]:
            # The system picks the port and this process holds it from then on: nobody can take it in between.
            address = ray.util.get_node_ip_address()
            store = self.store = TCPStore(address, 0, None, True, timeout, wait_for_workers=False)
            return address, store.port

        return self._guarded(start)

    def join(self, environment: dict[str, str], timeout: timedelta) -> Any:
        """Become a member of the group; returns seconds of an all-reduce."""

        def enter() -> float:
            os.environ.update(environment)
            membership = self.membership = joined(self.device_type, timeout=timeout)
            self.seat.device = membership.__enter__()
            return health.exchange(self.seat.device)

        return self._guarded(enter)

    def alone(self) -> Any:
        """A worker of its own, without a group."""
        self.seat.device = torch.device(self.device_type)

    def build(self, call: tuple[Callable[..., Any], tuple, dict]) -> Any:
        """Make the worker."""

        def make() -> None:
            function, args, kwargs = call
            self.worker = function(self.seat, *args, **kwargs)

        return self._guarded(make)

    def run(self, call: tuple[Callable[..., Any], tuple, dict], own: tuple, answer: bool, keep: bool) -> Any:
        """Call a method of the worker.

        Args:
            call: the method and the arguments that all ranks get.
            own: arguments of this rank alone, before the others.
            answer: return the result; otherwise None.
            keep: the result is a list; keep its items here and return references.
        """

        def work() -> Timed:
            function, args, kwargs = call
            began = time.time()
            result = function(self.worker, *own, *args, **kwargs)
            if keep:
                result = Refs([None] * len(result)) if self.seat.replica else Refs.keep(result)
            result = result if answer or keep else None
            return Timed(result, began, time.time(), memory_gib(self.seat.device))

        return self._guarded(work)

    def close(self) -> Any:
        """Let the worker end what it started."""
        return self._guarded(lambda: getattr(self.worker, "close", lambda: None)())

    def _guarded(self, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # a checkpoint's own exception is none of Exception
            return Failure(self._portable(error), time.time())

    def _portable(self, error: BaseException) -> BaseException:
        if isinstance(error, UserError | NonFiniteLoss):
            try:
                pickle.loads(pickle.dumps(error))
                return error
            except Exception:
                pass  # it holds something that stays here; its text does not
        seat, trace = self.seat, "".join(traceback.format_exception(error)).rstrip()
        return WorkerFailed(seat.role, seat.rank, seat.node, f"{type(error).__name__}: {error}", trace)

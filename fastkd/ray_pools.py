"""A role's workers as Ray actors: the same ``run`` as the local pool's, on every rank of a group.

A group is one thing (SPMD): every rank is given the same call, and when one fails the call fails. Ranks that wait in a
collective for the lost one are not waited for; ``restart`` ends them and builds the group anew. Workers without a group
(generation engines) fail and restart one by one.

Threads may share a pool: calls reach all ranks in one order, and wait while workers are replaced.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import ray  # pyright: ignore[reportMissingImports]
from ray.exceptions import (  # pyright: ignore[reportMissingImports]
    ActorPlacementGroupRemoved,
    ActorUnschedulableError,
    GetTimeoutError,
    ObjectLostError,
    RayActorError,
    RayError,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy  # pyright: ignore[reportMissingImports]

from fastkd import health
from fastkd.actors import Failure, RemoteTraceback, Seat, Shell, Timed, WorkerDied, WorkerFailed
from fastkd.errors import NonFiniteLoss, UserError, reason
from fastkd.log import logger
from fastkd.placement import Slots
from fastkd.refs import Refs
from fastkd.timeline import Work

W = TypeVar("W")
R = TypeVar("R")
P = ParamSpec("P")

# After the first failure: time for the others to report theirs, so that the cause is told from what follows from it.
_SETTLE_SECONDS = 2.0
# How often whoever waits looks whether the nodes are there: an actor that was to start on a lost one is never heard of.
_LOOK_SECONDS = 5.0
# What tells of a death: the actor's own, a large result lost with its node, and a node that was lost before it started.
_DEATHS = (RayActorError, ObjectLostError, GetTimeoutError, ActorPlacementGroupRemoved, ActorUnschedulableError)
_NAMESPACE = f"fastkd-{uuid.uuid4().hex[:12]}"


@dataclass(frozen=True, slots=True)
class Options:
    """How a pool starts and ends."""

    group: bool = True
    """The workers are ranks of one process group; False: each is on its own."""
    limits: health.Limits = field(default_factory=health.Limits)
    """What the health checks ask for."""
    threads: int | None = None
    """CPU threads of a worker; None leaves it to torch."""
    at_once: int = 1
    """Calls that a worker takes at a time, each in a thread of its own: it has to be made for that."""
    collective_timeout: timedelta = timedelta(minutes=30)
    """Of every collective; one rank may load or save while the others wait."""
    grace_seconds: float = 10.0
    """For the workers' own ``close``, where they have one."""


class Pending(Generic[R]):
    """A call under way."""

    def __init__(self, pool: RayPool, references: dict[Any, int], shape: Callable[[dict[int, Any]], R]):
        self._pool, self._references, self._shape = pool, references, shape

    @property
    def references(self) -> list[Any]:
        """Ray's references of the call, one per rank; what ``ray.wait`` takes."""
        return list(self._references)

    def done(self) -> bool:
        """Whether ``result`` returns, or raises, at once."""
        ready, waiting = ray.wait(list(self._references), num_returns=len(self._references), timeout=0)
        return not waiting or any(self._pool.failed(one, self._references[one]) for one in ready)

    def result(self) -> R:
        """Wait for it. Raises like ``RayPool.run``."""
        return self._shape(self._pool.collect(self._references))


class RayPool(Generic[W]):
    """The workers of one role.

    ``build(seat, *args, **kwargs)`` makes a worker inside its actor; ``seat`` holds rank, device and mesh. The actors
    are called ``role-rank``, and so are their log lines. They end with ``close``, with the ``with`` block, or with this
    process, whichever comes first.
    """

    def __init__(
        self,
        slots: Slots,
        options: Options,
        build: Callable[Concatenate[Seat, P], W],
        *args: P.args,
        **kwargs: P.kwargs,
    ):
        """Start the workers: health checks, process group, then ``build`` on every rank.

        Raises:
            UserError: a node fails a health check, or a worker rejects what the user gave.
            WorkerFailed: a worker could not be built.
        """
        self.slots, self.role, self.options = slots, slots.role, options
        self.reports: list[health.Report] = []
        self.broken = ""
        """Why the group must be restarted; empty while it works."""
        self.work: list[Work] = []
        """Calls done since somebody last emptied it."""
        self.gib: dict[int, float] = {}
        """The most memory in use after a call, by rank, since somebody last emptied it."""
        self._call, self._actors = (build, args, kwargs), dict[int, Any]()
        self._homes: dict[int, Any] = {}
        """The placement group of each actor."""
        self._lives: dict[int, int] = {}
        """Processes that a rank has had."""
        self._calls: dict[Any, tuple[str, int]] = {}
        """Calls under way: their names and the lives of who does them."""
        self._death: WorkerDied | None = None
        """Why the group must be restarted, if that is a death."""
        self._one_at_a_time = threading.RLock()
        try:
            self._start(range(len(slots)))
        except BaseException:
            self.close(at_once=True)
            raise

    # --- calls --------------------------------------------------------------------------------------------------

    def run(self, method: Callable[Concatenate[W, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a method on every rank with the same arguments; the first rank's result.

        Raises:
            UserError, NonFiniteLoss: as the worker raised it.
            WorkerFailed: another failure, with role, rank, node and the worker's traceback.
            WorkerDied: a process or a node is gone.
        """
        return self.submit(method, *args, **kwargs).result()

    def submit(self, method: Callable[Concatenate[W, P], R], *args: P.args, **kwargs: P.kwargs) -> Pending[R]:
        """``run``, without waiting."""
        return Pending(self, self._send((method, args, kwargs), answer=(0,)), lambda found: found[0])

    def run_all(self, method: Callable[Concatenate[W, P], R], *args: P.args, **kwargs: P.kwargs) -> list[R]:
        """``run``; the results of all ranks."""
        references = self._send((method, args, kwargs), answer=self._actors)
        return Pending(self, references, _in_order).result()

    def run_each(self, method: Callable[..., R], own: Sequence[tuple], *args: Any, **kwargs: Any) -> list[R]:
        """Call a method on every rank, each with arguments of its own before the common ones; all results."""
        if len(own) != len(self._actors):
            raise ValueError(f"run_each: {len(own)} tuples of arguments for {len(self._actors)} ranks")
        references = self._send((method, args, kwargs), answer=self._actors, own=own)
        return Pending(self, references, _in_order).result()

    def submit_to(self, rank: int, method: Callable[Concatenate[W, P], R], *args: P.args, **kwargs: P.kwargs):
        """Call a method of one worker, without waiting; for workers without a group."""
        references = self._send((method, args, kwargs), ranks=(rank,), answer=(rank,))
        return Pending[R](self, references, lambda found: found[rank])

    def keep(self, method: Callable[Concatenate[W, P], Sequence[Any]], *args: P.args, **kwargs: P.kwargs) -> Refs:
        """Call a method that returns a list on every rank; the items stay with the ranks that have them."""
        return self.submit_keep(method, *args, **kwargs).result()

    def submit_keep(
        self, method: Callable[Concatenate[W, P], Sequence[Any]], *args: P.args, **kwargs: P.kwargs
    ) -> Pending[Refs]:
        """``keep``, without waiting."""
        references = self._send((method, args, kwargs), answer=self._actors, keep=True)
        return Pending(self, references, lambda found: Refs.merge(_in_order(found)))

    def _send(
        self, call: tuple, *, answer: Any, ranks: Any = None, own: Sequence[tuple] | None = None, keep: bool = False
    ) -> dict[Any, int]:
        with self._one_at_a_time:
            if self._death is not None:
                raise self._death  # another thread met it first
            if self.broken or not self._actors:
                raise RuntimeError(f"the {self.role} pool cannot work: {self.broken or 'closed'}. Call restart() first")
            chosen = self._actors if ranks is None else {rank: self._actors[rank] for rank in ranks}
            shared = ray.put(call) if len(chosen) > 1 else call  # written once, however many ranks read it
            references = {
                actor.run.remote(shared, own[rank] if own else (), rank in answer, keep): rank
                for rank, actor in chosen.items()
            }
            for reference, rank in references.items():
                self._calls[reference] = call[0].__name__, self._lives[rank]
            return references

    # --- failures -----------------------------------------------------------------------------------------------

    def collect(self, references: Mapping[Any, int]) -> dict[int, Any]:
        """Results by rank of calls that were sent; see ``run`` for what it raises."""
        waiting, results, failures = dict(references), dict[int, Any](), dict[int, Failure]()
        deadline: float | None = None
        while waiting:
            left = _LOOK_SECONDS if deadline is None else max(deadline - time.monotonic(), 0.0)
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=left)
            if not ready:
                if deadline is not None:
                    break
                ready = self._on_lost_nodes(waiting)
                if not ready:
                    continue
            rank = waiting.pop(ready[0])
            found = self._outcome(ready[0], rank)
            name, _ = self._calls.pop(ready[0], ("", 0))
            if not isinstance(found, Failure):
                if isinstance(found, Timed):
                    self.work.append(Work(self.role, rank, name, found.began, found.ended))
                    self.gib[rank] = max(found.gib, self.gib.get(rank, 0.0))
                    found = found.value
                results[rank] = found
                continue
            failures[rank] = found
            if self.options.group and isinstance(found.error, WorkerDied):
                break  # that explains all others
            if self.options.group and deadline is None:
                deadline = time.monotonic() + _SETTLE_SECONDS
        if failures:
            self._raise(failures, list(waiting.values()))
        return results

    def failed(self, reference: Any, rank: int) -> bool:
        """Whether a call that has ended failed."""
        return isinstance(self._outcome(reference, rank), Failure)

    def _outcome(self, reference: Any, rank: int) -> Any:
        try:
            while True:
                try:
                    return ray.get(reference, timeout=_LOOK_SECONDS)
                except GetTimeoutError:
                    if not self._nodes_alive((rank,)):
                        raise
        except _DEATHS as error:
            death = WorkerDied(self.role, rank, self._node(rank), self._epitaph(rank, error))
            _, death.life = self._calls.get(reference, ("", self._lives[rank]))
            return Failure(death, 0.0)
        except RayError as error:  # arguments or a result that cannot be pickled
            what = f"{type(error).__name__}: {reason(error)}"
            return Failure(WorkerFailed(self.role, rank, self._node(rank), what, str(error).rstrip()), time.time())

    def _on_lost_nodes(self, waiting: Mapping[Any, int]) -> list[Any]:
        """The first of these calls whose node is gone."""
        return [reference for reference, rank in waiting.items() if not self._nodes_alive((rank,))][:1]

    def _node(self, rank: int) -> str:
        return self.slots.nodes[rank].name

    def _nodes_alive(self, ranks: Sequence[int] | None = None) -> bool:
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        return all(self.slots.nodes[rank].id in alive for rank in (range(len(self.slots)) if ranks is None else ranks))

    @property
    def handles(self) -> list[Any]:
        """Ray's handles of the actors, for workers of another role that call them."""
        return [self._actors[rank] for rank in sorted(self._actors)]

    def replaced(self, death: WorkerDied) -> bool:
        """Whether who died has a successor already."""
        return self._lives[death.rank] > death.life

    def _epitaph(self, rank: int, error: RayError) -> str:
        if not self._nodes_alive((rank,)):
            return "the node is gone"
        told = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"its process ended. {told[-1] if told else ''}".rstrip()

    def _raise(self, failures: dict[int, Failure], waiting: list[int]) -> None:
        dead = any(isinstance(one.error, WorkerDied) for one in failures.values())
        # A death explains what the others raise; else whoever raised first, and a mistake of the user's before all.
        cause = min(failures.values(), key=lambda one: (one.when > 0, not _own(one), one.when))
        if self.options.group and (dead or waiting or not _own(cause)):
            self.broken = f"{cause.error}"
            self._death = cause.error if isinstance(cause.error, WorkerDied) else None
        others = len(failures) - 1 + len(waiting)
        if others and not _own(cause):
            cause.error.add_note(f"({others} other {self.role} worker(s) failed or stopped with it)")
        trace = getattr(cause.error, "trace", "")
        raise cause.error from (RemoteTraceback(trace) if trace else None)

    # --- life ---------------------------------------------------------------------------------------------------

    def restart(self, rank: int | None = None, *, timeout: float = 120.0) -> list[int]:
        """End the workers and build them again, on other nodes where theirs are gone.

        Args:
            rank: only this one, and those whose nodes are gone too; for workers without a group.
            timeout: seconds to wait for a node to take the place of one that is gone.

        Returns:
            The ranks that are new.

        Raises:
            UserError: no node took the place of one that is gone.
        """
        if rank is not None and self.options.group:
            raise ValueError(f"restart: rank {rank} of the {self.role} group cannot start alone")
        with self._one_at_a_time:
            while True:
                ranks = list(range(len(self.slots))) if rank is None else [rank]
                self._end(ranks)
                self.slots = self.slots.renew(timeout)
                moved = {one for one, group in enumerate(self.slots.groups) if self._homes.get(one) is not group}
                ranks = sorted({*ranks, *moved})
                self._end(ranks)
                self.broken, self._death = "", None
                try:
                    self._start(ranks)
                    return ranks
                except WorkerDied:
                    self._end(ranks)
                    # Ray learns that a node is gone some seconds after its processes ended.
                    if self._nodes_alive():
                        raise
                except BaseException:
                    self._end(ranks)
                    raise

    def close(self, *, at_once: bool = False) -> None:
        """End all workers; harmless when done before. ``at_once``: without their own ``close``."""
        if ray.is_initialized() and self._actors and not self.broken and not at_once:
            farewells = [actor.close.remote() for actor in self._actors.values()]
            with suppress(RayError):
                ray.wait(farewells, num_returns=len(farewells), timeout=self.options.grace_seconds)
        self._end(list(self._actors))
        self.broken = "closed"

    def __enter__(self) -> RayPool[W]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(at_once=error is not None)

    def __len__(self) -> int:
        return len(self.slots)

    def _end(self, ranks: Sequence[int]) -> None:
        for rank in list(ranks):
            actor = self._actors.pop(rank, None)
            if actor is not None and ray.is_initialized():
                ray.kill(actor)

    def _start(self, ranks: Sequence[int]) -> None:
        for rank in ranks:
            self._homes[rank] = self.slots.groups[rank]
            self._lives[rank] = self._lives.get(rank, 0) + 1
            self._actors[rank] = self._actor(rank)
        options = self.options
        reports = self._ask(ranks, lambda actor, rank: actor.examine.remote(options.limits))
        self.reports = [one for one in self.reports if one.rank not in ranks] + reports
        health.judge(self.reports)
        if options.group:
            address, port = self._ask((0,), lambda actor, rank: actor.serve.remote(options.collective_timeout))[0]
            seconds = self._ask(
                ranks,
                lambda actor, rank: actor.join.remote(
                    self._environment(rank, address, port), options.collective_timeout
                ),
            )
            for report, taken in zip(self.reports, seconds, strict=True):
                report.allreduce_seconds = taken
        else:
            self._ask(ranks, lambda actor, rank: actor.alone.remote())
        call = ray.put(self._call)
        self._ask(ranks, lambda actor, rank: actor.build.remote(call))
        nodes = ", ".join(dict.fromkeys(self._node(rank) for rank in ranks))
        logger.info(f"{self.role}: {len(ranks)} worker(s) on {nodes}")

    def _ask(self, ranks: Sequence[int], ask: Callable[[Any, int], Any]) -> list[Any]:
        return _in_order(self.collect({ask(self._actors[rank], rank): rank for rank in ranks}))

    def _actor(self, rank: int) -> Any:
        slots, options = self.slots, self.options
        amount: dict[str, Any] = (
            {"num_gpus": slots.per_worker}
            if slots.resource == "GPU"
            else {"resources": {slots.resource: slots.per_worker}}
        )
        variables = {"OMP_NUM_THREADS": str(options.threads)} if options.threads else {}
        shell = ray.remote(Shell).options(
            name=_free_name(f"{self.role}-{rank}"),
            namespace=_NAMESPACE,
            num_cpus=0,
            max_concurrency=options.at_once,
            max_restarts=0,  # a rank alone cannot rejoin its group: restart() is ours
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                slots.groups[rank], placement_group_bundle_index=slots.bundles[rank]
            ),
            runtime_env={"env_vars": variables} if variables else None,
            **amount,
        )
        size = len(slots) if options.group else 1
        return shell.remote(self.role, rank, size, self._node(rank), slots.device_type, options.threads)

    def _environment(self, rank: int, address: str, port: int) -> dict[str, str]:
        """What torchrun sets."""
        nodes = [node.id for node in self.slots.nodes]
        local = [other for other, node in enumerate(nodes) if node == nodes[rank]]
        return {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(nodes)),
            # Ray shows a worker its own GPU alone: that is device 0, whatever its place on the node.
            "LOCAL_RANK": "0" if self.slots.device_type == "cuda" else str(local.index(rank)),
            "LOCAL_WORLD_SIZE": str(len(local)),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            # The store is up already, in the first rank: nobody starts another one.
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }


def _own(failure: Failure) -> bool:
    return isinstance(failure.error, UserError | NonFiniteLoss)


def _in_order(found: Mapping[int, Any]) -> list[Any]:
    return [found[rank] for rank in sorted(found)]


def _free_name(name: str) -> str:
    """The name, once Ray has let go of an actor that was killed."""
    deadline = time.monotonic() + 30.0
    while {"name": name, "namespace": _NAMESPACE} in ray.util.list_named_actors(all_namespaces=True):
        if time.monotonic() > deadline:
            raise RuntimeError(f"an actor called {name} is still there")
        time.sleep(0.05)
    return name

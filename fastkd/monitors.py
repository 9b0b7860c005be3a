"""Who watches the GPUs of a run: a thread of this process, or an actor on every node of the Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from fastkd.gpu_monitor import GpuMonitor
from fastkd.log import logger

_SECONDS = 10.0
"""How long the loop waits for the nodes' monitors after a step."""


class Monitor(Protocol):
    """Tells what GPUs did."""

    def take(self) -> dict[str, float]:
        """Metrics since the last time: ``GpuMonitor.take``."""
        ...

    def close(self) -> None:
        """End it."""
        ...


class NoMonitor:
    """Of runs without ``logger.monitor_gpus``."""

    def take(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass


class NodeMonitors:
    """A ``GpuMonitor`` on every node that has joined the cluster; a node that is lost is not waited for again.

    Args: as of ``GpuMonitor``; call it with Ray connected.
    """

    def __init__(self, seconds: float = 1.0, nvml: Any = None):
        import ray  # pyright: ignore[reportMissingImports]
        from ray.exceptions import RayError  # pyright: ignore[reportMissingImports]
        from ray.util.scheduling_strategies import (  # pyright: ignore[reportMissingImports]
            NodeAffinitySchedulingStrategy as OnNode,
        )

        self.ray, self.failures = ray, RayError
        actor = ray.remote(num_cpus=0)(GpuMonitor)
        self.actors: dict[str, Any] = {}
        for node in ray.nodes():
            if node["Alive"]:
                name = node.get("NodeName") or node["NodeManagerAddress"]
                options = {"scheduling_strategy": OnNode(node["NodeID"], soft=False)}
                self.actors[name] = actor.options(**options).remote(name, seconds, nvml)

    def take(self) -> dict[str, float]:
        asked = {name: actor.take.remote() for name, actor in self.actors.items()}
        ready, _ = self.ray.wait(list(asked.values()), num_returns=len(asked), timeout=_SECONDS) if asked else ([], [])
        found: dict[str, float] = {}
        for name, answer in asked.items():
            if answer not in ready:  # it is starting, or its node is busy: next time
                continue
            try:
                found |= self.ray.get(answer)
            except self.failures as error:
                logger.warning(f"logger.monitor_gpus: nothing more from {name}: {type(error).__name__}")
                del self.actors[name]
        return found

    def close(self) -> None:
        for actor in self.actors.values():
            self.ray.kill(actor)


@contextmanager
def monitored(wanted: bool, *, over_ray: bool) -> Iterator[Monitor]:
    """A monitor for as long as the block lasts."""
    monitor: Monitor = NoMonitor()
    if wanted:
        monitor = NodeMonitors() if over_ray else GpuMonitor()
    try:
        yield monitor
    finally:
        monitor.close()

"""GPU monitoring on a cluster: an actor on every node, with simulated answers of NVML, since tests have no GPU."""

from __future__ import annotations

import time
from types import SimpleNamespace

from fastkd.monitors import NodeMonitors

NODES = {"head", "node-1", "node-2", "node-3"}


class SimulatedNvml:
    """One GPU at 75 %; answers by the names that pynvml has (tests/test_gpu_monitor.py compares them)."""

    class NVMLError(Exception):
        pass

    NVML_TEMPERATURE_GPU = 0

    def nvmlInit(self):
        pass

    def nvmlDeviceGetCount(self):
        return 1

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetUtilizationRates(self, device):
        return SimpleNamespace(gpu=75)

    def nvmlDeviceGetMemoryInfo(self, device):
        return SimpleNamespace(used=3 << 30)

    def nvmlDeviceGetPowerUsage(self, device):
        return 200_000

    def nvmlDeviceGetTemperature(self, device, sensor):
        return 50


def test_every_node_tells_of_its_gpus_until_it_is_lost(cluster):
    import ray

    monitors = NodeMonitors(nvml=SimulatedNvml())
    assert set(monitors.actors) >= NODES - {"head"}
    names = set(monitors.actors)
    wanted = {f"gpu/{name}/0/{what}" for name in names for what in ("utilization", "memory_gib", "watts", "celsius")}
    found: dict[str, float] = {}
    deadline = time.monotonic() + 120
    while set(found) != wanted and time.monotonic() < deadline:  # actors start one after another
        found |= monitors.take()
    assert set(found) == wanted
    assert found["gpu/node-2/0/utilization"] == 75.0 and found["gpu/node-2/0/memory_gib"] == 3.0
    ray.kill(monitors.actors["node-2"])
    while "node-2" in monitors.actors and time.monotonic() < deadline:
        monitors.take()
    assert set(monitors.actors) == names - {"node-2"}
    assert monitors.take()["gpu/node-1/0/watts"] == 200.0
    monitors.close()

"""A Ray cluster of several nodes made of processes on this machine: the real thing, but for the machines.

Every node has its own raylet, object store and name, so placement, transfers and lost nodes behave as on a cluster.
What it cannot show is speed: all nodes share this machine's cores and memory.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray  # pyright: ignore[reportMissingImports]

from fastkd.placement import SLOT

_STORE_BYTES = 128 << 20
# A lost node is noticed after three seconds instead of Ray's fifteen.
_HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 3,
}
_PATIENT = {
    "health_check_initial_delay_ms": 60_000,
    "health_check_period_ms": 10_000,
    "health_check_timeout_ms": 60_000,
    "health_check_failure_threshold": 10,
}


@contextmanager
def simulated(
    nodes: int, slots: int, *, gpus: int = 0, store_bytes: int = _STORE_BYTES, patient: bool = False
) -> Iterator[Any]:
    """Nodes called node-1, node-2, … of ``slots`` workers each; this process joins. Gives Ray's ``Cluster``.

    ``gpus``: what a node says it has. ``patient``: a node that does not answer for minutes is not lost.
    For more workers than the machine has cores.
    """
    from ray.cluster_utils import Cluster  # pyright: ignore[reportMissingImports]

    folder = tempfile.mkdtemp(prefix="fkd")  # short: sockets have names of at most 107 characters
    # The default for zero GPUs, which Ray would hide from its workers, changes; this asks for the new one.
    changed = {"RAY_TMPDIR": folder, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    before = {name: os.environ.get(name) for name in (*changed, "RAY_ADDRESS")}
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.update(changed)
    os.makedirs(os.path.join(folder, "ray"))
    health = _PATIENT if patient else _HEALTH
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": store_bytes, "node_name": "head"}
    cluster = Cluster(initialize_head=True, head_node_args={**head, "_system_config": health})
    try:
        for number in range(1, nodes + 1):
            cluster.add_node(
                num_cpus=1,
                num_gpus=gpus,
                resources={SLOT: slots},
                object_store_memory=store_bytes,
                node_name=f"node-{number}",
            )
        ray.init(address=cluster.address, logging_level=logging.WARNING)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        shutil.rmtree(folder, ignore_errors=True)

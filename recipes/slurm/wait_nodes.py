"""Waits until a Ray cluster has so many nodes: ``python wait_nodes.py ADDRESS COUNT SECONDS``; exit code 1 if not."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time

# A library that is not there yet must not be asked to wait for minutes: knock first.
os.environ.pop("RAY_ADDRESS", None)


def listening(address: str) -> bool:
    """Whether anybody accepts connections there."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
        return False
    return True


def main(address: str, count: int, seconds: float) -> int:
    """Exit code: 0 once ``count`` nodes are alive."""
    deadline, seen = time.monotonic() + seconds, -1
    while not listening(address):
        if time.monotonic() > deadline:
            print(f"no Ray head answers at {address}", flush=True)
            return 1
        time.sleep(0.5)
    import ray

    ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    while True:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        if len(nodes) != seen:
            seen = len(nodes)
            names = ", ".join(sorted(node["NodeName"] for node in nodes))
            print(f"{time.strftime('%F %T')} {seen} of {count} nodes: {names}", flush=True)
        if seen >= count:
            return 0
        if time.monotonic() > deadline:
            print(f"only {seen} of {count} nodes joined in {seconds:g} s", flush=True)
            return 1
        time.sleep(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))

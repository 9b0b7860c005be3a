"""Adapters over a sharded base: one step on every mesh equals one process. One launch per number of ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("lora_worker.py")


@pytest.mark.parametrize("ranks", [2, 4])
def test_adapters_equal_one_process(ranks, tmp_path):
    paths = [str(WORKER.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(WORKER), str(tmp_path / "rendezvous"), str(ranks)]
    logs = [tmp_path / f"rank_{rank}.log" for rank in range(ranks)]  # files: a full pipe would stop a rank
    workers = [
        subprocess.Popen([*command, str(rank)], env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT)
        for rank, log in enumerate(logs)
    ]
    try:
        for worker in workers:
            worker.wait(timeout=600)
    finally:
        for worker in workers:
            worker.kill()
    messages = "\n".join(log.read_text()[-3000:] for log in logs)
    assert [worker.returncode for worker in workers] == [0] * ranks, messages

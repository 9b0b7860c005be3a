"""Starting worker programs: one process per rank, all of them ended with the test."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def launch(tmp_path_factory) -> Callable[..., str]:
    """``launch(program, ranks, argument…)`` runs ``program argument… RANKS RANK`` for every rank, to its end.

    Gives what rank 0 printed. A rank that fails ends the others, which would wait for it, and the test.
    """

    def start(program: Path | str, ranks: int, *arguments: object, timeout: float = 900) -> str:
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, str(program), *map(str, arguments), str(ranks)]
        folder = tmp_path_factory.mktemp("logs")
        logs = [folder / f"rank_{rank}.log" for rank in range(ranks)]  # files: a full pipe would stop a rank
        workers = [
            subprocess.Popen([*command, str(rank)], env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT)
            for rank, log in enumerate(logs)
        ]
        end = time.monotonic() + timeout
        try:
            while any(worker.poll() is None for worker in workers):
                if time.monotonic() > end:
                    break
                if any(worker.returncode for worker in workers):
                    end = min(end, time.monotonic() + 5)  # time for the others to say what they saw
                time.sleep(0.1)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        messages = "\n".join(f"--- rank {rank}\n{log.read_text()[-3000:]}" for rank, log in enumerate(logs))
        assert [worker.returncode for worker in workers] == [0] * ranks, messages
        return logs[0].read_text()

    return start

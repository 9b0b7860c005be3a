"""A student sharded over processes of its own into an engine sharded over others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from multiprocessing.connection import Listener
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("sync_worker.py")


@pytest.mark.parametrize(
    ("kind", "sharding"), [("qwen3", {"tensor_parallel_size": 2}), ("llama", {})], ids=["tied-tp2", "untied-dp2"]
)
def test_from_two_trainers_into_two_workers(kind, sharding, engines, build_folder, tokenizer):
    engine = engines(kind, tp=2)
    paths = [str(WORKER.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    with Listener(("127.0.0.1", 0), authkey=b"test") as listener:
        words = [
            str(build_folder(kind)),
            *map(json.dumps, (sharding, listener.address, engine.workers, len(tokenizer))),
        ]
        running = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", WORKER, *words],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            serve(listener, engine, running)
            out, _ = running.communicate(timeout=300)
        finally:
            running.kill()
    assert running.returncode == 0, out[-6000:]
    assert "version 2 Probed" in out, out
    for rank in (0, 1):
        assert f"rank {rank} refused: weights of version 9 did not reach the engines: the engine is gone" in out, out


def serve(listener, engine, running) -> None:
    """Calls from the first trainer, until it says None or is gone."""
    listener._listener._socket.settimeout(1)
    connection = None
    while connection is None:
        with suppress(TimeoutError):
            connection = listener.accept()
        if running.poll() is not None:
            return
    try:
        while (message := connection.recv()) is not None:
            method, args = message
            try:
                connection.send((False, getattr(engine, method)(*args)))
            except Exception as error:
                connection.send((True, str(error)))
    except EOFError:
        return

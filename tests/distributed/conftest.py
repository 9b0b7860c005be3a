"""Starting worker programs: one process per rank, all of them ended with the test.

Ranks are forked from one process that has imported torch, transformers and fastkd already: importing them takes longer
than most of these programs. It does nothing else, so it has no threads that a fork would lose.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
IMPORTED = ["__main__", "torch.distributed.checkpoint", "fastkd.checkpoint", "fastkd.student", "fastkd.teacher"]


@pytest.fixture(scope="session")
def launch(tmp_path_factory) -> Callable[..., str]:
    """``launch(program, ranks, argument…)`` runs ``program argument… RANKS RANK`` for every rank, to its end.

    Gives what rank 0 printed. A rank that fails ends the others, which would wait for it, and the test.
    """
    sys.path[:0] = [path for path in (str(HERE), str(HERE.parents[1])) if path not in sys.path]  # ranks inherit it
    import rank as rank_program

    on_gpus = os.environ.get("FASTKD_TEST_DEVICE") == "cuda"  # worker_inputs.DEVICE
    context = multiprocessing.get_context("spawn" if on_gpus else "forkserver")
    if not on_gpus:
        context.set_forkserver_preload(IMPORTED)

    def start(program: Path | str, ranks: int, *arguments: object, timeout: float = 900) -> str:
        folder = tmp_path_factory.mktemp("logs")
        logs = [folder / f"rank_{rank}.log" for rank in range(ranks)]
        given = [*map(str, arguments), str(ranks)]
        workers: list[BaseProcess] = []
        end = time.monotonic() + timeout
        try:
            for rank, log in enumerate(logs):
                log.touch()
                worker = context.Process(target=rank_program.run, args=(str(program), [*given, str(rank)], str(log)))
                with pytest.MonkeyPatch.context() as patch:
                    patch.setenv("LOCAL_RANK", str(rank))  # a forked rank does not see it
                    worker.start()
                workers.append(worker)
            while any(worker.is_alive() for worker in workers):
                if time.monotonic() > end:
                    break
                if any(worker.exitcode for worker in workers):
                    end = min(end, time.monotonic() + 5)  # time for the others to say what they saw
                time.sleep(0.05)
        finally:
            for worker in workers:
                worker.kill()
                worker.join()
        messages = "\n".join(f"--- rank {rank}\n{log.read_text()[-3000:]}" for rank, log in enumerate(logs))
        assert [worker.exitcode for worker in workers] == [0] * ranks, messages
        return logs[0].read_text()

    return start

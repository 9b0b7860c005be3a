"""What real ranks hold on (tp, dp) of (1, 1), (2, 1), (1, 2) and (2, 2), recompute or not, is what is planned.

Parameters, gradients and optimizer state to the byte, the loss kernel within 10 %. ``tests/test_plan_memory.py``
compares the peak too, of one rank without collectives.
"""

from __future__ import annotations

from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("memory_worker.py")


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_real_ranks_memory_is_the_plans(ranks, tmp_path, launch):
    from benchmarks.memory_grid import write_model  # where ``launch`` looks too

    write_model(tmp_path, vocab=5001, hidden=256, layers=2)
    launch(WORKER, ranks, tmp_path)

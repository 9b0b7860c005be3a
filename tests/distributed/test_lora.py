"""Adapters over a sharded base: one step on every mesh equals one process. One launch per number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("lora_worker.py")


@pytest.mark.parametrize("ranks", [2, 4])
def test_adapters_equal_one_process(ranks, tmp_path, launch):
    launch(WORKER, ranks, tmp_path / "rendezvous")

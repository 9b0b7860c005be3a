"""The workers under torchrun: metrics and weights after two optimizer steps equal one process's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastkd.errors import UserError
from fastkd.process_group import joined

WORKER = Path(__file__).with_name("student_worker.py")


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_under_torchrun(ranks, tmp_path, tiny_qwen3):
    for name, seed in (("student", 0), ("teacher", 1)):
        tiny_qwen3(tied=name == "student", seed=seed, num_hidden_layers=1).save_pretrained(tmp_path / name)
    paths = [str(WORKER.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", WORKER, tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.stdout.count("largest relative error") >= 3


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, "RANK.*its place in its group.*torchrun"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2.*below WORLD_SIZE=2"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK.*whole number"),
    ],
)
def test_a_wrong_environment(environment, words, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    if environment:
        environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words), joined("cpu"):
        pass

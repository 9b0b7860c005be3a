"""Rehearsals on simulated nodes: the whole command in a process of its own, since it starts a cluster."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys

import pytest


def rehearse(root, recipe, *more, expected=0):
    """What the command prints."""
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "fastkd.run", str(root / "recipes" / recipe), *map(str, more), "--rehearse"]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=1800)
    assert done.returncode == expected, f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def test_three_isolated_nodes(root, tmp_path):
    """The smoke recipe with two GPUs a node in place of four, for time."""
    told = rehearse(root, "smoke_isolated_4b_to_1.7b.yaml", "cluster.gpus_per_node=2", "--keep", tmp_path / "kept")
    assert "passed." in told and "FAILED" not in told
    nodes = dict(
        re.findall(r"^  (training|generation|teacher): 2 worker\(s\) on 1 node\(s\) \((node-\d)\)", told, re.M)
    )
    assert len(set(nodes.values())) == 3, nodes
    assert "training: 2 worker(s) on 1 node(s) (node-1), data × context × tensor parallel 1 × 1 × 2" in told
    assert re.search(r"^all +\d+\.\d +\d\.\d\d$", told, re.M), "time and peak memory"
    assert re.search(r"student: layers +28 +2 *$", told, re.M) and "vLLM" in told
    run = tmp_path / "kept" / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(math.isfinite(line["train/loss"]) for line in lines)
    assert sorted(one.name for one in (run / "checkpoints").iterdir()) == ["step_2", "step_3"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "workers"), [("topk512_qwen3_1b7", 16), ("topk512_qwen3_4b", 28), ("topk512_qwen3_14b", 38)]
)
def test_the_large_ones(root, recipe, workers):
    """Forty processes that import torch: ten minutes and 14 GB on two cores."""
    told = rehearse(root, f"{recipe}.yaml")
    assert sum(int(count) for count in re.findall(r"^  \w+: (\d+) worker\(s\) on", told, re.M)) == workers
    peak = re.search(r"^all +\d+\.\d +(\d+\.\d\d)$", told, re.M)
    assert peak and float(peak[1]) < 24

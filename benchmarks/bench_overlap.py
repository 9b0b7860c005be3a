"""What overlap gains: the step of three roles with known latencies, on policy and one step off it.

    pytest benchmarks/bench_overlap.py --benchmark

Real pools of Ray actors on a simulated cluster, real models, and a wait in each role (benchmarks/slow_workers.py), so
that what is measured is the schedule: on policy a step should take the sum of its roles, off policy the longest.
Nothing is timed before the metrics of an on-policy step equal those of one process.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from benchmarks.measure import Bench
from benchmarks.records import Row

ROOT = Path(__file__).resolve().parents[1]
STEPS = 5
SETTINGS = [
    "distillation.num_prompts_per_step=32",
    "policy.train_global_batch_size=32",
    "policy.generation_batch_size=2",
    f"distillation.max_num_steps={STEPS}",
    "distillation.val_at_start=false",
    "distillation.val_at_end=false",
    "distillation.val_period=0",
    "policy.dtensor_cfg.tensor_parallel_size=1",
    "teacher.dtensor_cfg.tensor_parallel_size=1",
    "cluster.cpu_slots_per_node=1",
    "logger.num_val_samples_to_print=0",
    "checkpointing.enabled=false",
]
RAY = ["cluster.num_nodes=4", "distillation.resource_isolation.roles.generation.num_nodes=2"]


def lines(recipe: str, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    from fastkd import runner
    from fastkd.recipe import load_recipe

    runner.run(load_recipe(ROOT / "recipes" / recipe, [*SETTINGS, f"logger.log_dir={folder}", *overrides]))
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


def test_overlap(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    from benchmarks import slow_workers
    from fastkd import cluster_workers

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    alone = lines("arithmetic_cpu.yaml", tmp_path / "alone", "distillation.max_num_steps=1")
    for role in ("generator", "scorer", "learner"):
        monkeypatch.setattr(cluster_workers, role, getattr(slow_workers, role))
    seconds = slow_workers.SECONDS
    rows: list[Row] = []
    for lead, expected in ((0, sum(seconds.values())), (1, max(seconds.values()))):
        found = lines(
            "arithmetic_ray_cpu.yaml", tmp_path / str(lead), *RAY, f"distillation.max_off_policy_steps={lead}"
        )
        if lead == 0:
            assert found[0]["train/loss"] == pytest.approx(alone[0]["train/loss"], rel=1e-5)
        # The first two steps fill the pipeline.
        step = median(line["timing/step"] for line in found[2:])
        rows.append(
            {
                "max_off_policy_steps": str(lead),
                **{f"{role} s": value for role, value in seconds.items()},
                "step s": step,
                "sum or longest s": expected,
                "ratio": step / expected,
                **{f"{role} busy %": 100 * median(one[f"timing/busy_{role}"] for one in found[2:]) for role in seconds},
            }
        )
    bench.report("overlap", "Step of roles with known latencies, simulated cluster of 4 nodes", rows)

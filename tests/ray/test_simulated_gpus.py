"""The whole loop on a cluster whose nodes have two simulated GPUs each, against one process on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastkd import runner
from fastkd.recipe import load_recipe

SHORT = [
    "distillation.num_prompts_per_step=8",
    "policy.train_global_batch_size=8",
    "policy.generation_batch_size=2",
    "distillation.max_num_steps=2",
    "distillation.val_period=2",
    "distillation.max_val_samples=8",
    "distillation.val_batch_size=8",
    "checkpointing.save_period=1",
    "logger.num_val_samples_to_print=0",
]
SHARED = [  # one node, whose two GPUs all roles share: they take turns with the memory
    "distillation.resource_isolation.enabled=false",
    "policy.generation.colocated.enabled=true",
    "policy.dtensor_cfg.tensor_parallel_size=1",
    "teacher.dtensor_cfg.tensor_parallel_size=1",
    "cluster.num_nodes=1",
]


def figures(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("timing/", "memory/", "sync/"))} for line in lines]


@pytest.fixture(scope="module")
def alone(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    runner.run(load_recipe(root / "recipes" / "arithmetic_cpu.yaml", [*SHORT, f"logger.log_dir={folder}"]))
    return figures(folder)


@pytest.mark.parametrize(
    "overrides", [pytest.param([], id="three nodes"), pytest.param(SHARED, id="one node", marks=pytest.mark.slow)]
)
def test_a_cluster_with_gpus_gives_what_one_process_gives(on_simulated_gpus, alone, tmp_path, overrides):
    output = on_simulated_gpus("tests/simulated_gpu/ray_run.py", tmp_path, *SHORT, *overrides)
    assert ("Isolated clusters created: train=1x2GPUs" in output) == (not overrides), output
    found = figures(tmp_path)
    assert [line["step"] for line in found] == [0, 1, 2]
    for ours, theirs in zip(found, alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)

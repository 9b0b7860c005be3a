"""A Ray cluster of three nodes on this machine, two worker slots each, that no other process joins."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("ray") is None:
    collect_ignore_glob = ["test_*.py"]  # pip install 'fastkd[ray]'

HERE = Path(__file__).resolve().parent
STORE = 80 << 20


@pytest.fixture(scope="session")
def cluster():
    """head (no slots), node-1, node-2, node-3; this process is a member."""
    from fastkd.simulated_cluster import simulated

    paths = [HERE, HERE.parent / "distributed", HERE.parents[1]]
    sys.path[:0] = [str(path) for path in paths[:2]]
    with pytest.MonkeyPatch.context() as patch:
        given = filter(None, [os.environ.get("PYTHONPATH")])
        patch.setenv("PYTHONPATH", os.pathsep.join([*map(str, paths), *given]))
        with simulated(3, 2, store_bytes=STORE) as nodes:
            yield nodes


@pytest.fixture
def isolated():
    """A recipe of three roles with a node each: isolated(folder, tensor_parallel_size=2, …)."""

    def build(folder: Path = Path("unused"), nodes: tuple[int, int, int] = (1, 1, 1), gpus: int = 0, **sharding):
        from fastkd.recipe import recipe_from

        roles = dict(zip(("training", "generation", "teacher"), nodes, strict=True))
        return recipe_from(
            {
                "distillation": {
                    "topk_logits_k": 64,
                    "num_prompts_per_step": 14,
                    "resource_isolation": {
                        "enabled": True,
                        "roles": {role: {"num_nodes": n, "gpus_per_node": gpus} for role, n in roles.items()},
                    },
                },
                "loss_fn": {"kl_type": "reverse", "outside_topk": "bucket"},
                "policy": {
                    "model_name": str(folder / "student"),
                    "precision": "float32",
                    "max_total_sequence_length": 128,
                    "train_global_batch_size": 7,
                    "train_micro_batch_size": 2,
                    "dtensor_cfg": sharding,
                    "generation": {"colocated": {"enabled": False}},
                    # A large eps: Adam divides by the gradient's size, and would make rounding errors large.
                    "optimizer": {"name": "torch.optim.AdamW", "kwargs": {"lr": 1e-3, "eps": 1e-3}},
                },
                "teacher": {"model_name": str(folder / "teacher")},
                "data": {"train": {"data_path": "unused.jsonl"}},
                "cluster": {"num_nodes": sum(nodes), "gpus_per_node": gpus},
            }
        ).recipe

    return build


@pytest.fixture
def placement(cluster, isolated):
    """The three roles on the three nodes."""
    from fastkd.placement import Placement

    with Placement(isolated(), cpu_slots=2) as made:
        yield made

"""Recipes as users of the isolation and context-distillation fork keep them load with at most lines on ignored keys."""

from pathlib import Path

import pytest

from fastkd.checks import check
from fastkd.config.ignored import reason_ignored
from fastkd.recipe import load_recipe, recipe_from

FIXTURES = Path(__file__).resolve().parent / "recipes"
# name: nodes, (training, generation, teacher) devices, keys whose files are on another machine
FORK = {
    "fork_topk512_1b7": (4, (4, 8, 4), set()),
    "fork_topk512_14b": (
        11,
        (32, 8, 4),
        {
            "policy.model_name",
            "teacher.model_name",
            "data.train.data_path",
            "distillation.context_distillation.teacher_prefix_template",
        },
    ),
    "fork_isolated_smoke_14b_to_4b": (3, (4, 4, 4), set()),
    "fork_context_1n4g": (1, (4, 4, 4), set()),
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("HF_HUB_OFFLINE", "SLURM_NNODES", "SLURM_JOB_NUM_NODES", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", FORK)
def test_loads_unchanged(name):
    nodes, sizes, absent = FORK[name]
    loaded = load_recipe(FIXTURES / f"{name}.yaml")
    assert (loaded.recipe.cluster.num_nodes, tuple(loaded.recipe.role_sizes)) == (nodes, sizes)
    assert loaded.ignored and all(
        len(str(key).splitlines()) == 1 and reason_ignored(key.name) for key in loaded.ignored
    )
    assert {error.key for error in check(loaded).errors} == absent


def test_its_values_arrive():
    recipe = load_recipe(FIXTURES / "fork_topk512_14b.yaml").recipe
    context = recipe.distillation.context_distillation
    assert context.static_trace.answer_column == "ground_truth_solution"
    assert (context.overflow_policy, context.trace_extractor.missing_trace_policy) == (
        "truncate_prefix_from_end",
        "drop_sample",
    )
    assert recipe.policy.model_name.endswith("40c069824f4251a91eefaf281ebe4c544efd3e18")
    assert recipe.teacher.model_name == recipe.policy.model_name
    assert recipe.policy.sequence_packing.enabled and not recipe.policy.dynamic_batching.enabled
    assert recipe.policy.optimizer.kwargs["lr"] == 3e-6
    assert recipe.data.train[0].prompt_file is None


def test_keys_once_under_data():
    tree = {
        "policy": {"model_name": "s"},
        "teacher": {"model_name": "t"},
        "data": {
            "train": {"data_path": "d"},
            "prompt_file": "old.txt",
            "env_name": "math",
            "default": {"env_name": "x"},
        },
    }
    dataset = recipe_from(tree).recipe.data.train[0]
    assert (dataset.prompt_file, dataset.env_name) == ("old.txt", "x")
    assert recipe_from(tree, ["data.prompt_file=new.txt"]).recipe.data.train[0].prompt_file == "new.txt"

"""The loop on a cluster with vLLM for generation and for the teacher, one step off policy."""

from __future__ import annotations

import pytest
import torch

from fastkd import metrics, runner
from fastkd.driver import prepare
from fastkd.errors import RecipeErrors
from fastkd.recipe import load_recipe

SETTINGS = [
    "policy.generation.backend=vllm",
    "teacher.backend=vllm",
    "policy.generation.sync_probe={period: 2, tolerance: 0.001}",
    "distillation.max_off_policy_steps=1",
    "distillation.num_prompts_per_step=16",
    "policy.train_global_batch_size=16",
    "policy.generation_batch_size=4",
    "policy.dtensor_cfg.tensor_parallel_size=1",
    "teacher.dtensor_cfg.tensor_parallel_size=1",
    "cluster.cpu_slots_per_node=1",
    "distillation.max_num_steps=4",
    "distillation.val_period=0",
    "distillation.val_at_start=false",
    "distillation.val_at_end=false",
    "checkpointing.enabled=false",
]


def test_four_steps(engines, root, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    from fastkd.ray_roles import RayRoles
    from fastkd.teacher import Teacher

    engines.close()
    batches, train = [], RayRoles.train

    def watch(self, batch):
        batches.append((batch.rollouts, [batch.rows[place] for place in range(len(batch.rows))]))
        return train(self, batch)

    monkeypatch.setattr(RayRoles, "train", watch)
    monkeypatch.setenv("PYTHONPATH", str(root))
    loaded = load_recipe(root / "recipes" / "arithmetic_ray_cpu.yaml", [*SETTINGS, f"logger.log_dir={tmp_path}"])
    runner.run(loaded)
    lines = metrics.read(tmp_path / "metrics.jsonl")
    assert [line["rollout/staleness_max"] for line in lines] == [0, 1, 1, 1]
    # The sync of the beginning is probed, and every second one from there.
    assert ["sync/probe_error" in line for line in lines] == [False, True, False, True]
    assert all(line.get("sync/probe_error", 0) < 1e-4 for line in lines)
    for rollouts, _ in batches:
        for one in rollouts:
            assert one.versions[0] == (one.weights_version, 0) and len(one.logprobs) == len(one.response)
    # A batch of rows is that of fastkd's own teacher.
    rollouts, rows = batches[1]
    inputs = prepare(loaded)
    own = Teacher(inputs.recipe, torch.device("cpu"), inputs.teacher_vocab).score(rollouts)
    for found, ours in zip(rows, own, strict=True):
        assert (found.indices == ours.indices).float().mean() > 0.99  # of equal logits at the last place any is kept
        same = (found.indices == ours.indices).all(1)
        gaps = (found.logits - ours.logits)[same]
        torch.testing.assert_close(gaps, gaps[:, :1].expand_as(gaps), atol=1e-3, rtol=0)  # a constant of the row


def test_roles_that_share_devices(engines, root, turns_taken, tmp_path, monkeypatch):
    """Engines sleep while others work; they wake for new weights, and without any where validation samples twice."""
    pytest.importorskip("ray")
    engines.close()
    monkeypatch.setenv("PYTHONPATH", str(root))
    shared = [
        "teacher.backend=fastkd",
        "policy.generation.sync_probe={period: 1, tolerance: 0.001}",
        "distillation.max_off_policy_steps=0",
        "distillation.resource_isolation.enabled=false",
        "policy.generation.colocated.enabled=true",
        "cluster.num_nodes=1",
        "distillation.max_num_steps=2",
        "distillation.val_at_start=true",
        "distillation.max_val_samples=8",
    ]
    recipe = root / "recipes" / "arithmetic_ray_cpu.yaml"
    runner.run(load_recipe(recipe, [*SETTINGS, *shared, f"logger.log_dir={tmp_path}"]))
    lines = metrics.read(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all(line["sync/probe_error"] < 1e-4 for line in lines[1:])
    assert turns_taken == ["training", *["generation", "teacher", "training"] * 3]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["policy.generation.temperature=2.5"], "policy.generation.temperature=2.5: vLLM samples at temperatures from"),
        (["policy.generation.val_temperature=3"], "policy.generation.val_temperature=3.0: vLLM samples"),
        (["teacher.dtensor_cfg.context_parallel_size=2"], "vLLM does not cut sequences"),
        (["policy.generation.sync_probe.tolerance=0"], "policy.generation.sync_probe.tolerance"),
        (["policy.generation.sync_probe.period=-1"], "policy.generation.sync_probe.period"),
        (["teacher.backend=transformers"], "teacher.backend"),
        (
            [
                "distillation.context_distillation.enabled=true",
                "distillation.context_distillation.frozen_teacher_source=live",
            ],
            "a teacher in a vLLM engine keeps its weights",
        ),
    ],
)
def test_keys_that_vllm_cannot_follow(overrides, said, root):
    from fastkd.checks import load_and_check

    with pytest.raises(RecipeErrors, match=said.replace(".", r"\.")):
        load_and_check(root / "recipes" / "arithmetic_ray_cpu.yaml", [*SETTINGS, *overrides])


def test_the_same_temperatures_suit_transformers(root):
    from fastkd.checks import load_and_check

    loaded, report = load_and_check(
        root / "recipes" / "arithmetic_cpu.yaml", ["policy.generation.temperature=2.5", "loss_fn.temperature=2.5"]
    )
    assert loaded.recipe.policy.generation.temperature == 2.5 and not report.errors

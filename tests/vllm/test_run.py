"""The loop with a vLLM engine in the same process: one step after another, weights synced and probed."""

from __future__ import annotations

import pytest

from fastkd import metrics
from fastkd.driver import RunFolder, prepare
from fastkd.recipe import load_recipe


def test_three_steps(engines, root, tmp_path):
    from fastkd.runner import Runner
    from fastkd.vllm_roles import LocalVllmRoles

    loaded = load_recipe(
        root / "recipes" / "arithmetic_cpu.yaml",
        [
            "policy.generation.backend=vllm",
            "distillation.num_prompts_per_step=80",  # more prompt tokens than vLLM computes in one step
            "policy.train_global_batch_size=80",
            "distillation.max_num_steps=3",
            "distillation.val_period=0",
            "distillation.val_at_start=false",
            "distillation.val_at_end=false",
            f"logger.log_dir={tmp_path / 'run'}",
            "checkpointing.enabled=false",
        ],
    )
    sampled = []

    class Recording(LocalVllmRoles):
        def collect(self, prompts, request, phase):
            scored = super().collect(prompts, request, phase)
            found = [logprob for one in scored.rollouts for logprob in one.logprobs]
            sampled.append((sum(found) / len(found), {one.weights_version for one in scored.rollouts}))
            return scored

    engines.close()
    inputs = prepare(loaded)
    folder = RunFolder(inputs.recipe)
    folder.record(loaded)
    roles = Recording(inputs)
    try:
        Runner(loaded, inputs, folder, roles).run()
    finally:
        roles.close()
        folder.close()
    lines = metrics.read(folder.metrics)
    assert [line["step"] for line in lines] == [1, 2, 3]
    # What the engine says of its samples is what the trainer says of them, with the weights of that step.
    assert [line["train/label_logprob"] for line in lines] == pytest.approx([one for one, _ in sampled], abs=1e-5)
    assert [versions for _, versions in sampled] == [{0}, {1}, {2}]
    assert all(line["sync/probe_error"] < 1e-4 for line in lines)
    assert lines[-1]["sync/probe_moved"] > 0.01


def test_a_quantised_student(engines, root, tmp_path):
    """The engine samples with the values that the quantised layers multiply with, and quantises no inputs."""
    from fastkd import runner

    overrides = [
        "policy.generation.backend=vllm",
        "policy.generation.sync_probe={period: 1, tolerance: 0.001}",
        "distillation.num_prompts_per_step=16",
        "policy.train_global_batch_size=16",
        "policy.quant_calib_size=16",
        "distillation.max_num_steps=2",
        "distillation.val_period=0",
        "distillation.val_at_start=false",
        "distillation.val_at_end=false",
        "checkpointing.enabled=false",
        f"logger.log_dir={tmp_path / 'run'}",
    ]
    engines.close()
    runner.run(load_recipe(root / "recipes" / "qad_cpu.yaml", overrides))
    lines = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["sync/probe_error"] < 1e-4 for line in lines)
    assert lines[-1]["sync/probe_moved"] > 1e-3

"""Context self-distillation from the recipe to the run folder: metrics, moving teachers, resumes, and that it learns.

Runs are real ones of the shipped recipe; only the number of steps is small.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from fastkd import runner
from fastkd.recipe import load_recipe

CONTEXT = "distillation.context_distillation"
SHORT = [
    "distillation.num_prompts_per_step=8",
    "policy.train_global_batch_size=8",
    "distillation.max_num_steps=4",
    "distillation.val_period=2",
    "distillation.max_val_samples=8",
    "distillation.val_batch_size=8",
    "checkpointing.save_period=2",
    "logger.num_val_samples_to_print=0",
]
EMA = [f"{CONTEXT}.frozen_teacher_source=ema", f"{CONTEXT}.ema_decay=0.5", "distillation.val_teacher=false"]


@pytest.fixture
def run(root):
    def one(folder, *overrides):
        runner.run(
            load_recipe(
                root / "recipes" / "context_arithmetic_cpu.yaml", [*SHORT, f"logger.log_dir={folder}", *overrides]
            )
        )
        lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
        return lines, json.loads((folder / "summary.json").read_text())

    return one


def reproducible(lines):
    return [{k: v for k, v in line.items() if not k.startswith(("timing/", "memory/"))} for line in lines]


def test_a_run_records_what_the_teacher_read(run, tmp_path):
    lines, summary = run(tmp_path / "run", "teacher.max_total_sequence_length=95")
    for line in lines[1:]:
        assert line["context_distillation_trace_coverage"] == 1.0
        assert line["context_distillation_prefix_length"] > line["rollout/mean_prompt_length"] + 15
        # Some responses leave less than the prefix's 65 tokens or so of the 95.
        assert 0 < line["context_distillation_prefix_truncation_rate"] <= 1
        assert line["context_distillation_dropped_samples"] == 0.0
    assert "validation/context_distillation_trace_coverage" in lines[0]
    rates = [line["context_distillation_prefix_truncation_rate"] for line in lines[1:]]
    assert summary["context_distillation_prefix_truncation_rate"] == pytest.approx(sum(rates) / len(rates))
    assert summary["context_distillation_dropped_no_prefix_budget"] == 0.0
    # The teacher answers its own prompts, with the solution in them.
    assert summary["teacher_accuracy"] >= 0.75 > 0.5 > summary["accuracy_before"]


def test_a_run_without_any_trace_trains_on_nothing_and_ends(run, tmp_path, arithmetic):
    """The arithmetic models never think, so every sample is dropped, at training and at validation."""
    lines, summary = run(
        tmp_path / "run",
        f"{CONTEXT}.trace_source=dynamic",
        f"{CONTEXT}.trace_extractor.missing_trace_policy=drop_sample",
        "distillation.val_teacher=false",
    )
    for line in lines[1:]:
        assert line["context_distillation_dropped_missing_trace"] == line["context_distillation_dropped_samples"] == 8.0
        assert line["context_distillation_trace_coverage"] == 0.0 and "train/loss" not in line
        assert line["rollout/mean_length"] > 0  # what was sampled is still reported
    assert summary["kl_first"] is None and summary["context_distillation_dropped_samples"] == 32.0
    before = load_file(arithmetic / "reader" / "model.safetensors")
    after = load_file(tmp_path / "run" / "export" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_trace_by_pattern_out_of_the_response(run, tmp_path):
    lines, _ = run(
        tmp_path / "run",
        f"{CONTEXT}.trace_source=dynamic",
        f"{CONTEXT}.trace_extractor.type=regex",
        rf"{CONTEXT}.trace_extractor.pattern='ones(.*), tens'",
    )
    assert lines[1]["context_distillation_trace_coverage"] > 0.5 and lines[1]["train/loss"] > 0


@pytest.mark.parametrize("adapters", [[], ["policy.dtensor_cfg.lora_cfg.enabled=true"]], ids=["full", "lora"])
def test_a_running_mean_resumes_bit_for_bit(run, tmp_path, adapters):
    undisturbed, _ = run(tmp_path / "whole", *EMA, *adapters)
    frozen, _ = run(tmp_path / "frozen", *adapters)
    assert undisturbed[2]["train/loss"] != frozen[2]["train/loss"]  # the mean has moved after one step
    run(tmp_path / "parts", *EMA, *adapters, "distillation.max_num_steps=2")
    again, _ = run(tmp_path / "parts", *EMA, *adapters)
    assert reproducible(again)[1:] == reproducible(undisturbed)[1:]
    for name, weight in load_file(tmp_path / "whole" / "export" / "model.safetensors").items():
        assert torch.equal(weight, load_file(tmp_path / "parts" / "export" / "model.safetensors")[name])


def test_a_live_teacher_runs(run, tmp_path):
    lines, _ = run(tmp_path / "run", f"{CONTEXT}.frozen_teacher_source=live", "distillation.val_teacher=false")
    assert lines[-1]["train/loss"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", [42, 1, 2])
def test_the_student_learns_what_the_trace_shows(root, tmp_path, seed):
    """Held-out accuracy without the trace rises by far more than ten points."""
    runner.run(
        load_recipe(
            root / "recipes" / "context_arithmetic_cpu.yaml",
            [f"logger.log_dir={tmp_path}/run", f"distillation.seed={seed}"],
        )
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["accuracy_before"] < 0.4 and summary["teacher_accuracy"] > 0.97
    assert summary["accuracy_after"] >= summary["accuracy_before"] + 0.4
    assert summary["kl_last"] < summary["kl_first"] / 2
    assert summary["context_distillation_trace_coverage"] == 1.0

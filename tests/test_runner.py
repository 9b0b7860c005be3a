"""The whole loop on the shipped models: what it writes, how it resumes, and that a kill changes nothing.

Runs are real processes or real Runner objects on real data; only the number of steps is small.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastkd import runner
from fastkd.batch import Rollout
from fastkd.errors import NonFiniteLoss, WorkerError
from fastkd.kernels import TopK
from fastkd.recipe import load_recipe
from fastkd.roles import LocalRoles

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "arithmetic_cpu.yaml"
SHORT = [
    "distillation.num_prompts_per_step=8",
    "policy.train_global_batch_size=8",
    "distillation.max_num_steps=6",
    "distillation.val_period=3",
    "distillation.max_val_samples=8",
    "distillation.val_batch_size=8",
    "checkpointing.save_period=2",
    "logger.num_val_samples_to_print=1",
]


def command(folder, *overrides):
    return [sys.executable, "-m", "fastkd.run", str(RECIPE), *SHORT, f"logger.log_dir={folder}", *overrides]


def run(folder, *overrides, expect=0):
    done = subprocess.run(command(folder, *overrides), capture_output=True, text=True, timeout=600)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def reproducible(folder):
    """metrics.jsonl without what a clock or the allocator decides."""
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("timing/", "memory/"))} for line in lines]


def weights(folder):
    return load_file(folder / "export" / "model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run that nobody disturbs, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    return folder, run(folder)


def test_what_a_run_leaves_behind(undisturbed):
    folder, printed = undisturbed
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary) == {
        "accuracy_before",
        "accuracy_after",
        "teacher_accuracy",
        "kl_first",
        "kl_last",
        "steps",
        "tokens",
        "seconds",
    }
    assert summary["steps"] == 6 and summary["tokens"] > 6 * 8 * 20 and summary["teacher_accuracy"] >= 0.8
    assert [line["step"] for line in reproducible(folder)] == [0, 1, 2, 3, 4, 5, 6]
    assert "validation/accuracy" in reproducible(folder)[0] and "validation/kl" in reproducible(folder)[3]
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert {"recipe.yaml", "environment.json", "validation", "checkpoints"} <= set(os.listdir(folder))
    assert len((folder / "validation" / "step_6.jsonl").read_text().splitlines()) == 8
    assert "step 6/6 | jsd " in printed and "distillation finished" in printed
    assert "\x1b[" not in printed  # not a terminal: plain lines, no control characters


def test_the_saved_recipe_is_the_run(undisturbed):
    folder, _ = undisturbed
    again = load_recipe(folder / "recipe.yaml")
    assert again.recipe == load_recipe(RECIPE, [*SHORT, f"logger.log_dir={folder}"]).recipe


def test_the_export_loads_in_transformers_and_is_the_trained_student(undisturbed, arithmetic):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _ = undisturbed
    model = AutoModelForCausalLM.from_pretrained(folder / "export")
    tokenizer = AutoTokenizer.from_pretrained(folder / "export")
    assert model.config.model_type == "qwen3"
    assert "1 + 1?" in tokenizer.apply_chat_template([{"role": "user", "content": "1 + 1?"}], tokenize=False)
    base = load_file(arithmetic / "student" / "model.safetensors")
    moved = weights(folder)
    assert base.keys() == moved.keys()
    assert any(not torch.equal(base[name], moved[name]) for name in base)


def test_the_same_command_again_says_complete_and_more_steps_resume(undisturbed, tmp_path):
    folder, _ = undisturbed
    before = (folder / "metrics.jsonl").read_text()
    assert "this run is complete" in run(folder)
    assert (folder / "metrics.jsonl").read_text() == before

    import shutil

    longer = tmp_path / "longer"
    shutil.copytree(folder, longer)
    printed = run(longer, f"checkpointing.checkpoint_dir={longer}/checkpoints", "distillation.max_num_steps=8")
    assert "resumed from" in printed and "step_6" in printed
    assert "changed since this run began: distillation.max_num_steps 6 -> 8" in printed
    assert [line["step"] for line in reproducible(longer)] == list(range(9))
    assert reproducible(longer)[:7] == reproducible(folder)
    assert json.loads((longer / "summary.json").read_text())["steps"] == 8


@pytest.mark.parametrize(
    "moment",
    ["step 1/", *(pytest.param(f"step {n}/", marks=pytest.mark.slow) for n in (3, 5)), "step 4/", "saving"],
)
def test_a_killed_run_ends_bit_identical(undisturbed, tmp_path, moment):
    folder = tmp_path / "killed"
    process = subprocess.Popen(
        command(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    if moment == "saving":
        # While a checkpoint is being written: its temporary folder exists.
        while not list(folder.glob("checkpoints/tmp_step_4")):
            assert process.poll() is None, "the run ended before the checkpoint"
            time.sleep(0.0005)
    else:
        for line in process.stdout:
            if moment in line:
                break
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "summary.json").exists()
    run(folder)
    expected, _ = undisturbed
    assert reproducible(folder) == reproducible(expected)
    ours, theirs = weights(folder), weights(expected)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_damaged_newest_checkpoint_falls_back_and_says_so(undisturbed, tmp_path):
    import shutil

    expected, _ = undisturbed
    folder = tmp_path / "damaged"
    shutil.copytree(expected, folder)
    (folder / "summary.json").unlink()
    data = next((folder / "checkpoints" / "step_6" / "state").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-100])
    printed = run(folder, f"checkpointing.checkpoint_dir={folder}/checkpoints")
    assert "checkpoint step_6 is damaged" in printed and "resumed from" in printed and "step_4" in printed
    assert reproducible(folder) == reproducible(expected)
    assert all(torch.equal(weights(folder)[name], tensor) for name, tensor in weights(expected).items())


def test_nan_stops_with_the_step_and_keeps_the_last_good_checkpoint(tmp_path):
    folder = tmp_path / "nan"
    printed = run(
        folder,
        "policy.optimizer.kwargs.lr=1e25",
        "policy.scheduler=[]",
        "checkpointing.save_period=1",
        "policy.max_grad_norm=null",
        expect=1,
    )
    assert "NonFiniteLoss: step 2" in printed and "the last good checkpoint is" in printed
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_1"]
    assert not (folder / "summary.json").exists()


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    from fastkd.driver import RunFolder, locate
    from fastkd.errors import RecipeError

    recipe = locate(load_recipe(RECIPE, [*SHORT, f"logger.log_dir={tmp_path / 'run'}"]))
    first = RunFolder(recipe)
    with pytest.raises(RecipeError, match="another run is writing there"):
        RunFolder(recipe)
    first.close()
    RunFolder(recipe).close()


def make_runner(folder, *overrides):
    from fastkd.driver import RunFolder, prepare

    loaded = load_recipe(RECIPE, [*SHORT, f"logger.log_dir={folder}", *overrides])
    inputs = prepare(loaded)
    run_folder = RunFolder(inputs.recipe)
    run_folder.record(loaded)
    return runner.Runner(loaded, inputs, run_folder, LocalRoles(inputs))


def test_long_prompts_are_masked_and_counted(tmp_path):
    metrics = make_runner(tmp_path / "run", "data.max_input_seq_length=28").step()
    assert 0 < metrics["rollout/masked_samples"] < 8
    assert metrics["train/loss"] > 0


def test_several_generations_per_prompt_and_optimizer_steps(tmp_path):
    loop = make_runner(
        tmp_path / "run", "distillation.num_generations_per_prompt=2", "policy.train_global_batch_size=4"
    )
    loop.step()
    assert loop.roles.student.worker.version == 4
    assert loop.roles.generation.worker.weights_version == 4


def test_a_worker_failure_names_role_and_rank(tmp_path, monkeypatch):
    loop = make_runner(tmp_path / "run")
    monkeypatch.setattr(type(loop.roles.teacher.worker), "score", lambda self, rollouts: 1 / 0)
    with pytest.raises(WorkerError, match="teacher rank 0: ZeroDivisionError") as caught:
        loop.step()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_bfloat16_runs(tmp_path):
    metrics = make_runner(tmp_path / "run", "policy.precision=bfloat16").step()
    assert metrics["train/loss"] > 0 and metrics["train/grad_norm"] > 0


def test_tensorboard_files_on_request(tmp_path):
    loop = make_runner(tmp_path / "run", "logger.tensorboard_enabled=true", "distillation.max_num_steps=1")
    loop.last_step = 1
    loop.run()
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


def test_a_wall_clock_limit_saves_and_stops(tmp_path):
    loop = make_runner(
        tmp_path / "run", "checkpointing.checkpoint_must_save_by='00:00:00:00'", "checkpointing.save_period=100"
    )
    loop.run()
    assert loop.checkpoints.steps() == [1]
    assert not (tmp_path / "run" / "summary.json").exists()


def shifted(rows: list[TopK | None]) -> list[TopK | None]:
    """Teacher rows one token late: row j of every rollout scores token j-1."""
    return [row and TopK(*(None if field is None else field.roll(1, 0) for field in row)) for row in rows]


def bar(summary) -> bool:
    """What a successful run must reach."""
    return (
        summary["teacher_accuracy"] >= 0.80
        and 0.05 <= summary["accuracy_before"] <= 0.55
        and summary["accuracy_after"] >= summary["accuracy_before"] + 0.30
        and summary["accuracy_after"] >= 0.9 * summary["teacher_accuracy"]
        and summary["kl_last"] <= summary["kl_first"] / 5
    )


@pytest.mark.slow
@pytest.mark.parametrize("control", [False, True])
def test_the_shipped_recipe_reaches_its_bar_and_shifted_teacher_rows_do_not(tmp_path, monkeypatch, control):
    folder = tmp_path / "run"
    if control:
        from fastkd.teacher import Teacher

        honest = Teacher.score

        def score(self, rollouts: list[Rollout]):
            rows = honest(self, rollouts)
            # The validation keeps honest rows: only what the student learns from is wrong.
            return shifted(rows) if len(rollouts) == 64 else rows

        monkeypatch.setattr(Teacher, "score", score)
    try:
        runner.run(load_recipe(RECIPE, [f"logger.log_dir={folder}"]))
    except NonFiniteLoss:
        assert control
        return
    assert bar(json.loads((folder / "summary.json").read_text())) is not control


def _start_and_wait(folder, text, *overrides):
    """A run in a process of its own that has printed ``text``."""
    process = subprocess.Popen(command(folder, *overrides), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    printed = ""
    while text not in printed:
        line = process.stdout.readline()
        assert line, printed
        printed += line
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_in_good_order(undisturbed, tmp_path, number):
    folder = tmp_path / "run"
    process = _start_and_wait(folder, "step 1/", "checkpointing.save_period=100")
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0, printed
    assert "stopped by " + number.name in printed and "the same command resumes" in printed
    (saved,) = [path.name for path in (folder / "checkpoints").iterdir()]
    assert saved in ("step_1", "step_2", "step_3", "step_4", "step_5")
    assert not (folder / "summary.json").exists()
    run(folder, "checkpointing.save_period=100")
    assert reproducible(folder) == reproducible(undisturbed[0])
    for name, value in weights(undisturbed[0]).items():
        assert torch.equal(weights(folder)[name], value), name


def test_a_trace_of_the_run_opens(undisturbed):
    text = (undisturbed[0] / "trace.json").read_text()
    events = json.loads(text.rstrip().rstrip(",") + "]")
    spans = [event for event in events if event["ph"] == "X"]
    assert {"step", "generation", "teacher", "training", "validation", "checkpoint"} <= {e["name"] for e in spans}
    step = next(event for event in spans if event["name"] == "step")
    inside = [e for e in spans if step["ts"] <= e["ts"] and e["ts"] + e["dur"] <= step["ts"] + step["dur"] + 1000]
    assert {"generation", "teacher", "training"} <= {event["name"] for event in inside}

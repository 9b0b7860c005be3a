"""metrics.jsonl is cut back to the resumed step, and a step line has a fixed order with units."""

import json

import pytest

from fastkd.config.logger import Logger
from fastkd.metrics import Recorder, read, step_line
from fastkd.recipe import recipe_from


def logger(tmp_path, **changes) -> Logger:
    return recipe_from(
        {
            "policy": {"model_name": "a"},
            "teacher": {"model_name": "b"},
            "data": {"train": {"data_path": "c"}},
            "logger": {"log_dir": str(tmp_path), **changes},
        }
    ).recipe.logger


def write(tmp_path, resumed, steps, **changes):
    recorder = Recorder(tmp_path / "metrics.jsonl", logger(tmp_path, **changes), resumed, {})
    for step in steps:
        recorder.write(step, {"train/loss": 1 / (step + 1)})
    recorder.close()
    return [line["step"] for line in read(tmp_path / "metrics.jsonl")]


def test_lines_after_the_resumed_step_are_cut(tmp_path):
    assert write(tmp_path, None, range(5)) == [0, 1, 2, 3, 4]
    assert write(tmp_path, 2, [3, 4, 5]) == [0, 1, 2, 3, 4, 5]
    assert write(tmp_path, None, [0]) == [0]


def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path):
    write(tmp_path, None, range(3))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "train/lo')
    assert write(tmp_path, 2, [3]) == [0, 1, 2, 3]


def test_floats_survive_exactly(tmp_path):
    write(tmp_path, None, range(3))
    assert read(tmp_path / "metrics.jsonl")[2] == {"step": 2, "train/loss": 1 / 3}


def test_tensorboard_drops_what_is_done_again(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write(tmp_path, None, range(5), tensorboard_enabled=True)
    write(tmp_path, 2, [3], tensorboard_enabled=True)
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1, 2, 3]


def test_step_line():
    metrics = {
        "train/loss": 0.04131,
        "train/grad_norm": 0.914,
        "timing/tokens_per_second": 41_234.0,
        "timing/generation": 6.24,
        "timing/teacher": 3.1,
        "timing/training": 15.83,
        "timing/sync": 0.4,
        "memory/train_gib": 31.2,
        "memory/gen_gib": 33.0,
    }
    assert step_line(120, 1000, metrics) == (
        "step 120/1000 | kl 0.0413 | grad 0.91 | 41.2k tok/s | gen 6.24s teacher 3.10s train 15.8s sync 0.40s"
        " | mem train 31.2 gen 33.0 GiB"
    )
    assert "| jsd nan |" in step_line(1, 2, {k: v for k, v in metrics.items() if k != "train/loss"}, "jsd")


def test_lines_are_plain_json(tmp_path):
    write(tmp_path, None, [0])
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 0, "train/loss": 1.0}

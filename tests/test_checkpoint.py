"""A checkpoint is whole or absent; a damaged one is found out; retention keeps the best and the newest."""

import json

import pytest
import torch

from fastkd.checkpoint import Checkpoints, TrainingInfo
from fastkd.config import Checkpointing
from fastkd.errors import CheckpointError


def checkpoints(tmp_path, **changes):
    settings = {"checkpoint_dir": str(tmp_path / "checkpoints"), **changes}
    return Checkpoints(Checkpointing(**settings))


def state(value: float = 0.0):
    return {
        "model": {"weight": torch.full((4, 3), value)},
        "optimizer": {"state": {"weight": {"step": torch.tensor(value)}}},
    }


def save(store, step, accuracy=None):
    found = {"train/loss": 1.0 / step} | ({} if accuracy is None else {"validation/accuracy": accuracy})
    return store.save(TrainingInfo(step, step * 8, step * 100, 1.5, found), state(float(step)), "distillation: {}\n")


def test_round_trip(tmp_path):
    store = checkpoints(tmp_path)
    assert store.load_newest(state) is None
    save(store, 3)
    save(store, 5)
    info, loaded = store.load_newest(state)
    assert (info.step, info.consumed_prompts, info.total_tokens, info.metrics) == (5, 40, 500, {"train/loss": 0.2})
    assert torch.equal(loaded["model"]["weight"], torch.full((4, 3), 5.0))
    assert loaded["optimizer"]["state"]["weight"]["step"] == 5
    assert (store.path(5) / "recipe.yaml").read_text() == "distillation: {}\n"


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "metadata", "manifest"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, damage, caplog):
    store = checkpoints(tmp_path)
    save(store, 1)
    path = save(store, 2)
    data = next((path / "state").glob("*.distcp"))
    if damage == "flip":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif damage == "truncate":
        data.write_bytes(data.read_bytes()[:-7])
    elif damage == "remove":
        data.unlink()
    elif damage == "metadata":
        (path / "state" / ".metadata").write_bytes(b"nothing")
    else:
        (path / "manifest.json").unlink()
    with caplog.at_level("WARNING", logger="fastkd"):
        info, loaded = store.load_newest(state)
    assert info.step == 1
    assert torch.equal(loaded["model"]["weight"], torch.full((4, 3), 1.0))
    assert (store.folder / "corrupt_step_2").is_dir()  # kept for a look, out of the way of the next save
    assert store.steps() == [1]


def test_a_damaged_state_that_still_has_its_manifest_falls_back_too(tmp_path):
    # torch's CheckpointException is a BaseException: `except Exception` would let it through.
    store = checkpoints(tmp_path)
    save(store, 1)
    path = save(store, 2)
    next((path / "state").glob("*.distcp")).unlink()
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({n: v for n, v in manifest.items() if not n.endswith(".distcp")}))
    info, _ = store.load_newest(state)
    assert info.step == 1


def test_when_none_is_intact_it_stops_instead_of_starting_over(tmp_path):
    store = checkpoints(tmp_path)
    (save(store, 1) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="none is intact"):
        store.load_newest(state)


def test_an_unfinished_save_is_cleared_away(tmp_path):
    store = checkpoints(tmp_path)
    save(store, 1)
    (store.folder / "tmp_step_2" / "state").mkdir(parents=True)
    info, _ = store.load_newest(state)
    assert info.step == 1
    assert not list(store.folder.glob("tmp_*"))


@pytest.mark.parametrize("higher_is_better, kept", [(True, [2, 4, 5, 6]), (False, [1, 3, 5, 6])])
def test_retention_keeps_the_best_and_the_newest_two(tmp_path, higher_is_better, kept):
    store = checkpoints(tmp_path, keep_top_k=2, higher_is_better=higher_is_better)
    for step, accuracy in enumerate([0.1, 0.9, 0.2, 0.8, None, 0.5], start=1):
        save(store, step, accuracy)
    assert store.steps() == kept


def test_retention_without_a_metric_keeps_the_newest(tmp_path):
    store = checkpoints(tmp_path, keep_top_k=3, metric_name=None)
    for step in (1, 2, 3, 4):
        save(store, step)
    assert store.steps() == [2, 3, 4]


def test_retention_by_a_training_metric(tmp_path):
    store = checkpoints(tmp_path, keep_top_k=1, metric_name="train:loss", higher_is_better=False)
    for step in (1, 2, 3, 4):
        save(store, step)
    assert store.steps() == [3, 4]

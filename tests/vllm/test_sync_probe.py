"""What the probe accepts and refuses, on log-probabilities alone."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastkd.sync_probe import SyncMismatch, SyncProbe, probe_tokens, trainer_logprobs
from fastkd.weight_sync import Bucket, Entry, buckets, unpack

BEFORE = [-1.0, -2.0, -3.0]


def moved(by: float) -> list[float]:
    return [one + by for one in BEFORE]


def test_rounding_passes_and_is_measured():
    found = SyncProbe().check(BEFORE, [[-1.01, -2.0, -3.0], [-1.0, -2.03, -3.0]], 0)
    assert found.error == pytest.approx(0.01) and found.largest == pytest.approx(0.03)


@pytest.mark.parametrize("engine", [moved(0.021), [-1.0, -2.0, -3.07], [-1.0, math.nan, -3.0]])
def test_an_engine_that_is_off(engine):
    with pytest.raises(SyncMismatch, match=r"version 7 engine 1.*off by"):
        SyncProbe().check(BEFORE, [BEFORE, engine], 7)


def test_small_steps_of_the_trainer_add_up_until_an_engine_that_does_not_move_is_caught():
    probe = SyncProbe()
    probe.check(BEFORE, [BEFORE], 0)
    probe.check(moved(5e-5), [BEFORE], 1)
    with pytest.raises(SyncMismatch, match=r"version 2 engine 0.*did not arrive"):
        probe.check(moved(1.5e-4), [BEFORE], 2)


def test_an_engine_that_moves_a_little_less_often_is_fine():
    probe = SyncProbe()
    probe.check(BEFORE, [BEFORE], 0)
    probe.check(moved(5e-5), [BEFORE], 1)
    probe.check(moved(15e-5), [moved(15e-5)], 2)
    probe.check(moved(20e-5), [moved(15e-5)], 3)


def test_probe_tokens():
    text = list(range(100))
    tokens = probe_tokens(text, 50_000)
    assert len(tokens) == 64 and tokens[:48] == tuple(text[:48])
    assert tokens == probe_tokens(text, 50_000) and len(set(tokens[48:])) == 16
    assert max(probe_tokens((), 7)) < 7
    with pytest.raises(ValueError, match="vocab is 0"):
        probe_tokens((), 0)


@pytest.mark.parametrize("tied", [True, False])
def test_the_trainers_log_probabilities(tied, tiny_qwen3, tmp_path):
    from fastkd.recipe import recipe_from
    from fastkd.student import Student

    tiny_qwen3(tied=tied).save_pretrained(tmp_path)
    tree = {
        "policy": {"model_name": str(tmp_path), "precision": "float32"},
        "teacher": {"model_name": str(tmp_path)},
        "data": {"train": {"data_path": "unused.jsonl"}},
    }
    student = Student(recipe_from(tree).recipe, torch.device("cpu"), 99)
    tokens = probe_tokens((), 99)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        table = plain(torch.tensor([tokens])).logits[0, :, :99].log_softmax(-1)
    expected = table[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()
    assert trainer_logprobs(student, tokens) == pytest.approx(expected, abs=1e-5)
    assert student.causal_lm.training


def test_buckets_hold_what_fits_and_give_it_back():
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.arange(9),
        "d": torch.randn(40, 40),
        "e": torch.tensor(2.5),
    }
    entries = [Entry(name, one.dtype, tuple(one.shape)) for name, one in tensors.items()]
    made = list(buckets(entries, 160))
    assert [[one.name for one in bucket.entries] for bucket in made] == [["a", "b", "c"], ["d"], ["e"]]
    for bucket in made:
        data = torch.zeros(bucket.nbytes, dtype=torch.uint8)
        for entry, start in zip(bucket.entries, bucket.offsets, strict=True):
            data[start : start + entry.nbytes] = tensors[entry.name].reshape(-1).view(torch.uint8)
        for name, got in unpack(bucket, data):
            assert torch.equal(got, tensors[name]) and got.shape == tensors[name].shape
    assert isinstance(made[0], Bucket) and not list(buckets([], 1))

"""The checked sync of one trainer and its engine, as the loop calls it."""

from __future__ import annotations

import pytest
import torch

from fastkd.student import Student
from fastkd.sync_probe import SyncMismatch
from fastkd.verified_sync import VerifiedSync
from fastkd.weight_sync import GLOO, Engines


@pytest.fixture
def build(build_folder, build_recipe, tokenizer):
    def make(precision="float32", period=1):
        recipe = build_recipe(build_folder("shipped"), precision, sync_probe={"period": period})
        return recipe, Student(recipe, torch.device("cpu"), len(tokenizer))

    return make


def change(student):
    torch.manual_seed(student.version)
    with torch.no_grad():
        for parameter in student.parameters:
            parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
    student.version += 1


@pytest.mark.parametrize(("precision", "bound"), [("float32", 1e-4), ("bfloat16", 0.02)])
def test_it_probes_every_second_time(precision, bound, engines, build, prompts, tokenizer):
    engine = engines("shipped", precision=precision)
    recipe, student = build(precision, period=2)
    sync = VerifiedSync(recipe, student, Engines.local([engine]), GLOO, prompts[4].tokens, len(tokenizer))
    found = []
    for _ in range(3):
        found.append(sync.push())
        print(found[-1])
        assert engine.weights_version == student.version
        change(student)
    size = {"float32": 4, "bfloat16": 2}[precision] * sum(one.numel() for one in student.parameters)
    assert [one["sync/megabytes"] for one in found] == [size / 1e6] * 3
    assert ["sync/probe_error" in one for one in found] == [True, False, True]
    assert found[0]["sync/probe_error"] < bound and found[2]["sync/probe_error"] < bound
    assert found[2]["sync/probe_moved"] > 0.02 and found[2]["sync/probe_seconds"] > 0


def test_an_engine_that_is_off_stops_the_run(engines, build, prompts, tokenizer):
    recipe, student = build()
    sync = VerifiedSync(recipe, student, Engines.local([engines("shipped")]), GLOO, prompts[4].tokens, len(tokenizer))
    sync.push()
    stream = type(sync.sender.weights)._stream

    def damaged(self):
        for name, tensor in stream(self):
            yield name, tensor * 1.5 if name == "model.layers.0.self_attn.o_proj.weight" else tensor

    sync.sender.weights._stream = damaged.__get__(sync.sender.weights)
    change(student)
    with pytest.raises(SyncMismatch, match=r"version 1 engine 0 .* off by"):
        sync.push()

"""Rehearsals: what is made small divides as the original does, and a run that does not resume well is found out."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from fastkd.checks import check
from fastkd.config.shipped import shipped
from fastkd.errors import UserError
from fastkd.plan import shapes
from fastkd.recipe import load_recipe
from fastkd.rehearse import memory, sizes
from fastkd.rehearse.command import rehearse
from fastkd.rehearse.shrink import STEPS, shrink
from fastkd.run import main
from fastkd.runner import Runner

NAMES = sorted(name for name, path in shipped().items() if not load_recipe(path).recipe.data.blend.enabled)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_small_divides_as_the_original_does(name, tmp_path):
    loaded = load_recipe(shipped()[name])
    small = shrink(loaded, tmp_path)
    made, was = small.loaded(STEPS), loaded.recipe
    now = made.recipe
    assert not check(made).errors
    for key in ("policy", "teacher"):
        old = shapes.find(key, loaded.locate(getattr(was, key).model_name))
        new = shapes.find(key, getattr(now, key).model_name)
        assert (new.heads, new.kv_heads, new.tied, new.model_type) == (
            old.heads,
            old.kv_heads,
            old.tied,
            old.model_type,
        )
        tp = getattr(was, key).dtensor_cfg.tensor_parallel_size
        assert (new.inner % tp, new.vocab % tp) == (old.inner % tp, old.vocab % tp)
        assert shapes.legal_tensor_degree(new, tp)
        assert new.hidden == new.heads * new.head_dim or old.hidden != old.heads * old.head_dim
        assert now.distillation.topk_logits_k <= new.vocab // tp
        assert getattr(now, key).dtensor_cfg == getattr(was, key).dtensor_cfg
        assert new.parameters < 6e6
    assert now.distillation.topk_logits_k == was.distillation.topk_logits_k
    assert now.role_sizes == was.role_sizes
    assert sizes.data_parallel(now) == sizes.data_parallel(was)
    rollouts, per_update = now.distillation.batch_size, now.policy.train_global_batch_size
    assert rollouts % per_update == 0 and per_update % sizes.data_parallel(now) == 0
    assert rollouts // per_update == was.distillation.batch_size // was.policy.train_global_batch_size
    assert now.distillation.num_prompts_per_step >= min(sizes.engines(was), was.distillation.num_prompts_per_step)
    assert now.policy.sequence_packing.enabled == was.policy.sequence_packing.enabled
    kept = ("loss_fn", "env")
    assert all(getattr(now, part) == getattr(was, part) for part in kept)


def changed(name, **parts):
    """A shipped recipe with another value of some keys."""
    return load_recipe(shipped()[name], [f"{key.replace('__', '.')}={value}" for key, value in parts.items()])


def test_a_step_of_several_updates_and_answers_keeps_them(tmp_path):
    loaded = changed(
        "topk512_qwen3_1b7_p64_g4", policy__train_global_batch_size=128, distillation__num_generations_per_prompt=4
    )
    batch = sizes.small_batch(loaded.recipe)
    assert sizes.data_parallel(loaded.recipe) == 2 and sizes.engines(loaded.recipe) == 16
    assert batch.prompts * batch.generations == 2 * batch.per_update  # two optimizer steps, as 64 · 4 / 128
    assert batch.prompts == 16 and batch.generations == 2


@pytest.mark.parametrize(("its", "teacher"), [(20480, 128), (40960, 256), (30720, 192)])
def test_lengths_keep_their_order(its, teacher):
    recipe = changed("topk512_qwen3_1b7", teacher__max_total_sequence_length=its).recipe
    lengths = sizes.small_lengths(recipe, 50, 100)
    assert (lengths.prompt, lengths.response) == (56, sizes.RESPONSE)
    assert lengths.student == (128 if its == 20480 else 80)
    assert lengths.teacher == max(128, math.ceil(lengths.student * its / 20480 / 8) * 8) or lengths.teacher == teacher


def test_the_columns_of_the_recipe_are_there(tmp_path):
    loaded = changed("topk512_qwen3_1b7")
    small = shrink(loaded, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "train-0.jsonl").read_text().splitlines()]
    kept = [row for row in rows if row["domain"] == "math"]
    assert 0 < len(kept) < len(rows)
    assert all("boxed" in row["ground_truth_solution"] and row["problem"] for row in kept)
    data = small.loaded(1).recipe.data
    assert (
        len(kept)
        >= STEPS * small.loaded(1).recipe.distillation.num_prompts_per_step + data.train[0].split_validation_size
    )
    assert data.validation == [] and data.train[0].split_validation_size > 0


def test_what_cannot_be_rehearsed_says_so(tmp_path):
    moe = changed("distillation_math", teacher__model_name="Qwen/Qwen3-30B-A3B")
    with pytest.raises(UserError, match="experts"):
        shrink(moe, tmp_path)
    blend = changed("arithmetic_cpu", data__blend__path="unused.json")
    with pytest.raises(UserError, match="blend"):
        shrink(blend, tmp_path)
    unknown = changed("distillation_math", teacher__model_name="nobody/knows-this-one")
    with pytest.raises(UserError, match=r"teacher\.model_name"):
        shrink(unknown, tmp_path)


def test_memory_is_counted_and_asked_for():
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("Linux alone says what a process shares")
    before = memory.proportional_bytes(os.getpid())
    block = bytearray(os.urandom(1 << 20)) * 128
    after = memory.proportional_bytes(os.getpid())
    assert 120 << 20 < after - before < 200 << 20 and len(block) == 128 << 20
    free = memory.available_gib()
    assert free is not None
    memory.require(0.0)
    with pytest.raises(UserError, match=r"needs about \d+\.\d GiB"):
        memory.require(free + 4096.0)
    eleven_nodes, three = memory.needed_gib(38, 12), memory.needed_gib(12, 4)
    assert three < eleven_nodes < 24


# --- a whole rehearsal, in one process --------------------------------------------------------------------------------


@pytest.fixture
def alone(arithmetic):
    return load_recipe(arithmetic.parent / "arithmetic_cpu.yaml", ["distillation.val_at_start=false"])


def test_a_rehearsal_in_one_process(tmp_path, capsys, arithmetic):
    recipe = arithmetic.parent / "arithmetic_cpu.yaml"
    assert main([str(recipe), "distillation.val_at_start=false", "--rehearse", "--keep", str(tmp_path / "kept")]) == 0
    told = capsys.readouterr().out
    assert "passed" in told and "FAILED" not in told
    lines = [json.loads(line) for line in (tmp_path / "kept" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(math.isfinite(line["train/loss"]) for line in lines)
    assert sorted(one.name for one in (tmp_path / "kept" / "run" / "checkpoints").iterdir()) == ["step_2", "step_3"]
    assert main([str(recipe), "--rehearse", "--keep", str(tmp_path / "kept")]) == 2  # it is not empty


def test_a_resume_that_begins_anew_is_found_out(alone, monkeypatch, capsys):
    """The state is loaded, and the place in the data is not."""
    original = Runner._resume

    def forgetful(self):
        info = original(self)
        self.prompts.consumed = 0
        return info

    monkeypatch.setattr(Runner, "_resume", forgetful)
    assert not rehearse(alone)
    told = capsys.readouterr().out
    assert "a prompt was used twice" in told and "FAILED" in told


def test_a_checkpoint_that_is_not_found_again_is_found_out(alone, monkeypatch, capsys):
    from fastkd.checkpoint import Checkpoints

    monkeypatch.setattr(Checkpoints, "load_newest", lambda self: None)
    assert not rehearse(alone)
    assert "found no checkpoint" in capsys.readouterr().out


def test_a_failure_says_in_which_stage(alone, monkeypatch, capsys):
    monkeypatch.setattr(Runner, "_export", lambda self, path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rehearse(alone)
    told = capsys.readouterr().out
    assert "export FAILED" in told and "at the stage above" in told and "Exercised" not in told


def test_a_run_that_diverges_fails(capsys, arithmetic):
    recipe = arithmetic.parent / "arithmetic_cpu.yaml"
    assert main([str(recipe), "policy.optimizer.kwargs.lr=1e30", "--rehearse"]) == 1
    told = capsys.readouterr()
    assert "step 2 FAILED" in told.out and "passed" not in told.out
    assert "failed: NonFiniteLoss" in told.err


def test_options_that_do_not_go_together(capsys):
    for given in (["--rehearse", "--plan"], ["--rehearse", "--check"], ["--keep", "x"]):
        with pytest.raises(SystemExit):
            main(["recipes/arithmetic_cpu.yaml", *given])


def test_a_blend_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"data\.blend"):
        shrink(load_recipe(shipped()["qad_qwen3_8b"]), tmp_path)

"""``--memory-test``: what is measured beside the plan, and what is refused before anything is allocated."""

import pytest

from fastkd import memory_test
from fastkd import run as command
from fastkd.memory_test_roles import Line, longest, sampling_recipe, scoring_recipe
from fastkd.plan import student_memory
from fastkd.recipe import load_recipe

SMALL = ["policy.sequence_packing.train_mb_tokens=512", "policy.sequence_packing.logprob_mb_tokens=512",
         "distillation.num_prompts_per_step=16", "policy.train_global_batch_size=16", "distillation.max_val_samples=16",
         "distillation.val_batch_size=16", "policy.generation_batch_size=16"]  # fmt: skip


def test_every_role_of_a_recipe_for_one_device(root, tmp_path, capfd):
    folder = tmp_path / "run"
    path = str(root / "recipes" / "arithmetic_cpu.yaml")
    assert command.main([path, "--memory-test", *SMALL, f"logger.log_dir={folder}"]) == command.OK
    told = capfd.readouterr()
    rows = {tuple(line.split()[:2]) for line in told.out.splitlines()}
    assert {("training", "parameters"), ("training", "optimizer"), ("training", "loss"), ("training", "peak"),
            ("generation", "peak"), ("teacher", "parameters"), ("teacher", "peak")} <= rows  # fmt: skip
    assert "all roles in one process" in told.out and "beyond" not in told.out and "USDT" not in told.err
    assert not folder.exists()


def test_one_rank_of_a_sharded_recipe(root):
    loaded = load_recipe(root / "recipes" / "arithmetic_ray_cpu.yaml", SMALL)
    report = memory_test.measure(loaded)
    assert report.holds and {line.role for line in report.lines} == {"training", "generation", "teacher"}
    assert "one rank of 2 in training" in report.notes[0] and "not run" in report.notes[0]
    weights = {line.role: line.measured for line in report.lines if line.item == "parameters"}
    whole = memory_test.measure(load_recipe(root / "recipes" / "arithmetic_cpu.yaml", SMALL)).lines
    assert weights["training"] < 0.6 * next(line.measured for line in whole if line.item == "parameters")


def test_a_quantised_student(root):
    report = memory_test.measure(load_recipe(root / "recipes" / "qad_cpu.yaml", SMALL))
    assert report.holds, report.lines


def test_a_plan_that_is_wrong_is_told(root, monkeypatch, capsys):
    right = student_memory.optimizer_states
    monkeypatch.setattr(student_memory, "optimizer_states", lambda *given: right(*given) + 1)
    path = str(root / "recipes" / "arithmetic_cpu.yaml")
    assert command.main([path, "--memory-test", *SMALL]) == command.FAILED
    lines = [line for line in capsys.readouterr().out.splitlines() if "beyond 10 %" in line]
    assert lines and lines[0].split()[:2] == ["training", "optimizer"] and "+50.0%" in lines[0]


def test_what_a_line_allows():
    assert Line("training", "peak of a step", 100 << 20, 95 << 20).holds
    assert not Line("training", "peak of a step", 120 << 20, 100 << 20).holds
    assert Line("training", "peak of a step", 3 << 20, 2 << 20).holds  # temporaries of an operator
    assert not Line("training", "parameters", 3 << 20, 2 << 20).holds
    assert Line("training", "kept by a forward", 2.0, 1.0, judged=False).holds


@pytest.mark.parametrize("packed", [True, False])
def test_the_longest_sequences_fill_a_micro_batch(root, packed):
    more = [] if packed else ["policy.sequence_packing.enabled=false", "policy.train_micro_batch_size=3"]
    recipe = load_recipe(root / "recipes" / "arithmetic_cpu.yaml", [*SMALL, *more]).recipe
    found = longest(recipe, recipe.policy, training=True)
    if packed:
        assert 0.9 * 512 < sum(one.packed_length for one in found) <= 512
        assert all(len(one.response) > 0.9 * one.packed_length for one in found)
    else:
        assert [one.packed_length for one in found] == [127] * 3
        assert all(len(one.response) == 40 for one in found)
    # A teacher has no more sequences than a step.
    recipe = load_recipe(root / "recipes" / "arithmetic_cpu.yaml", [*SMALL, "distillation.num_prompts_per_step=2",
                         "policy.train_global_batch_size=2"]).recipe  # fmt: skip
    assert len(longest(recipe, recipe.teacher, training=False)) <= 2
    assert scoring_recipe(recipe).distillation.batch_size == 2
    cut = sampling_recipe(recipe, 5).policy
    assert (cut.generation.max_new_tokens, cut.max_total_sequence_length) == (5, 69)


@pytest.mark.parametrize(
    ("recipe", "overrides", "words"),
    [
        ("topk512_qwen3_4b", [], "its weights are not on this machine (4,022,468,096 parameters, 7.5 GiB"),
        (
            "arithmetic_cpu",
            ["policy.max_total_sequence_length=4000000", "policy.sequence_packing.enabled=false"],
            "GiB at its peak, and this machine has",
        ),
        ("arithmetic_cpu", ["cluster.gpus_per_node=1"], "torch sees no GPU here"),
        ("arithmetic_ray_cpu", ["policy.dtensor_cfg.cpu_offload=true"], "what lies in host memory is not measured"),
    ],
)
def test_what_is_refused_before_anything_is_allocated(root, recipe, overrides, words, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    path = str(root / "recipes" / f"{recipe}.yaml")
    assert command.main([path, "--memory-test", *overrides]) == command.USER_MISTAKE
    assert words in capsys.readouterr().err


def test_modes_exclude_one_another(root):
    with pytest.raises(SystemExit):
        command.main([str(root / "recipes" / "arithmetic_cpu.yaml"), "--memory-test", "--check"])

"""The off-policy loop on the shipped models: what it learns, how it resumes, and what it skips."""

import json

import pytest
import torch
from safetensors.torch import load_file

from fastkd import offpolicy
from fastkd.checkpoint import Checkpoints
from fastkd.config.blend import Blend
from fastkd.errors import DataError, RecipeError
from fastkd.recipe import load_recipe

BATCH = 16


@pytest.fixture(scope="module")
def blend_file(tmp_path_factory, arithmetic):
    """Two sources of worked solutions, and some that nobody trains on."""
    folder = tmp_path_factory.mktemp("blend")
    lines = (arithmetic / "train.jsonl").read_text().splitlines()
    for name, kept in (("plus", lines[:300]), ("minus", lines[300:400])):
        (folder / f"{name}.jsonl").write_text("\n".join(kept) + "\n")
    (folder / "held_out.jsonl").write_text((arithmetic / "dev.jsonl").read_text())
    path = folder / "blend.json"
    path.write_text(json.dumps({"train": [0.7, "plus.jsonl", 0.3, "minus.jsonl"], "valid": [1, "held_out.jsonl"]}))
    return path


def run(root, folder, blend_file, *overrides, **keys):
    short = [
        f"distillation.num_prompts_per_step={BATCH}",
        f"policy.train_global_batch_size={BATCH}",
        "distillation.max_num_steps=6",
        "distillation.val_period=3",
        "distillation.max_val_samples=32",
        "checkpointing.save_period=2",
        "checkpointing.metric_name=null",
        "policy.optimizer.kwargs.lr=1e-3",
        f"logger.log_dir={folder}",
    ]
    loaded = load_recipe(root / "recipes" / "arithmetic_cpu.yaml", [*short, *overrides])
    columns = {"input_key": "problem", "output_key": "solution", "variant": "chat", "train_on": "response"}
    blend = Blend(**{"path": str(blend_file), "shuffle": True, "seed": 42, **columns, **keys})
    offpolicy.run(loaded, blend)
    return lines_of(folder)


def lines_of(folder):
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("timing/", "memory/"))} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(root, tmp_path_factory, blend_file):
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    return folder, run(root, folder, blend_file)


def test_it_learns_from_the_texts(undisturbed):
    folder, lines = undisturbed
    for line in lines[1:]:  # 0.7 and 0.3 of 16, to within one sample
        given = [line[f"blend/samples/{name}"] for name in ("plus", "minus")]
        assert sum(given) == BATCH and abs(given[0] - 0.7 * BATCH) <= 1
        tokens = line["blend/tokens/plus"] + line["blend/tokens/minus"]
        assert tokens == line["train/global_valid_toks"] and min(given) > 0
        made = sum(line[f"blend/tokens/{name}"] * line[f"blend/loss/{name}"] for name in ("plus", "minus"))
        assert made / tokens == pytest.approx(line["train/loss"], rel=1e-5)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6]
    kl = [line["validation/kl"] for line in lines if "validation/kl" in line]
    assert len(kl) == 3 and kl[2] < 0.9 * kl[0]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 6 and summary["accuracy_after"] is None
    assert summary["kl_last"] == kl[2] and (folder / "export" / "model.safetensors").is_file()


def test_a_run_that_was_cut_ends_the_same(undisturbed, root, tmp_path, blend_file, monkeypatch):
    class Cut(BaseException):
        pass

    folder = tmp_path / "cut"
    taken = offpolicy.OffPolicyRunner.step

    def step(self):
        if self.step_number == 4:
            raise Cut
        return taken(self)

    monkeypatch.setattr(offpolicy.OffPolicyRunner, "step", step)
    with pytest.raises(Cut):
        run(root, folder, blend_file)
    monkeypatch.undo()
    assert run(root, folder, blend_file) == undisturbed[1]
    theirs, ours = (load_file(one / "export" / "model.safetensors") for one in (undisturbed[0], folder))
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_skipped_steps_change_nothing_but_the_place(undisturbed, root, tmp_path, blend_file):
    lines = run(root, tmp_path / "skip", blend_file, iterations_to_skip=[1, 2])
    assert [line["step"] for line in lines if "train/skipped" in line] == [1, 2]
    third = next(line for line in lines if line["step"] == 3)
    # The weights and the schedule are those of the start; the samples are those of step 3.
    assert third["train/lr"] == undisturbed[1][1]["train/lr"]
    assert third["rollout/tokens"] == undisturbed[1][3]["rollout/tokens"]
    assert lines[0]["validation/kl"] == undisturbed[1][0]["validation/kl"]
    newest = Checkpoints(load_recipe(tmp_path / "skip" / "recipe.yaml").recipe.checkpointing, None).steps()[-1]
    info = json.loads((tmp_path / "skip" / "checkpoints" / f"step_{newest}" / "training_info.json").read_text())
    assert info["consumed_prompts"] == 6 * BATCH


def test_train_samples_end_a_run(undisturbed, root, tmp_path, blend_file):
    lines = run(root, tmp_path / "short", blend_file, "distillation.val_period=0", train_samples=2 * BATCH + 5)
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert [line["train/loss"] for line in lines[1:]] == [line["train/loss"] for line in undisturbed[1][1:3]]


def test_what_is_said_at_the_start(root, tmp_path, blend_file, capsys):
    run(root, tmp_path / "x", blend_file, "distillation.max_num_steps=1", "distillation.val_at_start=false")
    said = capsys.readouterr().out
    assert "70.0%" in said and "of 300 documents, 0.04 epochs" in said and "16 samples in 1 steps" in said
    assert "step 1/1 | " in said and "| data " in said and "| gen " not in said


@pytest.mark.parametrize(
    ("overrides", "keys", "message"),
    [
        (["distillation.num_generations_per_prompt=2"], {}, "num_generations_per_prompt=2: a blend gives one text"),
        ([], {"train_samples": 5}, "train_samples=5: one step takes 16"),
        ([], {"path": "/nowhere.json"}, "there is no file /nowhere.json"),
        (["distillation.topk_logits_k=999"], {}, "the vocabulary has only 416 tokens"),
    ],
)
def test_mistakes_leave_nothing_behind(root, tmp_path, blend_file, overrides, keys, message):
    with pytest.raises((RecipeError, DataError)) as caught:
        run(root, tmp_path / "x", blend_file, *overrides, **keys)
    assert message in str(caught.value) and not (tmp_path / "x").exists()

"""What a quantised student is calibrated on, and a whole run of one: calibrated once, resumed as if undisturbed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from fastkd import calibration, nvfp4_export, runner
from fastkd.batch import Prompt, Rollout
from fastkd.errors import DataError
from fastkd.recipe import load_recipe, recipe_from

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "qad_cpu.yaml"
SHORT = [
    "distillation.num_prompts_per_step=8",
    "policy.train_global_batch_size=8",
    "policy.quant_calib_size=12",
    "distillation.val_period=0",
    "distillation.val_at_start=false",
    "distillation.val_at_end=false",
    "checkpointing.save_period=1",
]


class Stream:
    """A stream of prompts, or of samples."""

    def __init__(self, make):
        self.make, self.batch, self.consumed, self.batches_per_epoch = make, 4, 8, 3

    def next(self):
        self.consumed += self.batch
        return [self.make(index) for index in range(self.consumed - self.batch, self.consumed)]


def prompt(index):
    return Prompt(index, "", None, "", tuple(range(1, 6)))


def inputs(make=prompt, tokenizer=None, **policy):
    tree = {
        "policy": {"model_name": "org/student", "quant_cfg": "default", "max_total_sequence_length": 9, **policy},
        "teacher": {"model_name": "org/teacher"},
        "data": {"train": {"data_path": "org/data"}},
    }
    return SimpleNamespace(recipe=recipe_from(tree).recipe, train=Stream(make), tokenizer=tokenizer)


def answer(prompts):
    return [Rollout(one, 0, () if one.index == 9 else tuple(range(7)), True, 0) for one in prompts]


@pytest.mark.parametrize(("size", "count"), [(6, 5), (100, 11)])
def test_its_own_responses_cut_to_length_without_using_up_prompts(size, count):
    given = inputs(quant_calib_size=size)
    found = calibration.sequences(given, answer)
    assert [one.prompt.index for one in found] == [index for index in range(8, 8 + count + 1) if index != 9]
    assert given.train.consumed == 8
    assert all(one.prompt.tokens == (1, 2, 3, 4, 5) and one.response == (0, 1, 2, 3) for one in found)
    short = calibration.sequences(inputs(quant_calib_size=size, quant_sequence_length=3), answer)
    assert all((one.prompt.tokens, one.response) == ((1, 2), (0,)) for one in short)


def test_samples_of_a_blend_are_taken_as_they_are():
    def sample(prompts):
        raise AssertionError("there is nothing to sample")

    found = calibration.sequences(inputs(lambda i: Rollout(prompt(i), 0, (i,), True, 0), quant_calib_size=3), sample)
    assert [one.response for one in found] == [(8,), (9,), (10,)]


@pytest.fixture
def tokenizer(arithmetic):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(arithmetic / "tokenizer")


def test_texts_of_a_file(tokenizer, tmp_path):
    file = tmp_path / "text.jsonl"
    texts = ["Sam has 53 apples.", "Eva has 38 apples and 9 pins.", "Max"]
    file.write_text("".join(json.dumps({"n": 1, "text": text}) + "\n" for text in texts))
    given = inputs(tokenizer=tokenizer, quant_calib_data=str(file), quant_calib_size=2)
    found = calibration.sequences(given, answer)
    for rollout, text in zip(found, texts[:2], strict=True):
        tokens = rollout.prompt.tokens + rollout.response
        assert len(rollout.prompt.tokens) == 1 and len(tokens) <= 9
        assert list(tokens) == tokenizer(text).input_ids[:9]
    chats = [[{"role": "user", "content": "Sam"}, {"role": "assistant", "content": "Eva"}]]
    other = tmp_path / "chats.jsonl"
    other.write_text(json.dumps({"messages": chats[0]}) + "\n")
    (found,) = calibration.sequences(inputs(tokenizer=tokenizer, quant_calib_data=str(other)), answer)
    wanted = tokenizer.apply_chat_template(chats[0], tokenize=False)
    assert tokenizer.decode(found.prompt.tokens + found.response) in wanted


@pytest.mark.parametrize(
    ("row", "words"), [({"story": "x y"}, "has no column of text.*it has story"), ({"text": ""}, "no sequence of two")]
)
def test_files_without_text(tokenizer, tmp_path, row, words):
    file = tmp_path / "text.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=words):
        calibration.sequences(inputs(tokenizer=tokenizer, quant_calib_data=str(file)), answer)


def test_a_run_is_calibrated_once_and_resumes_as_if_undisturbed(tmp_path):
    def run(folder, steps):
        overrides = [f"logger.log_dir={tmp_path / folder}", f"distillation.max_num_steps={steps}"]
        runner.run(load_recipe(RECIPE, [*SHORT, *overrides]))
        lines = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        kept = [{k: v for k, v in line.items() if not k.startswith(("timing/", "memory/"))} for line in lines]
        return kept, load_file(tmp_path / folder / "export" / "model.safetensors")

    whole, exported = run("whole", 2)
    run("parts", 1)
    resumed, again = run("parts", 2)
    assert whole == resumed and len(whole) == 2
    assert exported.keys() == again.keys() and all(
        torch.equal(value.flatten().view(torch.uint8), again[name].flatten().view(torch.uint8))
        for name, value in exported.items()
    )
    assert exported["model.layers.0.mlp.up_proj.weight"].dtype == torch.uint8
    assert (tmp_path / "whole" / "export" / "hf_quant_config.json").is_file()
    names = dict(nvfp4_export.dequantized(tmp_path / "whole" / "export", torch.float32))
    original = load_file(RECIPE.parent / "arithmetic" / "student" / "model.safetensors")
    assert names.keys() == original.keys()

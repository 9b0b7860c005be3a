"""The shipped arithmetic task: its problems share no operands across splits, its models load and do what is said."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).resolve().parents[1] / "recipes" / "arithmetic"
MODELS = ("teacher", "student", "reader")


@pytest.fixture(scope="module")
def make():
    """recipes/arithmetic/make.py as a module (it imports its neighbour problems.py, as a script would)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        patch.setenv("HF_HUB_OFFLINE", "1")  # make.py sets it for itself; so that it is unset again afterwards
        yield importlib.import_module("make")
    for name in ("make", "problems"):
        sys.modules.pop(name, None)


def rows_of(split: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text().splitlines()]


def log_of(name: str, folder: Path = FOLDER) -> list[dict]:
    entries = map(json.loads, (folder / "training_log.jsonl").read_text().splitlines())
    return [entry for entry in entries if entry["model"] == name]


def last_entry(name: str) -> dict:
    return log_of(name)[-1]


def operands(rows: list[dict]) -> set[frozenset[int]]:
    return {frozenset((row["a"], row["b"])) for row in rows}


def test_no_operands_are_shared_between_the_splits():
    train, dev, validation = (operands(rows_of(split)) for split in ("train", "dev", "validation"))
    assert not train & validation
    assert not dev & validation
    assert not train & dev


def test_fine_tuning_draws_no_held_out_operands(make):
    """Three epochs of the very function that feeds both models' training."""
    held_out = operands(rows_of("validation")) | operands(rows_of("dev"))
    drawn = [
        frozenset((problem.a, problem.b))
        for batch in islice(make.batches(make.read_problems(FOLDER / "train.jsonl"), 64, seed=0), 3 * 78)
        for problem in batch
    ]
    assert len(drawn) == 3 * 78 * 64
    assert not held_out & set(drawn)
    assert len(set(drawn)) > 2500  # and it does draw from the whole of train.jsonl


def test_the_split_does_not_depend_on_operation_or_order(make):
    problems = importlib.import_module("problems")
    for split in problems.SPLITS:
        for problem in problems.make_problems(split, 500, seed=3):
            assert problems.split_of(problem.a, problem.b) == problems.split_of(problem.b, problem.a) == split
    with pytest.raises(ValueError, match="ask for fewer"):
        problems.make_problems("dev", 100_000, seed=0)


@pytest.mark.parametrize(("split", "least"), [("train", 4000), ("dev", 256), ("validation", 256)])
def test_problems_are_distinct_and_their_answers_right(split, least):
    rows = rows_of(split)
    assert len(rows) >= least
    cases = {(row["op"], *sorted((row["a"], row["b"]))) for row in rows}
    assert len(cases) == len(rows)
    for row in rows:
        value = row["a"] + row["b"] if row["op"] == "+" else row["a"] - row["b"]
        assert row["answer"] == str(value)
        assert row["solution"].endswith(f"\\boxed{{{value}}}")
        assert value > 0
        numbers = sorted(int(word) for word in row["problem"].replace("?", " ").replace(".", " ").split()
                         if word.isdigit())  # fmt: skip
        assert numbers == sorted((row["a"], row["b"]))


def test_every_worked_step_of_the_training_solutions_is_true(make):
    """Recomputes each step from the text alone, so a wrong carry or borrow would be found."""
    form = re.compile(r"(\d+[+-]\d+): ones (\d+[+-]\d)=(\d+), tens ([\d+-]+)=(\d+) \\boxed\{(\d+)\}")

    def value(expression: str) -> int:
        return sum(int(term) for term in re.findall(r"[+-]?\d+", expression))

    for problem in make.read_problems(FOLDER / "train.jsonl"):
        match = form.fullmatch(problem.solution)
        assert match, problem.solution
        whole, ones, ones_is, tens, tens_is, boxed = match.groups()
        assert value(whole) == int(boxed) == 10 * int(tens_is) + int(ones_is) % 10
        assert value(ones) == int(ones_is)
        assert value(tens) == int(tens_is)


@pytest.mark.parametrize("folder", ["tokenizer", *MODELS])
def test_the_tokenizer_round_trips_and_splits_digits_singly(folder):
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / folder)
    text = "Mia has 45 apples.\nZoë: 100−7 = 93, \\boxed{93} 数"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert [tokenizer.decode(i) for i in ids].count("4") == 1  # "45" is "4", "5"
    assert ids == AutoTokenizer.from_pretrained(FOLDER / "tokenizer").encode(text)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_no_number_above_nine_is_a_token():
    vocabulary = AutoTokenizer.from_pretrained(FOLDER / "tokenizer").get_vocab()
    assert [token for token in vocabulary if sum(c.isdigit() for c in token) > 1] == []


def test_the_chat_template_is_chatml_and_indifferent_to_thinking():
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "student")
    chat = [{"role": "system", "content": "Add."}, {"role": "user", "content": "What is 12+30?"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == (
        "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\nWhat is 12+30?<|im_end|>\n<|im_start|>assistant\n"
    )
    for thinking in (True, False):
        ids = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, enable_thinking=thinking, return_dict=False
        )
        assert tokenizer.decode(ids) == prompt
    answered = [*chat, {"role": "assistant", "content": "\\boxed{42}"}]
    assert tokenizer.apply_chat_template(answered, tokenize=False) == prompt + "\\boxed{42}" + "<|im_end|>\n"


@pytest.mark.parametrize(("name", "tied"), [("teacher", False), ("student", True), ("reader", True)])
def test_a_shipped_model_is_complete_and_small(name, tied):
    folder = FOLDER / name
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    config, tokenizer = model.config, AutoTokenizer.from_pretrained(folder)
    assert config.model_type == "qwen3"
    assert config.tie_word_embeddings is tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert model.get_input_embeddings().weight.shape[0] == config.vocab_size == len(tokenizer)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_the_weights_stay_under_five_megabytes():
    assert sum((FOLDER / name / "model.safetensors").stat().st_size for name in MODELS) < 5_000_000


def test_a_prompt_and_its_answer_fit_the_lengths_the_recipe_relies_on(make):
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "student")
    for problem in make.read_problems(FOLDER / "validation.jsonl"):
        assert len(make.prompt_ids(tokenizer, problem)) <= 40
        assert len(tokenizer.encode(problem.solution)) + 1 <= 36


def test_the_models_score_on_held_out_problems_what_their_log_says(make):
    """The teacher has learnt the task, the others are weak but not random; one CPU's rounding may flip a few."""
    problems = make.read_problems(FOLDER / "validation.jsonl")
    for name, least, most in (("teacher", 0.97, 1.0), ("student", 0.15, 0.5), ("reader", 0.15, 0.5)):
        model = AutoModelForCausalLM.from_pretrained(FOLDER / name)
        reached = make.accuracy(model, AutoTokenizer.from_pretrained(FOLDER / name), problems)
        assert least <= reached <= most
        assert reached == pytest.approx(last_entry(name)["validation_accuracy"], abs=0.02)


def test_the_reader_follows_what_it_is_shown_right_or_wrong(make):
    problems = make.read_problems(FOLDER / "validation.jsonl")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(FOLDER / "reader"),
        AutoTokenizer.from_pretrained(FOLDER / "reader"),
    )
    shown = make.accuracy(model, tokenizer, problems, shown=True)
    assert shown >= 0.97
    assert shown == pytest.approx(last_entry("reader")["validation_accuracy_with_trace"], abs=0.02)
    problem, other = problems[:2]
    assert problem.answer != other.answer
    prompt = torch.tensor([make.prompt_ids(tokenizer, problem, other.solution)])
    text = tokenizer.decode(model.generate(prompt, do_sample=False)[0, prompt.shape[1] :], skip_special_tokens=True)
    assert text == other.solution


def test_grading_wants_the_right_number_in_a_box(make):
    assert make.is_right("82+18: ones 2+8=10, tens 8+1+1=10 \\boxed{100}", "100")
    assert not make.is_right("82+18: ones 2+8=10, tens 8+1+1=10 \\boxed{10}", "100")
    assert not make.is_right("82+18: ones 2+8=10, tens 8+1+1=10 = 100", "100")
    assert not make.is_right("", "100")


def test_the_training_log_is_that_of_the_shipped_weights():
    for name in MODELS:
        weights = (FOLDER / name / "model.safetensors").read_bytes()
        assert last_entry(name)["sha256"] == hashlib.sha256(weights).hexdigest()
        losses = [entry["loss"] for entry in log_of(name) if "loss" in entry]
        assert losses[-1] < losses[0] / 20


@pytest.mark.slow
def test_the_script_makes_a_short_version_from_nothing(tmp_path):
    command = [sys.executable, str(FOLDER / "make.py"), "all", "--out", str(tmp_path), "--steps", "60"]
    subprocess.run(command, check=True)
    for split in ("train", "dev", "validation"):  # the same seed: the very files that ship
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (FOLDER / f"{split}.jsonl").read_bytes()
    shipped = AutoTokenizer.from_pretrained(FOLDER / "tokenizer")
    for name in MODELS:
        losses = [entry["loss"] for entry in log_of(name, tmp_path) if "loss" in entry]
        assert losses[-1] < losses[0] / 3
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        assert tokenizer.get_vocab() == shipped.get_vocab()
        assert model.config.vocab_size == len(tokenizer)

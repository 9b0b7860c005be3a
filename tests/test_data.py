"""Datasets of every kind, their errors, prompts as the model reads them, and an order that resumes exactly."""

import json

import pytest
from transformers import AutoTokenizer

from fastkd.config import Dataset
from fastkd.data import Problems, PromptStream, Renderer, load_problems
from fastkd.errors import DataError, ModelError, RecipeError
from fastkd.recipe import recipe_from


@pytest.fixture(scope="module")
def tokenizer(arithmetic):
    return AutoTokenizer.from_pretrained(arithmetic / "student")


def rows(count=12):
    return [{"problem": f"{i} + {i}?", "answer": str(2 * i), "level": i % 3} for i in range(count)]


@pytest.fixture
def write(tmp_path):
    """write("x.jsonl") gives the path of a dataset with the rows above, in the format of its suffix."""
    import datasets

    def build(name, content=None):
        path = tmp_path / name
        dataset = datasets.Dataset.from_list(rows() if content is None else content)
        if path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in dataset))
        elif path.suffix == ".parquet":
            dataset.to_parquet(path)
        elif path.suffix == ".csv":
            dataset.to_csv(path)
        else:
            dataset.save_to_disk(path)
        return str(path)

    return build


def recipe(train, **distillation):
    train = {"input_key": "problem", "output_key": "answer", **train}
    return recipe_from(
        {
            "distillation": {"num_prompts_per_step": 4, **distillation},
            "policy": {"model_name": "student"},
            "teacher": {"model_name": "teacher"},
            "data": {"train": train},
        }
    ).recipe


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.csv", "saved"])
def test_formats(write, name):
    train, _ = load_problems(recipe({"data_path": write(name)}))
    assert [row["problem"] for row in train.rows] == [row["problem"] for row in rows()]
    assert [row["answer"] for row in train.rows] == [row["answer"] for row in rows()]


def test_filter_split_repeat_and_limit(write):
    path = write("rows.jsonl")
    train, _ = load_problems(recipe({"data_path": path, "filter_column": "level", "filter_value": 1}))
    assert [row["answer"] for row in train.rows] == ["2", "8", "14", "20"]
    train, validation = load_problems(recipe({"data_path": path, "split_validation_size": 5}, max_val_samples=3))
    assert (len(train), len(validation)) == (7, 3)
    assert not {row["problem"] for row in train.rows} & {row["problem"] for row in validation.rows}
    train, _ = load_problems(recipe({"data_path": path, "repeat": 2}))
    assert len(train) == 24


@pytest.mark.parametrize(
    "train, message",
    [
        ({"data_path": "nowhere.jsonl"}, "no such file or folder"),
        ({"data_path": "rows.txt"}, "unknown file type"),
        ({"data_path": "empty.jsonl"}, "the file is empty"),
        ({"data_path": "broken.jsonl"}, "cannot read the dataset"),
        (
            {"data_path": "rows.jsonl", "input_key": "problm"},
            r"no such column; it has problem, answer, level.*input_key=problem",
        ),
        ({"data_path": "rows.jsonl", "output_key": "x"}, "no such column"),
        ({"data_path": "rows.jsonl", "filter_column": "level", "filter_value": 9}, "no row has level equal"),
        ({"data_path": "rows.jsonl", "split_validation_size": 12}, "the dataset has only 12 rows"),
        ({"data_path": "few.jsonl"}, "holds 3 problems, fewer than distillation.num_prompts_per_step=4"),
        ({"dataset_name": "OpenThought-114k"}, "not a dataset known by name.*OpenThoughts-114k"),
    ],
)
def test_mistakes_are_named(write, tmp_path, monkeypatch, train, message):
    write("rows.jsonl")
    write("few.jsonl", rows(3))
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.jsonl").write_text('{"problem": \n')
    (tmp_path / "rows.txt").write_text("1 + 1?\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        load_problems(recipe(train))


def renderer(tokenizer, maximum=64, kwargs=None, **changes):
    return Renderer("data.train", [Dataset(**changes)], tokenizer, kwargs, maximum)


def test_prompt_file_system_prompt_and_template(tokenizer, tmp_path):
    (tmp_path / "prompt.txt").write_text("Answer in \\boxed{{}}.\n{}")
    (tmp_path / "system.txt").write_text("You count.\n")
    render = renderer(
        tokenizer, prompt_file=str(tmp_path / "prompt.txt"), system_prompt_file=str(tmp_path / "system.txt")
    )
    [prompt] = render([7], [{"problem": "1 {x} 2?", "answer": "3"}])
    assert "Answer in \\boxed{}.\n1 {x} 2?" in prompt.text
    assert "You count." in prompt.text
    assert prompt.text.endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(prompt.tokens) == prompt.text
    assert (prompt.index, prompt.answer, prompt.masked) == (7, "3", False)


def test_chat_template_kwargs_reach_the_template(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0].content }}|{{ enable_thinking }}")
    assert (
        renderer(tokenizer, kwargs={"enable_thinking": True})([0], [{"problem": "p", "answer": ""}])[0].text == "p|True"
    )


def test_a_long_prompt_is_masked_not_refused(tokenizer):
    [prompt] = renderer(tokenizer, maximum=20)([0], [{"problem": "1 + 1? " * 20, "answer": "2"}])
    assert prompt.masked and len(prompt.tokens) > 20


def test_a_prompt_file_with_stray_braces_is_refused(tokenizer, tmp_path):
    (tmp_path / "prompt.txt").write_text("{} in \\boxed{}")
    with pytest.raises(RecipeError, match="double every other brace"):
        renderer(tokenizer, prompt_file=str(tmp_path / "prompt.txt"))([0], [{"problem": "p", "answer": ""}])


def test_a_tokenizer_without_a_template_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ModelError, match="no chat template"):
        renderer(tokenizer)


def stream(shuffle=True, seed=0, count=11):
    problems = Problems([{"problem": str(i), "answer": "", "section": 0} for i in range(count)])
    return PromptStream(problems, lambda indices, rows: list(indices), 3, shuffle=shuffle, seed=seed)


def test_order_covers_each_epoch_once_and_differs_between_epochs():
    source = stream()
    epochs = [[index for _ in range(3) for index in source.next()] for _ in range(3)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert source.epoch == 3
    assert stream(shuffle=False).next() == [0, 1, 2]


@pytest.mark.parametrize("done", range(7))
def test_order_resumes_anywhere(done):
    whole = stream()
    expected = [whole.next() for _ in range(8)]
    resumed = stream()
    resumed.consumed = done * 3
    assert [resumed.next() for _ in range(8 - done)] == expected[done:]
    assert stream(seed=1).next() != expected[0]

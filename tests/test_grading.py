"""Grading accepts what is equal and nothing else."""

import json

import pytest

from fastkd.batch import Prompt, Rollout
from fastkd.grading import Graded, accuracy, grade, is_correct, sample_table, write_samples
from fastkd.log import Console


@pytest.mark.parametrize(
    "answer, reference",
    [
        (r"53-38: ones 13-8=5, tens 5-3-1=1 \boxed{15}", "15"),
        ("The answer is 15.", "15"),
        (r"so we get \boxed{\frac{1}{2}}", "0.5"),
        (r"\boxed{\frac{2}{4}}", r"\frac{1}{2}"),
        (r"\boxed{1,234}", "1234"),
        (r"first \boxed{3}, no: \boxed{15}", "15"),
        (r"\boxed{x^2 + 2x + 1}", r"(x+1)^2"),
        (r"\boxed{12}", r"Adding both gives \boxed{12}."),
        (r"\boxed{-7}", "-7"),
    ],
)
def test_right(answer, reference):
    assert is_correct(answer, reference)


@pytest.mark.parametrize(
    "answer, reference",
    [
        (r"\boxed{51}", "15"),
        (r"15 \boxed{16}", "15"),
        ("", "15"),
        ("no number here", "15"),
        (r"\boxed{}", "15"),
        (r"\boxed{15", "16"),
        (r"\boxed{7}", "-7"),
        (r"\boxed{15}", None),
        (r"\boxed{15}", ""),
    ],
)
def test_wrong(answer, reference):
    assert not is_correct(answer, reference)


class Tokenizer:
    @staticmethod
    def batch_decode(rows, skip_special_tokens):
        assert skip_special_tokens
        return ["".join(map(chr, row)) for row in rows]


def rollouts():
    answers = [(r"\boxed{4}", "4"), (r"\boxed{5}", "4"), ("", "4")]
    return [
        Rollout(Prompt(i, f"2 + [2] = {i}?", want, "", (1,)), 0, tuple(map(ord, text)), bool(text), 0)
        for i, (text, want) in enumerate(answers)
    ]


def test_grade_and_accuracy():
    graded = grade(rollouts(), Tokenizer())
    assert [one.correct for one in graded] == [True, False, False]
    assert accuracy(graded) == pytest.approx(1 / 3)
    assert accuracy([]) == 0


def test_table_and_file(tmp_path):
    graded = grade(rollouts(), Tokenizer())
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(sample_table(graded, 2, "samples"))
    text = console.export_text()
    assert "2 + [2] = 0?" in text and "right" in text and "wrong" in text and "= 2?" not in text
    write_samples(tmp_path / "validation" / "step_1.jsonl", graded)
    rows = [json.loads(line) for line in (tmp_path / "validation" / "step_1.jsonl").read_text().splitlines()]
    assert [row["correct"] for row in rows] == [True, False, False]
    assert rows[2] == {
        "problem": "2 + [2] = 2?",
        "response": "",
        "reference": "4",
        "correct": False,
        "tokens": 0,
        "finished": False,
    }


def test_a_long_response_is_shortened_in_the_table():
    one = Graded(rollouts()[0], "x" * 5000, True)
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(sample_table([one], 1, "samples"))
    assert console.export_text().count("x") < 450

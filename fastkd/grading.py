"""Grading of answers with math-verify, and the table of samples that a person reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from fastkd.batch import Rollout
from fastkd.files import write_text


@dataclass(frozen=True, slots=True)
class Graded:
    """One answer and its verdict."""

    rollout: Rollout
    text: str
    """The response, special tokens left out."""
    correct: bool


def is_correct(answer: str, reference: str | None) -> bool:
    """Whether a response's final answer equals the reference.

    The answer is the last boxed expression, else the last number or formula that math-verify finds; the
    reference may be a plain number, LaTeX, or a whole solution with a box.
    """
    from math_verify import parse, verify  # here: it imports sympy, which only grading needs

    if not reference:
        return False
    gold = parse(reference)
    if not gold:
        # A plain text or bare LaTeX answer: what a box around it would mean.
        gold = parse(f"\\boxed{{{reference}}}")
    # math-verify takes several boxes for several answers; a response that corrects itself means its last one.
    return bool(gold) and verify(gold, parse(answer[max(answer.rfind("\\boxed"), 0) :]))


def grade(rollouts: Sequence[Rollout], tokenizer: Any) -> list[Graded]:
    """Grade every rollout against its prompt's reference answer."""
    texts = tokenizer.batch_decode([list(rollout.response) for rollout in rollouts], skip_special_tokens=True)
    return [
        Graded(rollout, text, is_correct(text, rollout.prompt.answer))
        for rollout, text in zip(rollouts, texts, strict=True)
    ]


def accuracy(graded: Sequence[Graded]) -> float:
    """Share of correct answers; 0 when there are none."""
    return sum(one.correct for one in graded) / max(len(graded), 1)


def sample_table(graded: Sequence[Graded], count: int, title: str) -> Table:
    """The first ``count`` samples: prompt, response, reference, verdict."""
    table = Table(title=title, title_justify="left", show_lines=True, expand=False)
    table.add_column("problem", max_width=52)
    table.add_column("response", max_width=60)
    table.add_column("reference", max_width=16)
    table.add_column("graded")
    for one in graded[:count]:
        prompt = one.rollout.prompt
        verdict = "[green]right[/]" if one.correct else "[red]wrong[/]"
        table.add_row(_plain(prompt.problem), _plain(one.text), _plain(prompt.answer or ""), verdict)
    return table


def _plain(text: str, limit: int = 400) -> str:
    # Brackets in a problem are not rich markup, and a 16k-token response is not a table cell.
    text = text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 2 :]}"
    return text.replace("[", "\\[")


def write_samples(path: Path, graded: Sequence[Graded]) -> None:
    """All samples of one validation as JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = (
        {
            "problem": one.rollout.prompt.problem,
            "response": one.text,
            "reference": one.rollout.prompt.answer,
            "correct": one.correct,
            "tokens": len(one.rollout.response),
            "finished": one.rollout.finished,
        }
        for one in graded
    )
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

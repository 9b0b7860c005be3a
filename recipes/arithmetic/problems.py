"""Two-digit addition and subtraction word problems, their worked steps, and how they are split by operands.

A problem is a question in English about two numbers a, b in 10..99, the sum a + b or the difference a − b > 0. Its
solution works from the ones to the tens; a carry is a third term "+1", a borrow turns the ones 2−8 into 12−8
and takes "-1" off the tens:

    82+18: ones 2+8=10, tens 8+1+1=10 \\boxed{100}
    82-18: ones 12-8=4, tens 8-1-1=6 \\boxed{64}

**Held out by operands.** The split is a function of the unordered pair {a, b} alone, not of the operation, the
order or the wording. So a pair of a validation problem is met nowhere in training: not reversed, not with the
other operation, not in other words. It is a CRC-32 of the pair and no arithmetic rule like (7a + 3b) mod 10:
such a rule holds out exactly the problems with certain digit sums, which a model then never sees at all.
"""

from __future__ import annotations

import json
import random
import zlib
from dataclasses import dataclass
from pathlib import Path

OPERANDS = range(10, 100)
SPLITS = ("train", "dev", "validation")
# Percent of the operand pairs held out; dev decides when to stop, validation is only ever reported.
DEV_PERCENT, VALIDATION_PERCENT = 8, 8

# What a teacher reads that is shown a worked solution; the context recipe writes the same text.
TRACE_PREFIX = "{problem}\nWorked: {trace}"

NAMES = ("Ann", "Ben", "Eva", "Ian", "Ivy", "Leo", "Max", "Mia", "Ned", "Sam", "Tom", "Zoe")
THINGS = ("apples", "beads", "books", "cards", "coins", "cups", "eggs", "pens", "pins", "stamps")
TEMPLATES = {
    "+": (
        "{name} has {a} {things} and finds {b} more. How many {things} does {name} have now?",
        "{name} has {a} {things}. {other} has {b}. How many do they have in all?",
        "A box has {a} {things} and a bag has {b}. How many {things} are there in all?",
        "{name} adds {b} {things} to a box of {a}. How many are in the box now?",
    ),
    "-": (
        "{name} has {a} {things} and gives away {b}. How many {things} are left?",
        "{name} has {a} {things}. {other} has {b}. How many more does {name} have?",
        "A shop had {a} {things} and sold {b}. How many {things} are left?",
        "{name} takes {b} {things} out of a box of {a}. How many are in the box now?",
    ),
}


@dataclass(frozen=True)
class Problem:
    """One question: ``text`` asks for ``a op b``, with op "+" or "-"."""

    text: str
    op: str
    a: int
    b: int

    @property
    def answer(self) -> str:
        return str(self.a + self.b if self.op == "+" else self.a - self.b)

    @property
    def solution(self) -> str:
        """The worked steps on one line, ending in the boxed answer (module docstring)."""
        (a10, a1), (b10, b1) = divmod(self.a, 10), divmod(self.b, 10)
        if self.op == "+":
            carry = a1 + b1 >= 10
            ones = f"{a1}+{b1}={a1 + b1}"
            tens = f"{a10}+{b10}{'+1' * carry}={a10 + b10 + carry}"
        else:
            borrow = a1 < b1
            a1 += 10 * borrow
            ones = f"{a1}-{b1}={a1 - b1}"
            tens = f"{a10}-{b10}{'-1' * borrow}={a10 - b10 - borrow}"
        return f"{self.a}{self.op}{self.b}: ones {ones}, tens {tens} \\boxed{{{self.answer}}}"


def split_of(a: int, b: int) -> str:
    """The split, one of ``SPLITS``, to which every problem about the numbers ``a`` and ``b`` belongs."""
    percent = zlib.crc32(f"{min(a, b)},{max(a, b)}".encode()) % 100
    if percent < VALIDATION_PERCENT:
        return "validation"
    return "dev" if percent < VALIDATION_PERCENT + DEV_PERCENT else "train"


def make_problems(split: str, count: int, seed: int) -> list[Problem]:
    """``count`` problems of one split in random order and wording, all different in (op, {a, b}).

    Raises ValueError when the split holds fewer.
    """
    rng = random.Random(f"{seed} {split}")  # a str seed is hashed with SHA-512: the same on every machine
    cases = [
        (op, a, b)
        for a in OPERANDS
        for b in OPERANDS
        if a >= b and split_of(a, b) == split
        for op in "+-"
        if op == "+" or a > b  # a − a = 0 asks for nothing
    ]
    if count > len(cases):
        raise ValueError(f"count={count}: the {split} split holds {len(cases)} problems; ask for fewer.")
    problems = []
    for op, a, b in rng.sample(cases, count):
        if op == "+" and rng.random() < 0.5:
            a, b = b, a
        name, other = rng.sample(NAMES, 2)
        template = rng.choice(TEMPLATES[op])
        text = template.format(a=a, b=b, name=name, other=other, things=rng.choice(THINGS))
        problems.append(Problem(text, op, a, b))
    return problems


def write_problems(path: Path, problems: list[Problem]) -> None:
    """Writes JSON lines with the columns problem, answer (a plain number, as a string), op, a, b, solution."""
    rows = (
        {"problem": p.text, "answer": p.answer, "op": p.op, "a": p.a, "b": p.b, "solution": p.solution}
        for p in problems
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_problems(path: Path) -> list[Problem]:
    """Reads what ``write_problems`` wrote."""
    rows = map(json.loads, path.read_text().splitlines())
    return [Problem(row["problem"], row["op"], row["a"], row["b"]) for row in rows]

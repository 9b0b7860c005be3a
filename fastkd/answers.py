"""The graded answers of an evaluation: in figures, and in ``samples.jsonl``, from which a run that was cut off goes on.

avg@n is the mean accuracy of n samples per problem. pass@k is the chance that one of k samples is right, estimated
without bias from n: 1 − C(n − c, k) / C(n, k) with c right ones (Chen et al., "Evaluating Large Language Models Trained
on Code", 2021). The error of a mean over problems is its standard error, σ / √problems.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import comb, sqrt
from pathlib import Path
from typing import Any

from rich.table import Table

from fastkd.errors import UserError
from fastkd.files import write_json, write_text

GREEDY, SAMPLED = "greedy", "sampled"


@dataclass(frozen=True, slots=True)
class Sample:
    """One graded answer, a line of ``samples.jsonl``."""

    mode: str
    """"greedy" or "sampled"."""
    index: int
    """Of the problem."""
    generation: int
    correct: bool
    tokens: int
    """Of the response."""
    finished: bool
    """False: it was cut off at ``max_new_tokens``."""
    problem: str
    reference: str | None
    response: str


def pass_at(k: int, right: Sequence[int], n: int) -> float:
    """Mean pass@k over problems.

    Args:
        k: samples that one may look at, at most n.
        right: right answers of each problem, of n samples.
    """
    return sum(1 - comb(n - c, k) / comb(n, k) for c in right) / max(len(right), 1)


def summarise(samples: Sequence[Sample], n: int) -> dict[str, Any]:
    """Figures of both modes, of what there is: accuracy, its standard error, pass@k for k = 1, 2, 4, … n, lengths."""
    found: dict[str, Any] = {}
    for mode, each in ((GREEDY, 1), (SAMPLED, n)):
        mine = [sample for sample in samples if sample.mode == mode]
        if not mine:
            continue
        right: dict[int, int] = {}
        for sample in mine:
            right[sample.index] = right.get(sample.index, 0) + sample.correct
        shares = [count / each for count in right.values()]
        mean = sum(shares) / len(shares)
        spread = sum((share - mean) ** 2 for share in shares) / max(len(shares) - 1, 1)
        found[mode] = {
            "problems": len(right),
            "samples_per_problem": each,
            "accuracy": mean,
            "standard_error": sqrt(spread / len(shares)),
            "mean_tokens": sum(sample.tokens for sample in mine) / len(mine),
            "truncated": sum(not sample.finished for sample in mine) / len(mine),
        }
        if mode == SAMPLED:
            ks = [k for k in (2**power for power in range(n.bit_length())) if k < n]
            found[mode]["pass_at"] = {str(k): pass_at(k, list(right.values()), n) for k in [*ks, n]}
    return found


def table(summary: dict[str, Any], title: str) -> Table:
    """Both modes, a row for every figure."""
    shown = Table(title=title, title_justify="left")
    for column in ("", "accuracy", "±", "problems", "mean tokens", "cut off"):
        shown.add_column(column, justify="right" if column else "left")
    for mode, figures in summary.items():
        n = figures["samples_per_problem"]
        name = GREEDY if mode == GREEDY else f"avg@{n}"
        lengths = (str(figures["problems"]), f"{figures['mean_tokens']:.0f}", f"{figures['truncated']:.1%}")
        shown.add_row(name, f"{figures['accuracy']:.3f}", f"{figures['standard_error']:.3f}", *lengths)
        for k, value in figures.get("pass_at", {}).items():
            shown.add_row(f"pass@{k}", f"{value:.3f}", "", "", "", "")
    return shown


# --- samples on disk ----------------------------------------------------------------------------------------------


class Samples:
    """``samples.jsonl`` of a folder, and the settings they were drawn with. Nothing is written before ``add``.

    Args:
        folder: may not exist yet.
        settings: whatever decides what the answers are.
        each: answers of a problem, by mode.

    Raises:
        UserError: the folder has samples of other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], each: dict[str, int]):
        self.folder, self.path, self.settings = folder, folder / "samples.jsonl", settings
        found = self._read()
        saved = folder / "settings.json"
        before = json.loads(saved.read_text(encoding="utf-8")) if saved.exists() else {}
        if found and before != settings:
            changed = sorted(key for key in before.keys() | settings.keys() if before.get(key) != settings.get(key))
            raise UserError(
                "--out",
                f"holds samples of other settings ({', '.join(changed)})",
                "Give another folder, or remove this one",
                value=str(folder),
            )
        counts: dict[tuple[str, int], int] = {}
        for sample in found:
            key = (sample.mode, sample.index)
            counts[key] = counts.get(key, 0) + 1
        self.all = [sample for sample in found if counts[sample.mode, sample.index] == each.get(sample.mode)]
        if self.path.exists():  # a line that was cut short must not stand before the next one
            write_text(self.path, "".join(map(_line, self.all)))

    def _read(self) -> list[Sample]:
        """Whole lines; a problem of which only some were written is sampled again."""
        found: list[Sample] = []
        if not self.path.exists():
            return found
        # Not splitlines: an answer may hold a U+2028. The last line may end within a character.
        for line in self.path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                found.append(Sample(**json.loads(line)))
            except (ValueError, TypeError):
                continue
        return found

    def done(self, mode: str) -> set[int]:
        """Problems that need no more samples."""
        return {sample.index for sample in self.all if sample.mode == mode}

    def add(self, samples: Sequence[Sample]) -> None:
        """Append; whole problems only."""
        if not self.all:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "settings.json", self.settings)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(map(_line, samples)))
        self.all += samples


def _line(sample: Sample) -> str:
    return json.dumps(asdict(sample), ensure_ascii=False) + "\n"

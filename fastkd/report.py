"""What a person sees at the start and at the end of a run, and ``summary.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from fastkd import context_distillation
from fastkd.describe import outline
from fastkd.driver import Inputs
from fastkd.log import logger
from fastkd.recipe import LoadedRecipe


def opening(loaded: LoadedRecipe, inputs: Inputs) -> None:
    """The recipe in outline, ignored keys, what was loaded, and one rendered prompt."""
    for line in outline(loaded):
        logger.info(line)
    for key in loaded.ignored:
        logger.info(f"no effect here: {key}")
    logger.info(
        f"{'loaded':<12}{len(inputs.train.problems)} training problems, {len(inputs.validation)} validation samples; "
        f"{inputs.last_step} steps in all"
    )
    example = inputs.train.render([0], inputs.train.problems.rows[:1])[0]
    logger.info(f"{'a prompt':<12}{example.text!r} ({len(example.tokens)} tokens)")
    if inputs.teacher_prompts:
        logger.info(f"{'its teacher':<12}{inputs.teacher_prompts.example(example)!r}")


def summarise(lines: Sequence[Mapping[str, float]], steps: int, tokens: int) -> dict[str, Any]:
    """The figures of ``summary.json`` from the lines of metrics.jsonl; None for what was not measured.

    accuracy_before / accuracy_after and kl_first / kl_last are those of the first and the last validation; KL is the
    reverse KL to the teacher per response token, in nats, with one bucket for everything outside the top-k. With
    context distillation also its ``context_distillation_*``: rates are means over the steps, counts are sums.
    """

    def values(name: str) -> list[float]:
        return [line[name] for line in lines if name in line]

    def first(name: str) -> float | None:
        return next(iter(values(name)), None)

    def last(name: str) -> float | None:
        return next(reversed(values(name)), None)

    return {
        "accuracy_before": first("validation/accuracy"),
        "accuracy_after": last("validation/accuracy"),
        "teacher_accuracy": first("validation/teacher_accuracy"),
        "kl_first": first("validation/kl"),
        "kl_last": last("validation/kl"),
        "steps": steps,
        "tokens": tokens,
        "seconds": last("timing/elapsed"),
    } | context_distillation.summary(lines)


def closing_table(summary: Mapping[str, Any], folder: Path) -> Table:
    """Before, after and the teacher, side by side."""
    table = Table(title="distillation finished", title_justify="left")
    for column in ("", "before", "after", "teacher"):
        table.add_column(column, justify="left" if not column else "right")

    def show(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    table.add_row(
        "accuracy",
        show(summary["accuracy_before"], ".3f"),
        show(summary["accuracy_after"], ".3f"),
        show(summary["teacher_accuracy"], ".3f"),
    )
    table.add_row("KL to the teacher", show(summary["kl_first"], ".4f"), show(summary["kl_last"], ".4f"), "0")
    table.add_row("steps", "", str(summary["steps"]), "")
    table.add_row("tokens", "", f"{summary['tokens']:,}", "")
    table.add_row("seconds", "", show(summary["seconds"], ".0f"), "")
    table.caption = f"{folder}: summary.json, metrics.jsonl, plot.png, export/ (Hugging Face format)"
    table.caption_justify = "left"
    return table


_ROLES = (("generation", "generation"), ("teacher", "teacher"), ("training", "training"))


def role_table(found: Mapping[str, float]) -> Table:
    """The last step by role: busy share of the step, tokens per second of that time, memory, and what waited for it."""
    table = Table(box=None, pad_edge=False)
    for column in ("role", "busy %", "tok/s", "GiB", "waiting"):
        table.add_column(column, justify="left" if column == "role" else "right")
    step = max(found.get("timing/step", 0.0), 1e-9)
    for role, span in _ROLES:
        share = found.get(f"timing/busy_{role}", found.get(f"timing/{span}", 0.0) / step)
        memory = found.get(f"memory/{role}_gib", found.get("memory/all_gib"))
        speed = found.get("rollout/tokens", 0.0) / max(share * step, 1e-9)
        waiting = found.get(f"timing/queue_{role}")  # prompts, or rollouts
        table.add_row(
            role,
            f"{100 * share:.0f}",
            f"{speed:,.0f}",
            "-" if memory is None else f"{memory:.1f}",
            "-" if waiting is None else f"{waiting:.1f}",
        )
    return table

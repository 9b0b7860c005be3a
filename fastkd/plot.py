"""The picture of a run: KL to the teacher and accuracy over steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def plot(lines: Sequence[dict[str, float]], path: Path, teacher_accuracy: float | None = None) -> None:
    """Draw ``plot.png`` from the lines of a metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    _curve(left, lines, "train/loss", "loss (training rollouts)", color="#9db4c0", linewidth=1)
    _curve(left, lines, "validation/kl", "reverse KL (held-out prompts)", color="#1d3557", marker="o")
    left.set(xlabel="step", ylabel="nats per response token", yscale="log", title="Divergence from the teacher")
    _curve(right, lines, "validation/accuracy", "student", color="#2a9d8f", marker="o")
    if teacher_accuracy is not None:
        right.axhline(teacher_accuracy, color="#e76f51", linestyle="--", label="teacher")
    right.set(xlabel="step", ylabel="accuracy on held-out problems", ylim=(0, 1.03), title="Graded answers")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    temporary = path.with_name(f".{path.stem}.tmp.png")
    figure.savefig(temporary, dpi=130)
    plt.close(figure)
    temporary.replace(path)


def _curve(axes: Any, lines: Sequence[dict[str, float]], name: str, label: str, **style: Any) -> None:
    points = [(line["step"], line[name]) for line in lines if name in line]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, **style)

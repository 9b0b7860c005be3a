"""How time and memory grow with N, K and V, one axis at a time around a base shape; and the plot against N.

Every point runs the bare GEMMs (in chunks as large as ours), topk_kl fast and low, the same loss from materialised
logits (as TRL computes forward/bucket; left out where it would not fit), one bare GEMM, vocab_topk, and GEMM +
torch.topk + logsumexp.

On a GPU the base is the reference shape. On a CPU everything is scaled down, so that all axes take minutes.

Letters: N tokens, D hidden, V vocabulary, K kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from benchmarks.bench_linear_kl import bare_gemms, chunk_rows
from benchmarks.bench_linear_topk import gemm, topk_and_logsumexp
from benchmarks.measure import Bench, Skipped, Work
from benchmarks.providers import Shape, fused, gate, make, materialised, step, work_dtype
from benchmarks.records import Row
from fastkd.kernels import vocab_topk

CUDA_BASE, CPU_BASE = Shape(16_384, 4096, 151_936, 512), Shape(1024, 256, 32_768, 64)
CUDA_AXES = {
    "n": (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536),
    "k": (8, 32, 128, 512, 2048),
    "v": (32_768, 65_536, 131_072, 262_144),
}
CPU_AXES = {
    "n": (256, 512, 1024, 2048, 4096),
    "k": (8, 32, 128, 512, 2048),
    "v": (8192, 16_384, 32_768, 65_536, 131_072),
}
BASE, AXES = (CUDA_BASE, CUDA_AXES) if torch.cuda.is_available() else (CPU_BASE, CPU_AXES)
# Seconds that the rounds of one point may take.
LIMIT = {"cuda": 4.0, "cpu": 12.0}
_ROUNDS = 5
# Column of the tables → style of its line in the plot.
_LINES = {
    "bare GEMMs": ("3 bare GEMMs", "#8d99ae", "--"),
    "fast": ("topk_kl, fast", "#1d3557", "-"),
    "low": ("topk_kl, low memory", "#2a9d8f", "-"),
    "materialised": ("materialised logits", "#e76f51", "-"),
    "vocab_topk": ("vocab_topk", "#6a4c93", "-"),
    "GEMM + topk": ("GEMM + torch.topk", "#e9c46a", "-"),
}


def point(bench: Bench, shape: Shape, limit: float) -> Row:
    """One row of a table."""
    case = make(shape, bench.device, work_dtype(bench.device))
    rows = chunk_rows(shape, bench.device)
    fast, low = fused("forward", "bucket"), fused("forward", "bucket", memory="low")
    theirs = materialised()[-1]
    x, w = case.hidden.detach(), case.weight.detach()
    work: dict[str, Work] = {
        "bare GEMMs": lambda: bare_gemms(x, w, rows),
        "fast": lambda: step(fast.loss(case), case),
        "low": lambda: step(low.loss(case), case),
        "materialised": lambda: step(theirs.loss(case), case),
        "bare GEMM": lambda: gemm(x, w, rows),
        "vocab_topk": lambda: vocab_topk(x, w, shape.k),
        "GEMM + topk": lambda: gemm(x, w, rows, topk_and_logsumexp(shape.k)),
    }
    notes = []
    if lack := bench.lacks(int(theirs.bytes_per_logit * shape.n * shape.v)):
        del work["materialised"]
        notes.append(f"skipped: materialised: {lack}")
    # A warm-up of its own would double the time of a point on the CPU; the memory call is one.
    timings = bench.race(work, rounds=min(bench.rounds, _ROUNDS), limit=limit, warm=bench.device.type == "cuda")
    row: Row = {}
    spread = 0.0
    memory: Row = {}
    for name, timing in timings.items():
        if isinstance(timing, Skipped):
            notes.append(f"skipped: {name}: {timing.reason}")
            if name in ("fast", "low", "vocab_topk"):
                bench.failures.append(f"{name} at {shape}: {timing.reason}")
            continue
        row[f"{name} ms"] = 1e3 * timing.median
        spread = max(spread, (timing.quantile(0.8) - timing.quantile(0.2)) / timing.median)
        if timing.extra_bytes is not None and not name.startswith("bare"):
            held = case.gradient_bytes if name in ("fast", "low", "materialised") else 0
            memory[f"{name} MB"] = max(0, timing.extra_bytes - held) / 1e6
    if "bare GEMMs ms" in row and "fast ms" in row:
        row["fast %"] = 100.0 * row["bare GEMMs ms"] / row["fast ms"]
    if "bare GEMM ms" in row and "vocab_topk ms" in row:
        row["vocab_topk %"] = 100.0 * row["bare GEMM ms"] / row["vocab_topk ms"]
    row |= memory
    row["largest p80 − p20, %"] = 100.0 * spread
    return row | ({"note": "; ".join(notes)} if notes else {})


def growth_table(
    bench: Bench, axis: str, base: Shape, values: Sequence[int], *, limit: float | None = None
) -> list[Row]:
    """Measure, print and store ``growth_<axis>``; along N the plot is drawn too."""
    if not bench.late:
        gate(bench, [fused("forward", "bucket"), fused("forward", "bucket", memory="low"), materialised()[-1]])
    rows: list[Row] = []
    for value in values:
        shape = base._replace(**{axis: value})
        head = {axis.upper(): value}
        if bench.late:
            rows.append(head | {"note": "not run: no time left"})
            continue
        rows.append(head | point(bench, shape, LIMIT[bench.device.type] if limit is None else limit))
        bench.clean()
    fixed = ", ".join(f"{key.upper()}={value:,}" for key, value in base._asdict().items() if key != axis)
    kind = str(work_dtype(bench.device)).removeprefix("torch.")
    bench.report(
        f"growth_{axis}", f"Growth with {axis.upper()} ({fixed}, {kind}; MB beyond inputs and gradients)", rows,
        base=base._asdict(),
    )  # fmt: skip
    if axis == "n":
        title = f"{bench.device.type.upper()}, {fixed}"
        problem = plot(rows, bench.book.path.with_suffix(".png"), title)
        bench.show(f"plot: {problem or bench.book.path.with_suffix('.png')}")
    return rows


def plot(rows: Sequence[Mapping[str, float]], path: Path, title: str) -> str | None:
    """Time and peak memory against N, both axes logarithmic; returns why there is none."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return "skipped: matplotlib is not installed"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for name, (label, color, line) in _LINES.items():
        for axes, unit in ((left, "ms"), (right, "MB")):
            # A logarithmic axis has no 0: what took no measurable memory is left out.
            points = [(row["N"], row[f"{name} {unit}"]) for row in rows if row.get(f"{name} {unit}")]
            if points:
                axes.plot(*zip(*points, strict=True), line, marker="o", markersize=4, color=color, label=label)
    numbers = [int(row["N"]) for row in rows]
    left.set(ylabel="ms", title="Time (losses: forward + backward)")
    right.set(ylabel="MB", title="Peak memory beyond inputs and gradients")
    for axes in (left, right):
        axes.set(xlabel="N tokens", xscale="log", yscale="log")
        axes.set_xticks(numbers, [f"{n // 1024}k" if n >= 1024 else str(n) for n in numbers])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp.png")
    figure.savefig(temporary, dpi=130)
    plt.close(figure)
    temporary.replace(path)
    return None


@pytest.mark.parametrize("axis", AXES)
def test_growth(bench, axis):
    growth_table(bench, axis, BASE, AXES[axis])

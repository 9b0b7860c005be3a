"""The picture of a plan: memory per role, stacked, against the device; time per role below one another."""

from __future__ import annotations

from pathlib import Path

from fastkd.plan.assemble import Plan
from fastkd.plan.layout import ROLES
from fastkd.plan.memory import ROWS

COLORS = {
    "parameters": "#1d3557", "master weights": "#457b9d", "gradients": "#8ab6d6", "optimizer": "#5f7f99",
    "running mean": "#b8c4cf", "all-gather": "#2a9d8f", "gradients in flight": "#7cc8bf", "activations": "#e9c46a",
    "loss kernel": "#f4a261", "top-k kernel": "#f4a261", "teacher rows": "#e76f51", "KV cache": "#9b5de5",
    "engine": "#cdb4f6", "quantised weights": "#c9ada7", "prompt logits": "#f4a261",
    "context": "#adb5bd", "fragmentation": "#dee2e6",
}  # fmt: skip
"""Of every row of a memory table."""


def draw(plan: Plan, path: Path, title: str) -> None:
    """Write a PNG, atomically."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cpu = plan.layout.rates.device.is_cpu
    unit, scale = ("MiB", 1 << 20) if cpu else ("GiB", 1 << 30)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained", width_ratios=(3, 2))
    bars = [(role, plan.memory[role].rows) for role in ROLES]
    for pool in plan.layout.pools:
        if len(pool) > 1 and plan.layout.devices(pool[0]) > 1:  # what they have on one device together
            together = {name: sum(plan.memory[role].rows.get(name, 0.0) for role in pool) for name in ROWS}
            bars.append(("all roles" if len(pool) == len(ROLES) else "\n+ ".join(pool), together))
    base = [0.0] * len(bars)
    for name in ROWS:
        sizes = [rows.get(name, 0.0) / scale for _, rows in bars]
        if any(sizes):
            left.barh(range(len(bars)), sizes, left=base, color=COLORS[name], label=name, height=0.6)
            base = [a + b for a, b in zip(base, sizes, strict=True)]
    if not cpu:
        label = plan.layout.rates.device.label
        left.axvline(plan.capacity / scale, color="#c1121f", linestyle="--", linewidth=1.2, label=label)
    left.set(xlabel=f"{unit} per device", title="Memory at each role's peak")
    left.set_yticks(range(len(bars)), [name for name, _ in bars])
    left.invert_yaxis()
    left.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)
    seconds = [plan.time[role].seconds for role in ROLES]
    colors = ["#e76f51" if role == plan.bound else "#457b9d" for role in ROLES]
    lengths = right.barh(range(len(ROLES)), seconds, color=colors, height=0.6)
    right.bar_label(lengths, fmt="%.3g s", padding=3)
    right.set(xlabel="seconds per step", title=f"Time: bound by {plan.bound}", xlim=(0, 1.2 * max(seconds)))
    right.set_yticks(range(len(ROLES)), ROLES)
    right.invert_yaxis()
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.25)
        axes.set_axisbelow(True)
    figure.suptitle(title)
    temporary = path.with_name(f".{path.stem}.tmp.png")
    figure.savefig(temporary, dpi=130)
    plt.close(figure)
    temporary.replace(path)

"""Is a node fit to work? Checks that take a second and spare an hour: device, arithmetic, disk, and the group's links.

Every worker runs ``examine`` before its group forms; ``judge`` compares what they found and names node and check.
"""

from __future__ import annotations

import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from rich.table import Table
from torch import Tensor

from fastkd.errors import UserError, reason


@dataclass(frozen=True, slots=True)
class Limits:
    """What a healthy node has."""

    disk_path: str = "."
    """A folder on the disk that is written to; its nearest existing parent is looked at."""
    free_gib: float = 1.0
    """Free space there."""


@dataclass(slots=True)
class Report:
    """What one worker found."""

    role: str
    rank: int
    node: str
    device: str = "none"
    uuid: str | None = None
    """Of the GPU; None on a CPU."""
    matmul_seconds: float | None = None
    free_gib: float | None = None
    allreduce_seconds: float | None = None
    problems: dict[str, str] = field(default_factory=dict)
    """Check → what is wrong."""


def examine(role: str, rank: int, node: str, device_type: str, limits: Limits) -> Report:
    """The checks that a worker does alone; never raises for what it finds."""
    report = Report(role, rank, node)
    checks: list[tuple[str, Callable[[], None]]] = [
        ("device", lambda: _device(report, device_type)),
        ("matmul", lambda: _matmul(report, device_type)),
        ("disk", lambda: _disk(report, limits)),
    ]
    for name, check in checks:
        try:
            check()
        except Exception as error:  # a driver that is broken raises what it likes
            report.problems[name] = reason(error)
            if name == "device":
                break  # nothing runs without it
    return report


def _device(report: Report, device_type: str) -> None:
    if device_type == "cpu":
        report.device = "cpu"
        return
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no CUDA device")
    properties = torch.cuda.get_device_properties(0)
    report.device, report.uuid = properties.name, str(properties.uuid)


def _matmul(report: Report, device_type: str) -> None:
    began = time.monotonic()
    wrong = multiply_wrong(torch.device(device_type))
    report.matmul_seconds = time.monotonic() - began
    if wrong:
        raise RuntimeError(f"{wrong} elements of a product of whole numbers are wrong")


def multiply_wrong(device: torch.device, multiply: Callable[[Tensor, Tensor], Tensor] = torch.matmul) -> int:
    """Elements of a product that are off. The factors are small whole numbers, so every format gives it exactly."""
    size = 1024 if device.type == "cuda" else 256
    i, j = torch.arange(size)[:, None], torch.arange(size)[None, :]
    left, right = (i * 3 + j * 5) % 7, (i * 2 + j * j) % 5
    # At most 6 · 4 · 1024 < 2²⁴: exact in float32 whatever the order of the sum, also with TF32 factors.
    product = multiply(left.float().to(device), right.float().to(device)).cpu()
    return int(product.ne((left.double() @ right.double()).float()).sum())


def _disk(report: Report, limits: Limits) -> None:
    path = Path(limits.disk_path).absolute()
    while not path.exists():
        path = path.parent
    report.free_gib = shutil.disk_usage(path).free / 2**30
    if report.free_gib < limits.free_gib:
        raise RuntimeError(f"{report.free_gib:.1f} GiB free under {path}, wanted {limits.free_gib:g}")


def exchange(device: torch.device) -> float:
    """Seconds of a small all-reduce over the group.

    Raises:
        RuntimeError: the sum is wrong.
    """
    size, rank = dist.get_world_size(), dist.get_rank()
    values, began = torch.zeros(0), 0.0
    for _ in range(2):  # the first opens connections
        values = torch.full((1 << 16,), float(rank + 1), device=device)
        began = time.monotonic()
        dist.all_reduce(values)
        values = values.cpu()
    seconds = time.monotonic() - began
    if bool(values.ne(size * (size + 1) / 2).any()):
        raise RuntimeError(f"all-reduce of 1 … {size} gave {values[0]:g}")
    return seconds


def judge(reports: Sequence[Report]) -> None:
    """Accept the workers of a role, or say which node fails which check.

    Raises:
        UserError: a check failed, or two workers hold the same GPU.
    """
    holders: dict[str, list[Report]] = defaultdict(list)
    for report in reports:
        if report.uuid is not None:
            holders[report.uuid].append(report)
    found = [
        (one.node, f"{one.role} rank {one.rank} on {one.node}: {name}: {text}")
        for one in reports
        for name, text in one.problems.items()
    ]
    for uuid, several in holders.items():
        if len(several) > 1:
            who = ", ".join(f"{one.role} rank {one.rank}" for one in several)
            node = several[0].node
            found.append((node, f"{who} on {node}: unique device: they all hold GPU {uuid}"))
    if found:
        nodes = ", ".join(sorted({node for node, _ in found}))
        raise UserError(
            "health", "; ".join(text for _, text in found), f"Mend or leave out {nodes}, or lower what is asked of it"
        )


def table(reports: Sequence[Report]) -> Table:
    """A line for each worker."""
    made = Table(title="nodes", title_justify="left")
    for name in ("role", "rank", "node", "device", "matmul ms", "all-reduce ms", "disk GiB", "verdict"):
        made.add_column(name, justify="right" if name.endswith(("ms", "GiB", "rank")) else "left")

    def show(value: float | None, scale: float = 1.0) -> str:
        return "-" if value is None else f"{value * scale:.1f}"

    for one in reports:
        made.add_row(
            one.role,
            str(one.rank),
            one.node,
            one.device,
            show(one.matmul_seconds, 1e3),
            show(one.allreduce_seconds, 1e3),
            show(one.free_gib),
            ", ".join(one.problems) or "ok",
        )
    return made

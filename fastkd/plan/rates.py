"""What devices and links can do: the editable table ``rates.yaml``, as numbers in bytes and seconds.

Peak rates are the makers' figures; ``reached`` says what share of each a run gets, and ``assumed`` what a recipe does
not say (mean lengths, memory outside tensors). All of it is there to be replaced by measurements of one's own.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from fastkd.errors import UserError

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator, or the CPU of a node. Peak rates."""

    name: str
    label: str
    memory: float
    """Bytes."""
    flops: dict[str, float]
    """Floating-point operations per second of dense matrix products, by precision."""
    bandwidth: float
    """Bytes per second of its memory."""
    link: float
    """Bytes per second to a neighbour in its node, one way."""
    network: float
    """Bytes per second out of the node, one way: this device's share."""
    host: float
    """Bytes per second to host memory, one way."""

    @property
    def is_cpu(self) -> bool:
        """Whether the kernels take their CPU path and roles share one process."""
        return self.name.startswith("cpu")


@dataclass(frozen=True, slots=True)
class Rates:
    """The table for one plan."""

    device: Device
    reached: dict[str, float]
    """Share of a peak rate that a run gets, in (0, 1]."""
    assumed: dict[str, Any]
    """What the recipe does not say; ``rates.yaml`` explains each."""

    def speed(self, kind: str, precision: str = "bfloat16") -> float:
        """Reached rate: of "training", "scoring" and "prefill" in flop/s; of "memory", "link", "network" and "host" in
        bytes/s."""
        device = self.device
        peaks = {"memory": device.bandwidth, "link": device.link, "network": device.network, "host": device.host}
        peak = peaks[kind] if kind in peaks else device.flops[precision]
        return peak * self.reached[kind]

    def group_speed(self, size: int, per_node: int, *, spread: int = 1) -> float:
        """Bytes per second that each rank of a ring gets.

        Args:
            size: ranks of the group.
            per_node: devices of a node.
            spread: distance of neighbouring ranks (1: side by side; the tensor degree for data-parallel groups).
        """
        inside = self.speed("link")
        if size * spread <= per_node:
            return inside
        # A ring enters and leaves a node once; all groups of a node share its network cards.
        members = max(1, per_node // spread)
        return min(inside, members * self.speed("network"))

    def exchange_seconds(self, amount: float, size: int, per_node: int) -> float:
        """Seconds of an all-to-all in which each rank sends as much to every other. Each node's neighbours use its
        links, and each rank its own share of the network.

        Args:
            amount: bytes that a rank sends.
            size: ranks of the group, side by side.
            per_node: devices of a node.
        """
        if size == 1:
            return 0.0
        near = min(size, per_node)
        inside, outside = amount * (near - 1) / (size - 1), amount * (size - near) / (size - 1)
        return max(inside / self.speed("link"), outside / self.speed("network"))


def load_rates(device: str = "", path: str | Path | None = None, *, cpu: bool = False) -> Rates:
    """The table, with the user's own file over it.

    Args:
        device: a name of it; empty: ``a100-40``, or ``cpu`` for recipes without GPUs.
        path: a YAML file of the same form; only what it has is replaced.
        cpu: the recipe has no GPUs.

    Raises:
        UserError: no such device or file, or an entry that is not a positive number.
    """
    table = yaml.safe_load((files("fastkd.plan") / "rates.yaml").read_text(encoding="utf-8"))
    if path is not None:
        table = _merge(table, _read(Path(path)), str(path))
    name = (device or ("cpu" if cpu else "a100-40")).lower()
    known = table["devices"]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]}?" if near else f"Use one of {', '.join(known)}"
        raise UserError("--device", "is not in the table of rates", hint, value=device)
    if known[name].get("cpu", name.startswith("cpu")) != cpu:
        kind = "a recipe with cluster.gpus_per_node=0 runs on the CPU" if cpu else "the recipe asks for GPUs"
        raise UserError("--device", kind, f"Leave it out, or change {'cluster.gpus_per_node'}", value=device)
    entry = known[name]
    missing = [field for field in known["a100-40"] if field not in entry]
    if missing:
        raise UserError(f"devices.{name}", f"lacks {', '.join(missing)}", "Copy an entry of rates.yaml and change it")
    found = Device(
        name,
        str(entry["label"]),
        entry["memory_gib"] * GIB,
        {precision: entry[precision] * 1e12 for precision in ("bfloat16", "float32")},
        *(entry[field] * 1e9 for field in ("memory", "link", "network", "host")),
    )
    return Rates(found, table["reached"], table["assumed"])


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            "--rates", f"cannot be read ({error})", "Give a YAML file like rates.yaml", value=str(path)
        ) from None
    if not isinstance(tree, dict):
        raise UserError("--rates", "holds no mapping", "Give devices:, reached: or assumed:", value=str(path))
    return tree


def _merge(table: dict[str, Any], own: dict[str, Any], path: str, where: str = "") -> dict[str, Any]:
    """``own`` over ``table``; new names only under ``devices``."""
    merged = dict(table)
    for name, value in own.items():
        here = f"{where}{name}"
        if name not in table and where != "devices.":
            near = difflib.get_close_matches(str(name), [str(one) for one in table], n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known are {', '.join(map(str, table))}"
            raise UserError(here, f"{path} has it, and rates.yaml does not", hint)
        before = table.get(name, {})
        if isinstance(before, dict):
            if not isinstance(value, dict):
                raise UserError(here, f"{path} must have a mapping here", "See rates.yaml", value=value)
            # A new device is checked against the fields of another one.
            known = before or (table["a100-40"] if where == "devices." else {})
            checked = _merge(known, value, path, f"{here}.")
            merged[name] = checked if before else value
        elif isinstance(before, str):
            merged[name] = str(value)
        else:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or value < 0 or (value == 0 and not where.startswith("assumed")):
                raise UserError(here, f"{path} must have a number above 0 here", "See rates.yaml", value=value)
            merged[name] = value
    return merged

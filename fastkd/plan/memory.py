"""Memory of a role on one device: its rows, and the moments at which they are largest.

A role's peak is the largest of its moments. Rows are those of the peak, so that they add up; ``moments`` has the
others. ``student_memory``, ``teacher_memory`` and ``engine_memory`` fill them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fastkd.config import Teacher
from fastkd.plan.activations import Compute
from fastkd.plan.layout import SIZES, Layout, Mesh, RoleName
from fastkd.plan.rates import GIB
from fastkd.plan.shapes import Shape

ROWS = (
    "parameters",
    "master weights",
    "gradients",
    "optimizer",
    "running mean",
    "all-gather",
    "gradients in flight",
    "quantised weights",
    "activations",
    "loss kernel",
    "top-k kernel",
    "teacher rows",
    "KV cache",
    "engine",
    "prompt logits",
    "context",
    "fragmentation",
)
"""Every row of a memory table, in its order."""
STATE = ROWS[:5]
"""What stays between the steps."""
OUTSIDE = ("context", "fragmentation")
"""What no tensor of ours accounts for."""

STATES_PER_PARAMETER = {
    "adam": 2, "adamw": 2, "adamax": 2, "nadam": 2, "radam": 2, "adadelta": 2, "rprop": 2, "asgd": 1, "adagrad": 1,
    "rmsprop": 1, "sgd": 0,
}  # fmt: skip
"""float32 values that a torch optimizer keeps beside each parameter; others are counted as 2."""


@dataclass(frozen=True, slots=True)
class RoleMemory:
    """Bytes of one role on the device that holds most."""

    role: RoleName
    moments: dict[str, dict[str, float]]
    host: float = 0.0
    """Bytes in host memory per device (``cpu_offload``)."""
    facts: dict[str, float] = field(default_factory=dict)
    """Figures beside the sum, by name: bytes, or numbers of sequences."""

    @property
    def peak(self) -> str:
        """Name of the largest moment."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def rows(self) -> dict[str, float]:
        """The rows of the peak; those that are 0 left out."""
        return {name: self.moments[self.peak][name] for name in ROWS if self.moments[self.peak].get(name)}

    @property
    def total(self) -> float:
        """Bytes at the peak."""
        return sum(self.moments[self.peak].values())

    @property
    def state(self) -> float:
        """Bytes that stay between the steps."""
        return sum(self.rows.get(name, 0.0) for name in STATE)


def optimizer_states(name: str, options: Mapping[str, object]) -> int:
    """float32 values per parameter of a torch optimizer with these keyword arguments."""
    short = name.rsplit(".", 1)[-1].lower()
    extra = bool(options.get("amsgrad"))
    if short in ("sgd", "rmsprop"):
        extra = bool(options.get("momentum")) + bool(options.get("centered"))
    return STATES_PER_PARAMETER.get(short, 2) + int(extra)


def compute_of(model: Teacher, mesh: Mesh, cpu: bool, *, masters: bool) -> Compute:
    """How a model computes: one device runs float32 masters under autocast, a sharded model in its precision."""
    size = SIZES[model.precision]
    return Compute(size, mesh.alone and masters and size < 4, flash=not cpu and size < 4)


def outside(moments: dict[str, dict[str, float]], layout: Layout, role: RoleName) -> dict[str, dict[str, float]]:
    """Adds what no tensor accounts for."""
    if layout.rates.device.is_cpu:
        return moments
    assumed = layout.rates.assumed
    # On one device all roles live in one process.
    context = assumed["context_gib"] * GIB if role == "training" or layout.devices(role) > 1 else 0.0
    return {
        name: rows | {"context": context, "fragmentation": assumed["fragmentation"] * sum(rows.values())}
        for name, rows in moments.items()
    }


def most_active(layout: Layout, tokens: float) -> float:
    """Rows that count in a micro-batch: with prompts of almost no length, all of it."""
    packed = layout.recipe.policy.train_mb_tokens is not None
    share = layout.recipe.policy.generation.max_new_tokens / layout.recipe.policy.max_total_sequence_length
    return tokens if packed else tokens * min(1.0, share)


def matrices(shape: Shape) -> int:
    """Weights of the blocks that autocast copies."""
    return shape.layers * sum(one.numel for one in shape.block() if len(one.shape) > 1)

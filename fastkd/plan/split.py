"""What one rank holds of a model, and what FSDP gathers at a time: the arithmetic of ``fastkd.parallel``.

Tensor parallelism cuts a tensor first (``fastkd.tensor_styles``), FSDP2 cuts what is left by its first dimension over
dp × cp ranks and pads it to equal parts; experts are spread over all ranks (``fastkd.expert_parallel``). A unit is what
is gathered together: each block; embedding and head apart, or with the final norm as one unit when they are tied; the
rest with the root. (The experts of a block are a unit of their own; it is counted with its block.)
"""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass

from fastkd.config import LoRA
from fastkd.plan.layout import Mesh
from fastkd.plan.shapes import Shape, TensorShape


@dataclass(frozen=True, slots=True)
class Unit:
    """Parameters that are gathered together; numbers of elements."""

    name: str
    count: int
    """Units like this one."""
    trained: int
    """This rank's part of the trained ones."""
    frozen: int
    """This rank's part of the others."""
    gathered: int
    """All of it after tensor parallelism, padded as FSDP pads it."""
    gathered_trained: int
    """The trained part of that: what has a gradient."""
    persistent: bool = False
    """Stays gathered from forward to the end of backward: the root's, and a tied embedding."""


@dataclass(frozen=True, slots=True)
class Held:
    """A model on one rank."""

    units: tuple[Unit, ...]

    @property
    def trained(self) -> int:
        """Trained parameters that this rank holds."""
        return sum(unit.count * unit.trained for unit in self.units)

    @property
    def frozen(self) -> int:
        """Frozen ones."""
        return sum(unit.count * unit.frozen for unit in self.units)

    @property
    def persistent(self) -> int:
        """Elements that stay gathered."""
        return sum(unit.gathered for unit in self.units if unit.persistent)

    def named(self, name: str) -> Unit | None:
        """The unit of this name: "block", "embedding", "head", "ends" (tied) or "root"."""
        return next((unit for unit in self.units if unit.name == name), None)

    def need(self, name: str) -> Unit:
        """The unit of this name, which every model has."""
        return next(unit for unit in self.units if unit.name == name)


def held(shape: Shape, mesh: Mesh, lora: LoRA | None = None, *, trained: bool = True) -> Held:
    """What a rank holds of a model.

    Args:
        lora: adapters that are trained over a frozen base; None: all weights are.
        trained: False for a teacher.
    """
    block, ends = shape.block(), {one.name: one for one in shape.ends()}
    base_trained = trained and lora is None

    def unit(name: str, tensors: list[TensorShape], count: int = 1, persistent: bool = False) -> Unit:
        local, gathered = _sum(tensors, shape, mesh)
        adapter_local = adapter_gathered = 0
        if lora is not None and trained and name == "block":
            adapter_local, adapter_gathered = _sum(adapters(shape, lora, mesh), shape, mesh)
        return Unit(
            name,
            count,
            local if base_trained else adapter_local,
            0 if base_trained else local,
            gathered + adapter_gathered,
            gathered if base_trained else adapter_gathered,
            persistent,
        )

    units = [unit("block", block, shape.layers)]
    if shape.tied:
        units.append(unit("ends", [ends["embed_tokens.weight"], ends["norm.weight"]], persistent=True))
    else:
        units += [
            unit("embedding", [ends["embed_tokens.weight"]]),
            unit("head", [ends["lm_head.weight"]]),
            unit("root", [ends["norm.weight"]], persistent=True),
        ]
    return Held(tuple(units))


def head_rows(shape: Shape, tp: int) -> int:
    """Vocabulary rows of the head on the rank that has most."""
    return math.ceil(shape.vocab / tp)


def _sum(tensors: list[TensorShape], shape: Shape, mesh: Mesh) -> tuple[int, int]:
    """(this rank's elements, elements gathered)."""
    local = gathered = 0
    for one in tensors:
        if len(one.shape) == 3:
            # Experts are not split by tensor parallelism: FSDP shards those of a rank over all that hold the same.
            sets = max(mesh.tp * mesh.shards // mesh.ep, 1)
            part = math.ceil(one.numel / (mesh.ep * sets))
            local += part
            gathered += part * sets
            continue
        sizes = after_tensor_parallel(one, shape, mesh.tp)
        rest = math.prod(sizes[1:])
        part = math.ceil(sizes[0] / mesh.shards) * rest
        local += part
        gathered += part * mesh.shards
    return local, gathered


def after_tensor_parallel(tensor: TensorShape, shape: Shape, tp: int) -> tuple[int, ...]:
    """Sizes of one rank's part."""
    sizes, split = list(tensor.shape), tensor.split
    if split == "keys":
        few = shape.kv_heads % tp != 0 and not shape.family.gathered_attention
        split = "whole" if few else "columns"
    if split == "whole" or tp == 1:
        return tuple(sizes)
    # Experts are [E, outputs, inputs]: the same dimensions, one further back. Only engines split them so.
    axis = len(sizes) - 1 if split == "rows" else max(len(sizes) - 2, 0)
    sizes[axis] = math.ceil(sizes[axis] / tp)
    return tuple(sizes)


# ---------------------------------------------------------------- adapters


def adapters(shape: Shape, lora: LoRA, mesh: Mesh | None = None) -> list[TensorShape]:
    """A and B of the adapted layers of the first block: A is cut with a layer's inputs, B with its outputs."""
    found = []
    for layer in shape.block():
        name = f"layers.0.{layer.name.removesuffix('.weight')}"
        linear = len(layer.shape) == 2 and not layer.name.endswith("gate.weight")
        if not linear or not _chosen(name, lora):
            continue
        outputs, inputs = layer.shape
        few = layer.split == "keys" and mesh is not None and shape.kv_heads % mesh.tp != 0
        found += [
            TensorShape(f"{layer.name}.lora_A", (lora.dim, inputs), "rows" if layer.split == "rows" else "whole"),
            TensorShape(
                f"{layer.name}.lora_B", (outputs, lora.dim), "whole" if few or layer.split == "rows" else "columns"
            ),
        ]
    return found


def _chosen(name: str, lora: LoRA) -> bool:
    """The rule of ``fastkd.lora_choice``: a pattern names a layer by its full name, or an end of it after a dot."""
    parts = name.split(".")
    ends = [".".join(parts[start:]) for start in range(len(parts))]

    def matches(pattern: str) -> bool:
        return any(fnmatch.fnmatchcase(end, pattern) for end in [*ends, f"model.{name}"])

    return any(map(matches, lora.target_modules or ["*"])) and not any(map(matches, lora.exclude_modules))

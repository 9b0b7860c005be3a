"""What fake quantisation (``policy.quant_cfg``) adds to a plan: NVFP4 values of weights, kept from forward to backward.

A layer computes W̃ x̃ (``fastkd.quantization``), and autograd keeps both factors. x̃ stands in for x. W̃ is as large as the
layer after tensor parallelism and is not sharded over data-parallel ranks: with FSDP it is what a rank would hold
without sharding, unless blocks are recomputed, which keeps one block's. One device under autocast keeps W̃ in place of
its bfloat16 copies, so nothing is added there. The gradient passes straight through, and the scales are a number each.

The rule of ``fastkd.quantization_choice``, for shapes.
"""

from __future__ import annotations

import math

from fastkd.config import Quantization
from fastkd.module_names import matches
from fastkd.plan.layout import Mesh
from fastkd.plan.shapes import Shape, TensorShape
from fastkd.plan.split import after_tensor_parallel

_EMULATION = 12.5
_PARTS = {"mlp_only": ("mlp",), "experts_only": ("experts",)}


def chosen(shape: Shape, config: Quantization | None) -> list[TensorShape]:
    """The weights of the first block that are quantised."""
    if config is None:
        return []
    wanted = _PARTS.get(config.preset)
    found = []
    for one in shape.block():
        # Experts in one tensor are one layer, whose name is that of what holds them.
        layer = one.name.removesuffix(".weight") if len(one.shape) == 2 else one.name.rpartition(".")[0]
        name, parts = f"model.layers.0.{layer}", layer.split(".")
        taken = len(one.shape) > 1 and parts[-1] != "gate" and (wanted is None or any(part in wanted for part in parts))
        if taken and not any(matches(pattern, name) for pattern in config.exclude_modules):
            found.append(one)
    return found


def weights_of_a_block(shape: Shape, mesh: Mesh, config: Quantization | None) -> float:
    """Numbers of W̃ of one block on one rank."""
    total = 0.0
    for one in chosen(shape, config):
        # Experts are spread over ranks, and not split by tensor parallelism.
        experts = len(one.shape) == 3
        total += one.numel / mesh.ep if experts else math.prod(after_tensor_parallel(one, shape, mesh.tp))
    return total


def emulation(shape: Shape, mesh: Mesh, config: Quantization | None) -> float:
    """Bytes that a CPU needs besides while it quantises the largest weight, 12.5 per number; a GPU needs none."""
    sizes = [math.prod(after_tensor_parallel(one, shape, mesh.tp)) for one in chosen(shape, config)]
    return _EMULATION * max(sizes, default=0)


def inputs(shape: Shape, config: Quantization | None) -> tuple[bool, bool]:
    """Whether q, k and v share a quantised input, and whether gate and up do."""
    names = {one.name for one in chosen(shape, config)} if config is not None and config.activations else set()
    return "self_attn.q_proj.weight" in names, "mlp.gate_proj.weight" in names

"""Activations: bytes that a block keeps for backward, and what the pass under way needs besides.

Counted from what autograd saves of transformers' decoder blocks (a test compares with the tensors it really saves). Per
token, with e bytes per number:

* a norm saves its float32 input, the normalised values, and its output as the input of the next layers;
* queries and keys are saved for their norm (float32) and again after the rotation; values and attention's output once;
* the MLP saves both projections, the activated one and the product.

Sharded models compute in the recipe's precision throughout ("cast"). One device in bfloat16 runs float32 weights under
autocast: the residual stream and the norms stay float32, and every linear layer saves a bfloat16 copy of its input.

Recompute keeps a block's input alone, and one block's activations while its backward runs.

Letters: D hidden, F MLP width, H query heads, G key/value heads of this rank, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastkd.plan.shapes import Shape

_WIDE_NORMS = ("olmo2", "olmo3")
"""Multiply with the norm's weight in float32."""


@dataclass(frozen=True, slots=True)
class Compute:
    """How a model computes."""

    size: int
    """e: bytes of a number in linear layers."""
    autocast: bool = False
    """Residual stream and norms in float32 beside them."""
    flash: bool = True
    """FlashAttention (CUDA, half precision). Elsewhere sequences are gathered into rows and attention's output is
    scattered back, which keeps it twice."""

    @property
    def stream(self) -> int:
        """Bytes of a number of the residual stream."""
        return 4 if self.autocast else self.size


@dataclass(frozen=True, slots=True)
class Split:
    """How a block's work is shared."""

    tp: int = 1
    sequence_parallel: bool = False

    @property
    def stream(self) -> int:
        """Ranks that share the residual stream and the norms."""
        return self.tp if self.sequence_parallel else 1


def block_saved(shape: Shape, compute: Compute, split: Split) -> float:
    """Bytes per token that one block keeps for backward."""
    D = shape.hidden
    normed, linear_inputs = _norms(shape, compute, split)
    queries, keys = _heads(shape, split.tp)
    e = compute.size
    attention = (_normed_head_bytes(shape, compute) + e) * (queries + keys)  # before the rotation, and after it
    attention += e * keys + (1 if compute.flash else 2) * e * queries  # values, output
    attention += 4 * queries / shape.head_dim  # attention's logsumexp
    if shape.experts:
        active, inner = shape.experts_per_token, shape.expert_inner
        mlp = active * (2 * e * D + 4 * e * inner / split.tp) + 4 * shape.experts
    else:
        mlp = 4 * e * shape.inner / split.tp
    return normed * D + linear_inputs * D + attention + mlp


def _norms(shape: Shape, compute: Compute, split: Split) -> tuple[float, float]:
    """Multiples of D in bytes: what the norms save, and what linear layers save of their common inputs."""
    e, s = compute.size, compute.stream
    if shape.model_type in _WIDE_NORMS:
        # Norms behind the layers, in float32 to the end: input and normalised values; the layers' input is the stream.
        norm, inputs = 4 + 4, 5 * e if compute.autocast else 2 * e
        return shape.family.norms * norm / split.stream, inputs
    normalised = s  # before the weight
    norm = 4 + normalised
    # q, k, v read one tensor, gate and up another. Autocast makes a copy for each of the five instead.
    inputs = 5 * e if compute.autocast else 2 * e
    return shape.family.norms * norm / split.stream, inputs


def _normed_head_bytes(shape: Shape, compute: Compute) -> int:
    """Bytes per number of queries and keys that their norms save."""
    if not shape.family.qk_norm:
        return 0
    if shape.family.qk_norm == "all":
        return 4 + 4
    return 4 + compute.size


def _heads(shape: Shape, tp: int) -> tuple[int, int]:
    """(query, key) numbers per token on one rank."""
    if shape.family.gathered_attention:
        tp = 1
    return shape.heads // tp * shape.head_dim, max(shape.kv_heads // tp, 1) * shape.head_dim


def block_input(shape: Shape, compute: Compute, split: Split) -> float:
    """Bytes per token of a block's input: what recompute keeps."""
    return compute.stream * shape.hidden / split.stream


def ends_saved(shape: Shape, compute: Compute, split: Split) -> float:
    """Bytes per token outside the blocks: the final norm, the head's input, and the rotation's sines and cosines."""
    normalised = 4 if shape.model_type in _WIDE_NORMS else compute.stream
    norm = (4 + normalised + compute.stream) * shape.hidden / split.stream
    rotation = 2 * compute.stream * shape.head_dim
    return norm + rotation + (compute.size * shape.hidden if compute.autocast else 0)


def backward_workspace(shape: Shape, compute: Compute, split: Split) -> float:
    """Bytes per token of gradients in flight inside one block's backward: of the MLP's four tensors, and float32 ones
    of a norm."""
    inner = shape.experts_per_token * shape.expert_inner if shape.experts else shape.inner
    mlp = 3 * compute.size * inner / split.tp + 2 * compute.size * shape.hidden
    norm = (2 * compute.stream + 3 * 4) * shape.hidden / split.stream
    return max(mlp, norm)


def forward_workspace(shape: Shape, compute: Compute, split: Split) -> float:
    """Bytes per token at the widest place of a forward without gradients."""
    e, D = compute.size, shape.hidden
    inner = shape.experts_per_token * shape.expert_inner if shape.experts else shape.inner
    queries, keys = _heads(shape, split.tp)
    stream = compute.stream * D / split.stream
    mlp = e * D + 3 * e * inner / split.tp
    norm = 3 * 4 * D / split.stream
    attention = e * D + 2 * e * queries + 4 * queries + 2 * e * keys
    return stream + max(mlp, norm, attention)

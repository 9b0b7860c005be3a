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
    quantized: tuple[bool, bool] = (False, False)
    """q, k and v read one quantised input; gate and up do."""

    @property
    def inputs(self) -> int:
        """Copies of the stream that q, k, v, gate and up keep: one of each group, or under autocast each its own."""
        attention, mlp = self.quantized
        if not self.autocast:
            return 2
        return (1 if attention else 3) + (1 if mlp else 2)

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
    # Values, and the output, which is the next layer's input too unless that is quantised.
    attention += e * keys + (1 if compute.flash and not compute.quantized[0] else 2) * e * queries
    attention += 4 * queries / shape.head_dim  # attention's logsumexp
    if shape.experts:
        active, inner = shape.experts_per_token, shape.expert_inner
        # The tensor-parallel ranks work on a part of the tokens each.
        mlp = (active * (2 * e * D + 4 * e * inner) + 4 * shape.experts) / split.tp
    else:
        mlp = 4 * e * shape.inner / split.tp
    return normed * D + linear_inputs * D + attention + mlp


def _norms(shape: Shape, compute: Compute, split: Split) -> tuple[float, float]:
    """Multiples of D in bytes: what the norms save, and what linear layers save of their common inputs."""
    e, s = compute.size, compute.stream
    if shape.model_type in _WIDE_NORMS:
        # Norms behind the layers, in float32 to the end: input and normalised values; the layers' input is the stream.
        norm = 4 + 4
        return shape.family.norms * norm / split.stream, compute.inputs * e
    normalised = s  # before the weight
    norm = 4 + normalised
    return shape.family.norms * norm / split.stream, compute.inputs * e


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
    return norm + rotation_saved(shape, compute) + (compute.size * shape.hidden if compute.autocast else 0)


def rotation_saved(shape: Shape, compute: Compute) -> float:
    """Bytes per token of sines and cosines: of ``ends_saved``, what lasts until the first block's backward."""
    return 2.0 * compute.stream * shape.head_dim


def backward_workspace(shape: Shape, compute: Compute, split: Split) -> float:
    """Bytes per token of gradients in flight inside one block's backward, beyond what it frees meanwhile: of the MLP's
    tensors, and float32 ones of a norm."""
    inner = shape.experts_per_token * shape.expert_inner if shape.experts else shape.inner
    # Of product, activation and up projection; the product itself is freed when its gradient is known.
    mlp = 2 * compute.size * inner / split.tp + 2 * compute.size * shape.hidden
    norm = (2 * compute.stream + 3 * 4) * shape.hidden / split.stream
    return max(mlp, norm)


def forward_workspace(shape: Shape, compute: Compute, split: Split, *, prompt: int = 0) -> float:
    """Bytes per token at the widest place of a forward without gradients.

    Args:
        prompt: tokens of each sequence when a cache is filled with transformers' own attention, which repeats keys and
            values for every query head and makes a mask; 0: packed sequences.
    """
    e, s, D = compute.size, compute.stream, shape.hidden
    inner = shape.experts_per_token * shape.expert_inner if shape.experts else shape.inner
    queries, keys = _heads(shape, split.tp)
    stream = s * D / split.stream
    normed = e * D + (s * D if compute.autocast else 0)
    rotation = rotation_saved(shape, compute)
    if prompt:
        repeated = 2 * e * queries if queries > keys else (2 * e * keys if compute.autocast else 0)
        attention = s * queries + repeated + e * queries + (1 + e) * prompt
    else:
        attention = s * (queries + keys) + e * keys + e * queries + 4 * queries / shape.head_dim
        attention += 0 if compute.flash else e * (queries + 2 * keys)  # gathered into rows
    # A CPU without bfloat16 units sums a product in float32 first.
    product = max(3 * e, 2 * e + 4 if e < 4 and not compute.flash else 0) * inner / split.tp
    # The embeddings are the trunk's, and a block's input its caller's, until they return; after attention there is
    # another sum besides.
    mlp = 2 * stream + normed + product
    norm = 2 * stream + 3 * 4 * D / split.stream
    return rotation + (stream if shape.layers > 1 else 0.0) + max(mlp, norm, stream + normed + attention)

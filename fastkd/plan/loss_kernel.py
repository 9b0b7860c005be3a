"""Memory of the two fused heads: the student's loss and the teacher's top-K, by the chunk arithmetic of ``kernels/``.

Neither holds [N, V] logits. Per chunk of c rows the loss holds a float32 buffer [c, Vl] and some [c, K], at most
``chunk_bytes`` together; besides dX and dW, which is a float32 sum where chunks of a bfloat16 head are added up. The
top-K holds one buffer and its results.

The constants are those of the modules of ``kernels/``, which import torch and a plan must not; a test compares them.

Letters: A rows that count, c rows of a chunk, D hidden, Vl vocabulary rows of this rank, K kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

CHUNK_BYTES = {"cpu": 160 << 20, "cuda": 1 << 30}
ALIGN = 16
KEPT_TEMPORARIES = {"cpu": 12, "cuda": 5}
_LANE_MULTIPLE = 12
_SELECT_BYTES = 40 << 20
"""Logits that the CPU selects from at a time."""
_STRIDED_ENOUGH, _STRIDED_SHARE, _STRIDED_ROWS, _STRIDED_LANE, _STRIDED_LANE_BYTES = 512, 5, 1024, 10, 320
"""Of ``kernels/strided_topk.py``."""
_BLOCK_BYTES = 1 << 21
"""Logits whose exponentials the CPU adds up at a time."""


@dataclass(frozen=True, slots=True)
class LossBuffers:
    """Bytes beyond hidden states and weight."""

    chunk: int
    """Logits, [c, K] temporaries, the chunk's activations and dX, widened weight rows on a CPU."""
    sum_weight: int
    """dW while chunks are added: float32 where they are several."""
    grad_weight: int
    """dW as it is handed on; 0 when it is the sum itself."""
    grad_hidden: int
    """dX and the per-token results."""
    rows: int
    """c: rows of a chunk."""

    @property
    def peak(self) -> int:
        """Inside the call: with a chunk, or while dW is rounded after the last one."""
        return self.grad_hidden + self.sum_weight + max(self.chunk, self.grad_weight)

    @property
    def kept(self) -> int:
        """Until backward: dX and dW."""
        return self.grad_hidden + (self.grad_weight or self.sum_weight)


def leading(columns: int) -> int:
    """Columns that a buffer row has for so many logits: one spare, aligned."""
    return (columns + 1 + ALIGN - 1) // ALIGN * ALIGN


def chunk_rows(rows: int, row_bytes: int, chunk_bytes: int) -> tuple[int, int]:
    """(rows of a chunk, chunks): even chunks of at most ``chunk_bytes``."""
    if rows <= 0:
        return 0, 0
    most = max(1, chunk_bytes // max(1, row_bytes))
    count = -(-rows // most)
    return -(-rows // count), count


def lanes(columns: int, kept: int) -> tuple[int, int]:
    """(ids per lane, lanes) that the top-K deals the columns to: ``kernels/row_topk.py``."""
    each = math.isqrt(columns // (2 * kept)) if kept else 1
    if each < 2 or columns < 4 * _LANE_MULTIPLE:
        return 1, columns
    return each, -(-math.ceil(columns / each) // _LANE_MULTIPLE) * _LANE_MULTIPLE


def loss_buffers(
    *,
    tokens: int,
    active: int,
    hidden: int,
    columns: int,
    kept: int,
    size: int,
    cpu: bool,
    frozen_head: bool = False,
) -> LossBuffers:
    """Buffers of ``topk_kl`` as ``FusedLoss`` calls it (``memory="fast"``, statistics on).

    Args:
        tokens: rows of hidden states; ``active``: those that count.
        columns: Vl.
        size: bytes of a number of hidden states and weight, 2 or 4.
        frozen_head: no dW (adapters).
    """
    kind = "cpu" if cpu else "cuda"
    widened = cpu and size < 4  # a CPU multiplies in float32, and widens a part of the weight at a time
    row_bytes = leading(columns) * 4 + kept * KEPT_TEMPORARIES[kind] * 4
    reserved = CHUNK_BYTES[kind] // 4 if widened else 0
    scratch = min(reserved, columns * hidden * 4)
    c, count = chunk_rows(active, row_bytes, CHUNK_BYTES[kind] - reserved)
    if cpu:  # exponentials are gone before the [c, K] temporaries come: only what they need beyond these counts
        block = min(c, max(1, _BLOCK_BYTES // (columns * 4))) * columns * 4
        scratch += max(0, block - c * kept * KEPT_TEMPORARIES[kind] * 4)
    wide = size < 4 and (count > 1 or cpu)
    whole = 0 if frozen_head or not count else columns * hidden
    in_flight = 2 * c * hidden * 4  # two chunks of dX: one travels over tp while the next is computed
    return LossBuffers(
        chunk=c * row_bytes + scratch + c * hidden * (4 if widened else size) + in_flight,
        sum_weight=whole * (4 if wide else size),
        grad_weight=whole * size if wide else 0,
        grad_hidden=tokens * hidden * size + 6 * 4 * tokens,
        rows=c,
    )


def topk_buffers(*, active: int, hidden: int, columns: int, kept: int, size: int, cpu: bool, tp: int = 1) -> int:
    """Bytes of ``vocab_topk``: the selected hidden states, a chunk of logits, and results.

    Args: as of :func:`loss_buffers`; ``tp``: ranks that exchange candidates.
    """
    results = active * (kept * 8 + 8)
    merged = 3 * results if tp > 1 else 0  # candidates sent, received, and gathered again
    held = active * hidden * size + results + merged
    reserved = CHUNK_BYTES["cpu"] // 4 if cpu and size < 4 else 0
    scratch = min(reserved, columns * hidden * 4)
    strided = strided_rows(active, columns, kept) if cpu else None
    if strided is not None:
        c, count, sample = strided
        many = -(-columns // (count * _STRIDED_LANE * 8)) * 8
        block = c * many * _STRIDED_LANE * 4
        sums = 8 * c * many + min(block, _BLOCK_BYTES)
        widened = c * hidden * 4 if size < 4 else 0
        return held + scratch + widened + block + sums + c * sample * (_STRIDED_LANE_BYTES + 16 * count)
    each, many = lanes(columns, kept)
    width = leading(each * many)  # rows are padded to full lanes
    c, _ = chunk_rows(active, width * 4, CHUNK_BYTES["cpu" if cpu else "cuda"] - reserved)
    if cpu:  # maxima of lanes, candidates of the best ones, and some 16 numbers for each of the K
        selected = min(c, max(1, _SELECT_BYTES // (width * 4)))
        scratch += selected * ((4 * (many + each * (kept + 1)) if each > 1 else 0) + 64 * kept)
    return held + c * width * 4 + scratch


def strided_rows(active: int, columns: int, kept: int) -> tuple[int, int, int] | None:
    """(rows of a chunk, blocks, size of the sample) of a CPU's top-K: ``kernels/strided_topk.py``'s ``arrange``."""
    most, block_bytes = _STRIDED_ROWS, CHUNK_BYTES["cpu"] // _STRIDED_SHARE
    if CHUNK_BYTES["cpu"] // (columns * 4) >= min(active, _STRIDED_ENOUGH):
        return None
    while most and kept:
        chunk = -(-active // -(-active // most))
        count = -(-chunk * columns * 4 // block_bytes)
        share = kept / count
        sample = math.ceil(share + 4 * math.sqrt(share)) + 4
        if count < 2 or 8 * sample > columns // count:
            return None
        if chunk * sample * (_STRIDED_LANE_BYTES + 16 * count) <= 2 * block_bytes:
            return chunk, count, sample
        most = chunk // 2
    return None


def teacher_rows(active: int, kept: int) -> int:
    """Bytes of teacher rows on a device: int32 ids, float32 logits, two logsumexps."""
    return active * (8 * kept + 8)


def payload_bytes(kept: int) -> int:
    """Bytes of one token's teacher row on the wire (``fastkd.payload``)."""
    return 4 * kept + 16

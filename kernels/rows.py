"""What a row is: the records that cross the kernel API, and how rows become chunks and columns.

A *chunk* is as many rows of logits as fit in ``chunk_bytes``. A *slab* is a range of vocabulary columns held at
one time: the whole shard in the fast path, a part of it in the low-memory path, one rank's share under tensor
parallelism. Both reduce to one question, "which column of my buffer is id i?", and ids that have none go to a
spare **trash column** behind the last real one. So gathers and scatters keep a fixed shape, need no mask, and
never hit a wrong id (redirecting to column 0, as is often done, loses the true token 0).

Letters: N tokens, c rows of one chunk, D hidden, V vocabulary (of this shard), K kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Stands for log 0. Finite, so that 0 · log 0 is 0 and never NaN; far below any real logit, so that exp gives 0.
LOG_ZERO = -1e30
# Below this a log-value came from LOG_ZERO (plus a logsumexp's few nats, or divided by a temperature up to 1e5).
LOG_ZERO_BOUND = -1e24

# On the CPU: 256 rows of 150,000 logits; below about 190 rows the dX GEMM runs at two thirds of its rate.
DEFAULT_CHUNK_BYTES = {"cpu": 160 << 20, "other": 1 << 30, "low": 200 << 20}
# Rows of the buffer start on a cache line (16 float32), and the trash column has its place in the padding.
_ALIGN = 16


class TopK(NamedTuple):
    """What a teacher ships, one row per loss-active token.

    ``indices`` [N, K] int32: global vocabulary ids, ascending, unique in a row.
    ``logits`` [N, K] float32 or bfloat16: raw logits, not yet divided by the temperature T. An entry of −inf is
    ignored; its id need only be in range.
    ``logsumexp`` [N] float32: log Σ_V exp(logit / T) over the full (valid) vocabulary.
    ``tail_logsumexp`` [N] float32: the same over the V − K ids not kept; −inf when K = V. It keeps small tails
    exact, which the difference of ``logsumexp`` and the kept logits cannot.
    """

    indices: Tensor
    logits: Tensor
    logsumexp: Tensor | None = None
    tail_logsumexp: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> TopK:
        """``function`` of every field that is there: to pick rows, to move to a device."""
        lse, tail = self.logsumexp, self.tail_logsumexp
        return TopK(
            function(self.indices),
            function(self.logits),
            None if lse is None else function(lse),
            None if tail is None else function(tail),
        )


class TopKLoss(NamedTuple):
    """The loss and what was measured on the way; the same on every tensor-parallel rank.

    ``loss`` is a scalar, Σ_n token_weights[n] · L_n, differentiable in the inputs. The rest is [N], detached,
    0 (False) at tokens that were dropped (weight 0, or not in ``active``), and None where it would have cost an
    extra pass or an input is missing. Natural logarithms; q is the student at temperature T.
    ``per_token`` L_n; ``teacher_mass`` P and ``student_mass`` Q, the probability on the kept ids; ``entropy`` of q
    over the whole vocabulary; ``label_logprob`` of ``labels`` at temperature 1; ``top1_agree`` (bool): the teacher's
    likeliest id (the lowest, in a tie) is a likeliest id of the student.
    """

    loss: Tensor
    per_token: Tensor
    teacher_mass: Tensor | None = None
    student_mass: Tensor | None = None
    entropy: Tensor | None = None
    label_logprob: Tensor | None = None
    top1_agree: Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """Which divergence is computed, and whether its statistics are wanted."""

    kl: str = "forward"
    outside: str = "bucket"
    mixed_weight: float = 0.5
    jsd_beta: float = 0.5
    temperature: float = 1.0
    stats: bool = True
    softcap: float | None = None  # of the head: logit → c · tanh(logit / c)

    @property
    def needs_tail(self) -> bool:
        """Whether the logsumexp over the whole vocabulary is needed."""
        return self.outside != "renormalize" or self.stats

    @property
    def needs_tail_mean(self) -> bool:
        """Whether Σ e^z z is: for the entropy, and for the log-floor of reverse "zero"."""
        return self.stats or self.linear_term

    @property
    def linear_term(self) -> bool:
        """Whether the dense gradient has a term in z (β ≠ 0): the log-floor of reverse "zero"."""
        return self.outside == "zero" and self.kl in ("reverse", "mixed")

    @property
    def keeps_exponents(self) -> bool:
        """Whether writing dlogits needs z itself, not only exp(z)."""
        return self.linear_term or self.softcap is not None

    @property
    def dense_gradient(self) -> bool:
        """Whether ids outside S receive a gradient."""
        return self.outside != "renormalize"


class Tail(NamedTuple):
    """What the dense pass measures of the ids outside S, per row, in units of z (logits / T)."""

    lse: Tensor
    max: Tensor
    mean: Tensor | None = None  # Σ e^z z / Σ e^z
    lse_raw: Tensor | None = None  # logsumexp at temperature 1

    def rows(self, part: slice) -> Tail:
        """The same for some of the rows."""
        mean, raw = self.mean, self.lse_raw
        return Tail(
            self.lse[part], self.max[part], None if mean is None else mean[part], None if raw is None else raw[part]
        )


class RowGradient(NamedTuple):
    """∂L/∂z of a row: α and β of the dense part, the complete values at S."""

    alpha: Tensor | None
    beta: Tensor | None
    complete_K: Tensor

    def rows(self, part: slice) -> RowGradient:
        """The same for some of the rows."""
        alpha, beta = (None if x is None else x[part] for x in self[:2])
        return RowGradient(alpha, beta, self.complete_K[part])


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays (gradient checks); everything else is computed in float32, bfloat16 logits included."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def leading_dimension(columns: int) -> int:
    """Columns to allocate for ``columns`` real ones: the trash column and alignment added."""
    return (columns + 1 + _ALIGN - 1) // _ALIGN * _ALIGN


def on_host(device: torch.device) -> bool:
    """Whether values can be looked at for free, and passes are better cut to fit a core's cache."""
    return device.type == "cpu"


def default_chunk_bytes(device: torch.device, chunk_bytes: int | None, memory: str = "fast") -> int:
    """``chunk_bytes``, or the default of the device: 160 MiB on the CPU; 1 GiB elsewhere, 200 MiB for "low"."""
    if chunk_bytes is not None:
        return chunk_bytes
    if on_host(device):
        return DEFAULT_CHUNK_BYTES["cpu"]
    return DEFAULT_CHUNK_BYTES["low" if memory == "low" else "other"]


def chunks(rows: int, row_bytes: int, chunk_bytes: int) -> Iterator[slice]:
    """Even slices of ``rows`` rows, each at most ``chunk_bytes`` (but at least one row) large."""
    if rows == 0:
        return
    most = max(1, chunk_bytes // max(1, row_bytes))
    count = -(-rows // most)
    # Even chunks: one short rest chunk would run its GEMMs at a lower rate than the others.
    step = -(-rows // count)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def columns_of(ids: Tensor, start: int, size: int, keep: Tensor | None = None) -> Tensor:
    """Buffer columns [c, K] int64 of global ids; ``size`` (the trash column) for those not held or not kept."""
    columns = ids.long()
    if start:
        columns = columns - start
    outside = (columns < 0) | (columns >= size)
    if keep is not None:
        outside |= ~keep
    return columns.masked_fill_(outside, size) if columns is not ids else columns.masked_fill(outside, size)

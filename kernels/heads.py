"""Where logits come from and where their gradient goes: a linear head, or logits that the caller holds.

Both offer ``fill`` (a chunk of logits into a buffer) and ``drain`` (that chunk of dlogits into gradients), which is
all that the chunk loop knows of them.

Letters: N tokens of the caller, c rows of a chunk, D hidden, V valid vocabulary rows of this shard.
"""

from __future__ import annotations

from torch import Tensor

from fastkd._kernels.gemm import HeadGemms
from fastkd._kernels.problem import Problem
from fastkd._kernels.rows import LOG_ZERO, compute_dtype


class LinearHead:
    """Logits = hidden · weightᵀ, a chunk of rows at a time; gradients are summed in the compute dtype."""

    def __init__(self, hidden: Tensor, weight: Tensor, problem: Problem, need_hidden: bool, need_weight: bool):
        self.hidden, self.weight = hidden, weight[: problem.columns]
        self.rows, self.shards = problem.rows, problem.shards
        self.need_hidden, self.need_weight = need_hidden, need_weight
        self.dtype = compute_dtype(weight.dtype)
        # Widened weight rows (bfloat16 without a mixed GEMM) live in a part of the chunk's budget.
        widen = weight.dtype != self.dtype and not weight.is_cuda
        self.scratch_bytes = problem.chunk_bytes // 4 if widen else 0
        self.gemms = HeadGemms(self.weight, self.scratch_bytes)
        self.bytes_per_logit = self.dtype.itemsize + (weight.element_size() if self.gemms.mixed else 0)
        self.grad_hidden = self.grad_weight = None
        if need_hidden:
            self.grad_hidden = hidden.new_empty(hidden.shape) if self.rows is None else hidden.new_zeros(hidden.shape)
        if need_weight:
            # The slab loop writes each weight row once, so it needs no wide accumulator.
            dtype = weight.dtype if problem.by_slabs else self.dtype
            self.grad_weight = weight.new_empty(weight.shape, dtype=dtype)
            self.grad_weight[problem.columns :].zero_()  # padding ids
        self.accumulate = False

    @property
    def needs_gradient(self) -> bool:
        """Whether anything is drained."""
        return self.need_hidden or self.need_weight

    def activations(self, part: slice) -> Tensor:
        """Hidden states [c, D] of a chunk, as the GEMMs want them."""
        rows = self.hidden[part] if self.rows is None else self.hidden.index_select(0, self.rows[part])
        return self.gemms.activations(rows)

    def fill(self, part: slice, out: Tensor) -> None:
        """out[c, V] = logits of a chunk."""
        self.x = self.activations(part)
        self.gemms.logits(self.x, out)

    def drain(self, part: slice, dz: Tensor) -> None:
        """Turn a chunk of dlogits into its part of the gradients; ``fill`` was called last with the same chunk."""
        dz = self.gemms.narrow(dz)
        grad_x = pending = None
        if self.need_hidden:
            grad_x = self.hidden_slot(part)
            self.gemms.grad_hidden(dz, grad_x)
            pending = self.shards.start_sum(grad_x)  # travels while dW is computed
        if self.grad_weight is not None:
            self.gemms.grad_weight(dz, self.x, self.grad_weight[: len(self.weight)], self.accumulate)
            self.accumulate = True
        if grad_x is not None and pending is not None:
            pending.wait()
            self.store_hidden(part, grad_x)

    def hidden_slot(self, part: slice) -> Tensor:
        """Where a chunk's dX is computed: its final place when nothing has to be cast or scattered."""
        assert self.grad_hidden is not None
        if self.rows is None and self.grad_hidden.dtype == self.dtype:
            return self.grad_hidden[part]
        return self.hidden.new_empty((part.stop - part.start, self.hidden.shape[1]), dtype=self.dtype)

    def store_hidden(self, part: slice, grad_x: Tensor) -> None:
        """Cast and place what ``hidden_slot`` returned."""
        assert self.grad_hidden is not None
        if self.rows is not None:
            self.grad_hidden.index_copy_(0, self.rows[part], grad_x.to(self.grad_hidden.dtype))
        elif self.grad_hidden.dtype != self.dtype:
            self.grad_hidden[part] = grad_x

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """dX and dW in the dtypes of their inputs: the only rounding of dW."""
        if self.grad_weight is None:
            return self.grad_hidden, None
        if not self.accumulate:  # no row counted
            self.grad_weight.zero_()
        return self.grad_hidden, self.grad_weight.to(self.weight.dtype)


class GivenLogits:
    """Logits that the caller already holds; they are copied a chunk at a time, never changed."""

    def __init__(self, logits: Tensor, problem: Problem, need: bool):
        self.logits, self.rows, self.columns = logits, problem.rows, problem.columns
        self.needs_gradient = need
        self.dtype = compute_dtype(logits.dtype)
        self.scratch_bytes, self.bytes_per_logit = 0, self.dtype.itemsize
        self.grad = logits.new_zeros(logits.shape) if need else None

    def fill(self, part: slice, out: Tensor) -> None:
        """Copy a chunk; −inf (masked ids) becomes the finite LOG_ZERO."""
        source = self.logits[part] if self.rows is None else self.logits.index_select(0, self.rows[part])
        out.copy_(source[:, : self.columns]).clamp_(min=LOG_ZERO)

    def drain(self, part: slice, dz: Tensor) -> None:
        """Write a chunk of dlogits."""
        assert self.grad is not None
        rows = part if self.rows is None else self.rows[part]
        self.grad[rows, : self.columns] = dz.to(self.grad.dtype)

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradient of the logits."""
        return self.grad, None

"""Where logits come from and where their gradient goes: a linear head, or logits that the caller holds.

Both offer ``fill`` (a chunk of logits into a buffer) and ``drain`` (that chunk of dlogits into gradients), which is
all that the chunk loop knows of them.

Letters: N tokens of the caller, c rows of a chunk, D hidden, V valid vocabulary rows of this shard.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastkd._kernels.gemm import HeadGemms
from fastkd._kernels.problem import Problem
from fastkd._kernels.row_passes import row_passes
from fastkd._kernels.rows import LOG_ZERO, compute_dtype
from fastkd._kernels.vocab_parallel import Pending


class Needs(NamedTuple):
    """Which gradients are asked for."""

    inputs: bool
    weight: bool = False
    bias: bool = False


class Gradients(NamedTuple):
    """Gradients of the inputs (hidden or logits), the weight and the bias; None where not asked for."""

    inputs: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class LinearHead:
    """Logits = hidden · weightᵀ, a chunk of rows at a time; gradients are summed in the compute dtype."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, problem: Problem, needs: Needs):
        self.passes = row_passes(weight.device, compute_dtype(weight.dtype))
        self.shards, self.softcap = problem.shards, problem.objective.softcap
        self.hidden = self.shards.gather_blocks(hidden) if problem.sequence_parallel else hidden
        self.block = len(hidden) if problem.sequence_parallel else None
        self.weight, self.bias = weight[: problem.columns], None if bias is None else bias[: problem.columns]
        self.rows, self.needs = problem.rows, needs
        self.dtype = compute_dtype(weight.dtype)
        self.gemms = HeadGemms(self.weight, problem.chunk_bytes // 4)
        self.scratch_bytes = self.gemms.scratch_bytes
        self.gradient_dtype = weight.dtype if self.gemms.mixed else self.dtype  # of dlogits
        narrowed = self.gemms.mixed and not self.passes.narrows_in_place
        self.bytes_per_logit = self.dtype.itemsize + (weight.element_size() if narrowed else 0)
        self.grad_hidden = self.grad_weight = self.grad_bias = None
        if needs.inputs:
            make = self.hidden.new_empty if self.rows is None else self.hidden.new_zeros
            self.grad_hidden = make(self.hidden.shape)
        if needs.bias:
            assert bias is not None
            self.grad_bias = bias.new_zeros(bias.shape, dtype=self.dtype)
        self.whole_weight, self.accumulate = weight, False
        self.pending: tuple[slice, Tensor, Pending] | None = None

    def start(self, chunks: int) -> None:
        """Make room for dW, which ``chunks`` calls of ``drain`` will add up (0: it is written slab by slab)."""
        if self.needs.weight:
            # Only a sum over chunks needs a wide accumulator, or a device whose GEMMs do not round.
            wide = chunks > 1 or (chunks == 1 and not self.gemms.mixed)
            dtype = self.dtype if wide else self.whole_weight.dtype
            self.grad_weight = self.whole_weight.new_empty(self.whole_weight.shape, dtype=dtype)
            self.grad_weight[len(self.weight) :].zero_()  # padding ids

    def activations(self, part: slice) -> Tensor:
        """Hidden states [c, D] of a chunk, as the GEMMs want them."""
        rows = self.hidden[part] if self.rows is None else self.hidden.index_select(0, self.rows[part])
        return self.gemms.activations(rows)

    def fill(self, part: slice, out: Tensor) -> None:
        """out[c, V] = logits of a chunk."""
        self.x = self.activations(part)
        self.project(self.gemms, self.x, self.bias, out)

    def project(self, gemms: HeadGemms, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """out[c, v] = logits of activations ``x`` for the rows of the weight that ``gemms`` holds, and their bias."""
        gemms.logits(x, out)
        if bias is None:
            self.passes.cap(out, self.softcap)
            return
        self.passes.cap(out.add_(bias), self.softcap)
        # A bias of −inf masks an id; sums of 0 · log 0 need it finite.
        out.masked_fill_(torch.isneginf(bias), LOG_ZERO)

    def drain(self, part: slice, dz: Tensor) -> None:
        """Turn a chunk of dlogits into its part of the gradients; ``fill`` was called last with the same chunk."""
        if self.needs.inputs:
            grad_x = self.hidden_slot(part)
            self.gemms.grad_hidden(dz, grad_x)
            self.settle()
            # Travels while dW and the next chunk's logits are computed.
            self.pending = (part, grad_x, self.shards.start_sum(grad_x))
        if self.grad_weight is not None:
            self.gemms.grad_weight(dz, self.x, self.grad_weight[: len(self.weight)], self.accumulate)
            self.accumulate = True
        if self.grad_bias is not None:
            self.grad_bias[: len(self.weight)] += dz.sum(0, dtype=self.dtype)

    def settle(self) -> None:
        """Place the dX that is under way, when it has arrived."""
        if self.pending is not None:
            part, grad_x, arrival = self.pending
            arrival.wait()
            self.store_hidden(part, grad_x)
            self.pending = None

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

    def gradients(self) -> Gradients:
        """dX, dW and the bias's gradient in the dtypes of their inputs: the only rounding of dW."""
        self.settle()
        if self.grad_hidden is not None and self.block is not None:
            start = self.shards.rank * self.block
            self.grad_hidden = self.grad_hidden[start : start + self.block].clone()  # frees the other blocks
        if self.grad_weight is not None:
            if not self.accumulate:  # no row counted
                self.grad_weight.zero_()
            self.grad_weight = self.grad_weight.to(self.weight.dtype)
        if self.grad_bias is not None and self.bias is not None:
            self.grad_bias = self.grad_bias.to(self.bias.dtype)
        return Gradients(self.grad_hidden, self.grad_weight, self.grad_bias)


class GivenLogits:
    """Logits that the caller already holds; they are copied a chunk at a time, never changed."""

    def __init__(self, logits: Tensor, problem: Problem, needs: Needs):
        self.logits, self.rows, self.columns, self.needs = logits, problem.rows, problem.columns, needs
        self.dtype = self.gradient_dtype = compute_dtype(logits.dtype)
        self.passes = row_passes(logits.device, self.dtype)
        self.scratch_bytes, self.bytes_per_logit = 0, self.dtype.itemsize
        self.grad = logits.new_zeros(logits.shape) if needs.inputs else None

    def start(self, chunks: int) -> None:
        """Nothing to prepare."""

    def fill(self, part: slice, out: Tensor) -> None:
        """Copy a chunk; −inf (masked ids) becomes the finite LOG_ZERO."""
        source = self.logits[part] if self.rows is None else self.logits.index_select(0, self.rows[part])
        out.copy_(source[:, : self.columns]).clamp_(min=LOG_ZERO)

    def drain(self, part: slice, dz: Tensor) -> None:
        """Write a chunk of dlogits."""
        assert self.grad is not None
        rows = part if self.rows is None else self.rows[part]
        self.grad[rows, : self.columns] = dz.to(self.grad.dtype)

    def gradients(self) -> Gradients:
        """The gradient of the logits."""
        return Gradients(self.grad, None, None)

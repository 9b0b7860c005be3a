"""The three GEMMs of a linear head, always accumulated and returned in float32 (float64 for float64 inputs).

Z = X Wᵀ, dX = dZ W, dW += dZᵀ X. On CUDA bfloat16 operands go to cuBLAS with a float32 output, so logits are never
rounded. Elsewhere bfloat16 weights are widened a few rows at a time into one reused scratch: widening the whole head
would cost 4·V·D bytes, which is the memory this package exists to avoid. Narrow GEMMs are slower, so the scratch is
as large as a chunk may be.

Letters: c rows of one chunk, D hidden, V vocabulary rows of this shard.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastkd._kernels.rows import compute_dtype


class HeadGemms:
    """The GEMMs of one head weight [V, D] with activations of the same dtype."""

    def __init__(self, weight: Tensor, scratch_bytes: int):
        """``scratch_bytes``: for widened weight rows, where the device has no mixed GEMM."""
        self.weight = weight
        self.dtype = compute_dtype(weight.dtype)
        self.native = weight.dtype == self.dtype
        self.mixed = not self.native and weight.is_cuda
        self.scratch_bytes = 0 if self.native or self.mixed else scratch_bytes
        row_bytes = max(1, weight.shape[1] * self.dtype.itemsize)
        self.slab_rows = max(1, scratch_bytes // row_bytes)
        self._whole: Tensor | None = None
        self._scratch: Tensor | None = None

    def activations(self, x: Tensor) -> Tensor:
        """``x`` as the GEMMs want it: as it is, or widened where the device has no mixed GEMM."""
        return x if self.mixed else x.to(self.dtype)

    def logits(self, x: Tensor, out: Tensor, ids: slice = slice(None)) -> None:
        """out[c, V] = x[c, D] Wᵀ, or [c, …] of the ids of a slice alone."""
        if self.mixed:
            torch.mm(x, self.weight[ids].t(), out_dtype=self.dtype, out=out)
            return
        for start, stop, slab in self._slabs(ids):
            torch.mm(x, slab.t(), out=out[:, start:stop])

    def grad_hidden(self, dz: Tensor, out: Tensor, accumulate: bool = False) -> None:
        """out[c, D] = dz[c, V] W, or out += with ``accumulate``."""
        if self.mixed:
            torch.addmm(out, dz, self.weight, out_dtype=self.dtype, beta=int(accumulate), out=out)
            return
        for start, stop, slab in self._slabs():
            torch.addmm(out, dz[:, start:stop], slab, beta=int(accumulate), out=out)
            accumulate = True

    def grad_weight(self, dz: Tensor, x: Tensor, out: Tensor, accumulate: bool) -> None:
        """out[V, D] = dzᵀ x, or out += with ``accumulate``; ``out`` is in the compute dtype, or in the weight's dtype
        where GEMMs are mixed and nothing is accumulated."""
        if self.mixed and out.dtype == self.weight.dtype:
            assert not accumulate
            torch.mm(dz.t(), x, out=out)
        elif self.mixed:
            torch.addmm(out, dz.t(), x, out_dtype=self.dtype, beta=int(accumulate), out=out)
        elif accumulate:
            torch.addmm(out, dz.t(), x, out=out)
        else:
            torch.mm(dz.t(), x, out=out)

    def _slabs(self, ids: slice = slice(None)) -> Iterator[tuple[int, int, Tensor]]:
        """The weight, or its rows ``ids``, in the compute dtype: row ranges (start, stop, rows)."""
        weight = self.weight[ids]
        total = len(weight)
        if self.native:
            yield 0, total, weight
            return
        if len(self.weight) <= self.slab_rows:  # a small head is widened once, not once per chunk and pass
            if self._whole is None:
                self._whole = self.weight.to(self.dtype)
            yield 0, total, self._whole[ids]
            return
        if self._scratch is None:
            self._scratch = weight.new_empty((self.slab_rows, weight.shape[1]), dtype=self.dtype)
        for start in range(0, total, self.slab_rows):
            stop = min(start + self.slab_rows, total)
            slab = self._scratch[: stop - start]
            slab.copy_(weight[start:stop])
            yield start, stop, slab

"""The low-memory path of the fused divergence: slabs of vocabulary, computed twice.

First the statistics: for every block of rows, slab by slab, then the row mathematics. Then the gradients: slab by slab
again, for every block of rows; a slab's dW is complete when all rows have passed, so dW needs no wide copy, and dX is
summed over the slabs. Four GEMM passes instead of three, and memory that does not grow with V.

On an accelerator a slab's logits exist for one block of rows at a time, and dX is summed in 24 bits in its own place
(``triton_sum``). On the CPU a block is all rows. When only the K columns matter there ("renormalize" without
statistics) the slabs run over the ids that occur, and no logit is computed twice.

Letters: n rows that count, c rows of a block, D hidden, v columns of a slab, K kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastkd._kernels.gemm import HeadGemms
from fastkd._kernels.heads import LinearHead
from fastkd._kernels.problem import Outputs, Problem
from fastkd._kernels.rows import (
    LOG_ZERO,
    RowGradient,
    Tail,
    chunks,
    columns_of,
    leading_dimension,
    on_host,
)
from fastkd._kernels.vocab_parallel import merge_tails

# Rows of a block on accelerators: enough that summing a slab's dW over blocks stays behind its GEMMs.
_BLOCK_ROWS = 1536


def run_low(head: LinearHead, problem: Problem, outputs: Outputs) -> None:
    """All rows of a linear head, in slabs of vocabulary; results go to ``outputs``, gradients to ``head``."""
    head.start(0)
    if len(problem.weights) == 0:
        return
    slabs = Slabs(head, problem)
    gradient, lse_tail = _measure(head, problem, outputs, slabs)
    if any(head.needs):
        _descend(head, problem, slabs, gradient, lse_tail)


class Slabs:
    """Ranges of the shard's columns, or of only those columns that some kept id needs; and blocks of rows."""

    def __init__(self, head: LinearHead, problem: Problem):
        n, d = len(problem.weights), head.hidden.shape[1]
        teacher = problem.teacher_at(slice(0, n))
        self.head, self.ids, self.count, self.first = head, None, problem.columns, problem.vocab_start
        self.ids_K, self.ignorable_K = teacher.indices, teacher.logits if problem.may_ignore else None
        if problem.kept_columns_only:
            local_K = columns_of(teacher.indices, problem.vocab_start, problem.columns, problem.kept(teacher))
            used, self.ids_K = torch.unique(local_K, return_inverse=True)
            self.ids = used[used < problem.columns]
            self.count, self.first, self.ignorable_K = len(self.ids), 0, None
        # A slab holds the logits of a block, its part of dW, and its weight rows where they are copied or widened;
        # beside it a block's dX may wait to be added up.
        c = n if on_host(problem.weights.device) else min(n, _BLOCK_ROWS)
        self.blocks = list(chunks(n, 1, c))
        c = self.blocks[0].stop
        copied = self.ids is not None or (head.weight.dtype != head.dtype and not head.gemms.mixed)
        column_bytes = (c + d * (copied + head.needs.weight)) * head.dtype.itemsize
        waiting = c * d * head.dtype.itemsize if head.gemms.mixed else 0
        spare = leading_dimension(0)  # the trash column and its alignment
        self.width = max(1, min(self.count, (problem.chunk_bytes - waiting) // column_bytes - spare))
        if self.width < self.count:  # whole cache lines, and tensor cores want operands aligned
            self.width = max(1, self.width // 128 * 128) if self.width >= 128 else self.width
        self.buffer = head.weight.new_empty((c, leading_dimension(self.width)), dtype=head.dtype)
        self.x: Tensor | None = None

    def activations(self, rows: slice) -> Tensor:
        """Hidden states of a block; a single block is gathered (or widened) once, not for every slab."""
        if len(self.blocks) > 1:
            return self.head.activations(rows)
        if self.x is None:
            self.x = self.head.activations(rows)
        return self.x

    def __iter__(self) -> Iterator[tuple[slice, HeadGemms, Tensor]]:
        """(columns, their GEMMs, a buffer [c, ≥ v + 1]) of each slab."""
        for start in range(0, self.count, self.width):
            part = slice(start, min(start + self.width, self.count))
            weight = self.head.weight[part] if self.ids is None else self.head.weight[self.ids[part]]
            gemms = HeadGemms(weight, weight.numel() * self.head.dtype.itemsize)
            yield part, gemms, self.buffer[:, : leading_dimension(part.stop - part.start)]

    def project(self, gemms: HeadGemms, x: Tensor, part: slice, out: Tensor) -> None:
        """out[c, v] = logits of a slab."""
        bias = None if self.head.bias is None else self.head.bias[self.weight_rows(part)]
        self.head.project(gemms, x, bias, out)

    def kept(self, rows: slice, part: slice) -> tuple[Tensor, Tensor | None, int, int]:
        """Where to look for kept ids: ids [c, K], logits (some ignored), id of column 0, number of columns."""
        ignorable = None if self.ignorable_K is None else self.ignorable_K[rows]
        return self.ids_K[rows], ignorable, self.first + part.start, part.stop - part.start

    def held(self, rows: slice) -> Tensor:
        """[c, K] bool: which kept ids of some rows this rank holds."""
        ignorable = None if self.ignorable_K is None else ~torch.isneginf(self.ignorable_K[rows])
        return columns_of(self.ids_K[rows], self.first, self.count, ignorable) != self.count

    def weight_rows(self, part: slice) -> slice | Tensor:
        """Weight rows of a slab."""
        return part if self.ids is None else self.ids[part]


# ---------------------------------------------------------------- first: statistics and row mathematics


def _measure(head: LinearHead, problem: Problem, outputs: Outputs, slabs: Slabs) -> tuple[RowGradient, Tensor | None]:
    """Results of all rows; their ∂loss/∂logits (complete values in the dtype of dlogits) and tail logsumexps."""
    o, passes, device = problem.objective, head.passes, problem.weights.device
    n, kept = slabs.ids_K.shape
    complete_K = torch.empty((n, kept), dtype=head.gradient_dtype, device=device)
    dense: list[list[Tensor]] = [[], [], []]  # α, β, the tail's logsumexp
    for rows in slabs.blocks:
        x = slabs.activations(rows)
        c = len(x)
        values_K = torch.full((c, kept), LOG_ZERO, dtype=head.dtype, device=device)
        label_logit = tail = labels = None
        if problem.labels is not None and problem.wants_labels:
            labels, label_logit = problem.labels[rows], values_K.new_full((c,), LOG_ZERO)
        for part, gemms, buffer in slabs:
            chunk, v = buffer[:c], part.stop - part.start
            slabs.project(gemms, x, part, chunk[:, :v])
            if labels is not None and label_logit is not None:
                found = passes.pick(chunk, labels, problem.vocab_start + part.start, v, o)
                label_logit = torch.maximum(label_logit, found)
            picked_K, columns_K = passes.pick_poison(chunk, *slabs.kept(rows, part), o)
            torch.where(columns_K == v, values_K, picked_K, out=values_K)
            if o.needs_tail:
                found = passes.tail_stats(chunk[:, :v], o, raw=problem.wants_raw)
                tail = found if tail is None else _join(tail, found)
        if tail is None and o.needs_tail:  # a shard without a valid id
            tail = passes.tail_stats(values_K[:, :0], o, raw=problem.wants_raw)

        # Temporaries of the row mathematics are [c, K] each, so that even a block goes in parts.
        row_bytes = kept * passes.kept_temporaries * head.dtype.itemsize
        for piece in chunks(c, row_bytes, problem.chunk_bytes):
            at = slice(rows.start + piece.start, rows.start + piece.stop)
            gradient, lse_tail = passes.finish_rows(
                problem,
                outputs,
                at,
                problem.teacher_at(at),
                slabs.held(at) if problem.shards.parallel else None,
                values_K[piece],
                None if tail is None else tail.rows(piece),
                None if label_logit is None else label_logit[piece],
            )
            complete_K[at] = gradient.complete_K
            for column, value in zip(dense, (gradient.alpha, gradient.beta, lse_tail), strict=True):
                if value is not None:
                    column.append(value)
    alpha, beta, lse_tail = (torch.cat(column) if column else None for column in dense)
    return RowGradient(alpha, beta, complete_K), lse_tail


def _join(a: Tail, b: Tail) -> Tail:
    """The tail of two disjoint sets of columns."""

    def stack(x: Tensor | None, y: Tensor | None) -> Tensor | None:
        return None if x is None or y is None else torch.stack((x, y))

    lse, top = torch.stack((a.lse, b.lse)), torch.stack((a.max, b.max))
    return merge_tails(Tail(lse, top, stack(a.mean, b.mean), stack(a.lse_raw, b.lse_raw)))


# ---------------------------------------------------------------- second: gradients


def _descend(head: LinearHead, problem: Problem, slabs: Slabs, gradient: RowGradient, lse_tail: Tensor | None) -> None:
    """The slabs again, for dX, dW and the bias's gradient."""
    o, passes = problem.objective, head.passes
    hidden = None
    if head.needs.inputs:
        hidden = NarrowSum(head, slabs) if head.gemms.mixed and passes.narrows_in_place else WideSum(head, slabs)
    head.accumulate = True
    if head.grad_weight is not None and slabs.ids is not None:
        head.grad_weight.zero_()
    wide = None
    if head.grad_weight is not None:
        wide = head.weight.new_empty((slabs.width, head.weight.shape[1]), dtype=head.dtype)
    for part, gemms, buffer in slabs:
        v = part.stop - part.start
        for rows in slabs.blocks:
            chunk = buffer[: rows.stop - rows.start]
            x = slabs.activations(rows)
            lse = None if lse_tail is None else lse_tail[rows]
            if o.dense_gradient and lse is not None:
                slabs.project(gemms, x, part, chunk[:, :v])
                passes.exponents(chunk[:, :v], lse, o)
            columns_K = passes.find_columns(chunk, *slabs.kept(rows, part))
            dz = passes.write_dlogits(chunk, v, columns_K, lse, lse, gradient.rows(rows), o, head.gradient_dtype)
            if hidden is not None:
                hidden.add(rows, gemms, dz, first=part.start == 0)
            if wide is not None:
                gemms.grad_weight(dz, x, wide[:v], accumulate=rows.start > 0)
            if head.grad_bias is not None:
                head.grad_bias[slabs.weight_rows(part)] += dz.sum(0, dtype=head.dtype)
        if head.grad_weight is not None and wide is not None:
            if slabs.ids is None:
                head.grad_weight[part].copy_(wide[:v])  # rounds on the way
            else:
                head.grad_weight[slabs.ids[part]] = wide[:v].to(head.grad_weight.dtype)
    if hidden is not None:
        hidden.store()


class WideSum:
    """dX summed in the compute dtype, by the GEMMs themselves."""

    def __init__(self, head: LinearHead, slabs: Slabs):
        self.head, self.everything = head, slice(0, slabs.blocks[-1].stop)
        self.total = head.hidden_slot(self.everything)
        if slabs.count == 0:
            self.total.zero_()

    def add(self, rows: slice, gemms: HeadGemms, dz: Tensor, first: bool) -> None:
        """dX[rows] += dz W."""
        gemms.grad_hidden(dz, self.total[rows], accumulate=not first)

    def store(self) -> None:
        """Sum over the ranks, and put dX where it belongs."""
        self.head.shards.start_sum(self.total).wait()
        self.head.store_hidden(self.everything, self.total)


class NarrowSum:
    """dX summed in 24 bits, 16 of them in the place of the bfloat16 result."""

    def __init__(self, head: LinearHead, slabs: Slabs):
        from fastkd._kernels.triton_sum import Sum24

        assert head.grad_hidden is not None
        self.head, self.slabs = head, slabs
        n, d = slabs.blocks[-1].stop, head.hidden.shape[1]
        # With rows left out the result's rows lie elsewhere.
        self.sum = Sum24(head.grad_hidden if head.rows is None else head.hidden.new_empty((n, d)))
        self.block = head.hidden.new_empty((slabs.blocks[0].stop, d), dtype=head.dtype)
        if slabs.count == 0:
            for rows in slabs.blocks:
                self.sum.add(rows, self.block[: rows.stop - rows.start].zero_(), first=True)

    def add(self, rows: slice, gemms: HeadGemms, dz: Tensor, first: bool) -> None:
        """dX[rows] += dz W."""
        block = self.block[: rows.stop - rows.start]
        gemms.grad_hidden(dz, block)
        self.sum.add(rows, block, first)

    def store(self) -> None:
        """Sum over the ranks in float32, round once, and put dX where it belongs."""
        for rows in self.slabs.blocks:
            block = self.sum.read(rows, self.block[: rows.stop - rows.start])
            self.head.shards.start_sum(block).wait()
            self.head.store_hidden(rows, block)

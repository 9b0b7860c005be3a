"""The fused linear head and top-K divergence: chunk loops over GEMMs and row kernels, without autograd.

Fast: per chunk of rows, Z = X Wᵀ, statistics of the poisoned logits, row mathematics on [c, K], dlogits in place,
dX = dZ W, dW += dZᵀ X: three GEMM passes with the gradient computed in forward (two with a frozen head, one without
gradients). Low: statistics per slab of vocabulary for all rows, then the slabs again for their gradients: four
passes, no wide dW, memory independent of V. When only the K columns matter ("renormalize" without statistics) the
slabs run over the ids that occur, and nothing is computed twice.

Letters: N tokens of the caller, n rows that count, c rows of a chunk, D hidden, V vocabulary rows of this shard,
v columns of a slab, K kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastkd._kernels.gemm import HeadGemms
from fastkd._kernels.heads import GivenLogits, Gradients, LinearHead, Needs
from fastkd._kernels.problem import Outputs, Problem
from fastkd._kernels.rows import LOG_ZERO, RowGradient, Tail, TopKLoss, chunks, columns_of, leading_dimension
from fastkd._kernels.vocab_parallel import merge_tails


def solve(
    inputs: Tensor, weight: Tensor | None, bias: Tensor | None, problem: Problem, needs: Needs
) -> tuple[TopKLoss, Gradients]:
    """The loss and the gradients asked for. Autocast is off inside: it would compute in bfloat16.

    ``inputs`` are hidden [N, D] with ``weight`` [Vl, D], or logits [N, Vl] without.
    """
    with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
        if weight is None:
            head = GivenLogits(inputs, problem, needs)
            tokens = len(inputs)
        else:
            head = LinearHead(inputs, weight, bias, problem, needs)
            tokens = len(head.hidden)
        outputs = Outputs(tokens, problem, head.dtype, inputs.device)
        if problem.by_slabs and isinstance(head, LinearHead):
            run_low(head, problem, outputs)
        else:
            run_fast(head, problem, outputs)
        return outputs.result(), head.gradients()


def run_fast(head: LinearHead | GivenLogits, problem: Problem, outputs: Outputs) -> None:
    """Chunks of rows over the whole shard; every logit is computed once."""
    o, columns, start, passes = problem.objective, problem.columns, problem.vocab_start, head.passes
    leading, kept = leading_dimension(columns), problem.teacher.indices.shape[1]
    row_bytes = leading * head.bytes_per_logit + kept * passes.kept_temporaries * head.dtype.itemsize
    buffer = None
    for part in chunks(len(problem.weights), row_bytes, problem.chunk_bytes - head.scratch_bytes):
        c = part.stop - part.start
        if buffer is None:  # no later chunk is larger
            buffer = torch.empty((c, leading), dtype=head.dtype, device=problem.weights.device)
        chunk = buffer[:c]
        head.fill(part, chunk[:, :columns])

        teacher = problem.teacher_at(part)
        label_logit = tail = None
        if problem.labels is not None and problem.wants_labels:
            label_logit = passes.pick(chunk, problem.labels[part], start, columns, o)
        ignorable = teacher.logits if problem.may_ignore else None
        picked_K, columns_K = passes.pick_poison(chunk, teacher.indices, ignorable, start, columns, o)
        if o.needs_tail:
            tail = passes.tail_stats(chunk[:, :columns], o, raw=problem.wants_raw)
        held_K = columns_K != columns if problem.shards.parallel else None
        gradient, lse_tail = passes.finish_rows(problem, outputs, part, teacher, held_K, picked_K, tail, label_logit)
        if any(head.needs):
            shift = None if tail is None else tail.max  # of this shard: ``finish_rows`` merges its own copy
            dz = passes.write_dlogits(chunk, columns, columns_K, shift, lse_tail, gradient, o, head.gradient_dtype)
            head.drain(part, dz)


# ---------------------------------------------------------------- low memory: slabs of vocabulary


class Slabs:
    """Ranges of the shard's columns, or of only those columns that some kept id needs.

    ``kept`` says where to look for the kept ids in a slab: the teacher's ids and the id of column 0, or positions among
    the chosen columns.
    """

    def __init__(self, head: LinearHead, problem: Problem, everything: Tensor):
        teacher = problem.teacher_at(slice(0, len(problem.weights)))
        self.head, self.ids, self.count, self.first = head, None, problem.columns, problem.vocab_start
        self.ids_K, self.ignorable_K = teacher.indices, teacher.logits if problem.may_ignore else None
        if problem.kept_columns_only:
            local_K = columns_of(teacher.indices, problem.vocab_start, problem.columns, problem.kept(teacher))
            used, self.ids_K = torch.unique(local_K, return_inverse=True)
            self.ids = used[used < problem.columns]
            self.count, self.first, self.ignorable_K = len(self.ids), 0, None
        n, d = everything.shape
        # A slab holds its logits for all rows, and its weight rows where they have to be copied or widened.
        copied = self.ids is not None or head.weight.dtype != head.dtype
        column_bytes = (n + d * (copied + head.needs.weight)) * head.dtype.itemsize
        spare = leading_dimension(0)  # the trash column and its alignment
        self.width = max(1, min(self.count, problem.chunk_bytes // column_bytes - spare))
        self.buffer = everything.new_empty((n, leading_dimension(self.width)), dtype=head.dtype)

    def __iter__(self) -> Iterator[tuple[slice, HeadGemms, Tensor]]:
        """(columns, their GEMMs, a buffer [n, ≥ v + 1]) of each slab."""
        for start in range(0, self.count, self.width):
            part = slice(start, min(start + self.width, self.count))
            weight = self.head.weight[part] if self.ids is None else self.head.weight[self.ids[part]]
            gemms = HeadGemms(weight, weight.numel() * self.head.dtype.itemsize)
            yield part, gemms, self.buffer[:, : leading_dimension(part.stop - part.start)]

    def kept(self, part: slice) -> tuple[Tensor, Tensor | None, int, int]:
        """Ids [n, K], logits of which some are ignored, the id of column 0, the number of columns: of a slab."""
        return self.ids_K, self.ignorable_K, self.first + part.start, part.stop - part.start

    def held(self, rows: slice) -> Tensor:
        """[c, K] bool: which kept ids of some rows this rank holds."""
        ignorable = None if self.ignorable_K is None else ~torch.isneginf(self.ignorable_K[rows])
        return columns_of(self.ids_K[rows], self.first, self.count, ignorable) != self.count

    def weight_rows(self, part: slice) -> slice | Tensor:
        """Weight rows of a slab."""
        return part if self.ids is None else self.ids[part]

    def project(self, gemms: HeadGemms, x: Tensor, part: slice, out: Tensor) -> None:
        """out[n, v] = logits of a slab."""
        bias = None if self.head.bias is None else self.head.bias[self.weight_rows(part)]
        self.head.project(gemms, x, bias, out)


def run_low(head: LinearHead, problem: Problem, outputs: Outputs) -> None:
    """Slabs of vocabulary for all rows at once: statistics, row mathematics, then the slabs again for gradients."""
    o, n, passes = problem.objective, len(problem.weights), head.passes
    if n == 0:
        return
    everything = slice(0, n)
    x = head.activations(everything)
    slabs = Slabs(head, problem, x)
    values_K = x.new_full(slabs.ids_K.shape, LOG_ZERO, dtype=head.dtype)  # logits first, gradients later
    label_logit = tail = None
    if problem.labels is not None and problem.wants_labels:
        label_logit = values_K.new_full((n,), LOG_ZERO)
    for part, gemms, chunk in slabs:
        v = part.stop - part.start
        slabs.project(gemms, x, part, chunk[:, :v])
        if problem.labels is not None and label_logit is not None:
            found = passes.pick(chunk, problem.labels, problem.vocab_start + part.start, v, o)
            label_logit = torch.maximum(label_logit, found)
        picked_K, columns_K = passes.pick_poison(chunk, *slabs.kept(part), o)
        torch.where(columns_K == v, values_K, picked_K, out=values_K)
        if o.needs_tail:
            found = passes.tail_stats(chunk[:, :v], o, raw=problem.wants_raw)
            tail = found if tail is None else _join(tail, found)
    if tail is None and o.needs_tail:  # a shard without a valid id
        tail = passes.tail_stats(values_K[:, :0], o, raw=problem.wants_raw)

    gradient, lse_tail = _finish_in_chunks(head, problem, outputs, slabs, values_K, tail, label_logit)
    if not any(head.needs):
        return
    grad_x = head.hidden_slot(everything).zero_() if head.needs.inputs else None
    if head.grad_weight is not None and slabs.ids is not None:
        head.grad_weight.zero_()
    head.accumulate = True
    for part, gemms, chunk in slabs:
        v = part.stop - part.start
        if o.dense_gradient and lse_tail is not None:
            slabs.project(gemms, x, part, chunk[:, :v])
            passes.exponents(chunk[:, :v], lse_tail, o)
        columns_K = passes.find_columns(chunk, *slabs.kept(part))
        dz = passes.write_dlogits(chunk, v, columns_K, lse_tail, lse_tail, gradient, o, head.gradient_dtype)
        if grad_x is not None:
            gemms.grad_hidden(dz, grad_x, accumulate=True)
        if head.grad_weight is not None:
            wide = gemms.weight.new_empty(gemms.weight.shape, dtype=head.dtype)
            gemms.grad_weight(dz, x, wide, accumulate=False)
            head.grad_weight[slabs.weight_rows(part)] = wide.to(head.grad_weight.dtype)
        if head.grad_bias is not None:
            head.grad_bias[slabs.weight_rows(part)] = dz.sum(0, dtype=head.dtype)
    if grad_x is not None:
        problem.shards.start_sum(grad_x).wait()
        head.store_hidden(everything, grad_x)


def _join(a: Tail, b: Tail) -> Tail:
    """The tail of two disjoint sets of columns."""

    def stack(x: Tensor | None, y: Tensor | None) -> Tensor | None:
        return None if x is None or y is None else torch.stack((x, y))

    lse, top = torch.stack((a.lse, b.lse)), torch.stack((a.max, b.max))
    return merge_tails(Tail(lse, top, stack(a.mean, b.mean), stack(a.lse_raw, b.lse_raw)))


def _finish_in_chunks(
    head: LinearHead,
    problem: Problem,
    outputs: Outputs,
    slabs: Slabs,
    values_K: Tensor,
    tail: Tail | None,
    label_logit: Tensor | None,
) -> tuple[RowGradient, Tensor | None]:
    """``finish_rows`` for all rows; a chunk at a time, because its temporaries are [c, K] each."""
    n, kept = values_K.shape
    dense: list[list[Tensor]] = [[], [], []]  # α, β, the tail's logsumexp
    row_bytes = kept * head.passes.kept_temporaries * values_K.element_size()
    for part in chunks(n, row_bytes, problem.chunk_bytes):
        gradient, lse_tail = head.passes.finish_rows(
            problem,
            outputs,
            part,
            problem.teacher_at(part),
            slabs.held(part) if problem.shards.parallel else None,
            values_K[part],
            None if tail is None else tail.rows(part),
            None if label_logit is None else label_logit[part],
        )
        values_K[part] = gradient.complete_K
        for column, value in zip(dense, (gradient.alpha, gradient.beta, lse_tail), strict=True):
            if value is not None:
                column.append(value)
    alpha, beta, lse_tail = (torch.cat(column) if column else None for column in dense)
    return RowGradient(alpha, beta, values_K), lse_tail

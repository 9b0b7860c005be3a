"""The fused linear head and top-K divergence: chunk loops over GEMMs and row kernels, behind one autograd node.

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
from torch.autograd.function import once_differentiable

from fastkd._kernels.gemm import HeadGemms
from fastkd._kernels.heads import GivenLogits, LinearHead
from fastkd._kernels.problem import Outputs, Problem
from fastkd._kernels.row_stats import exponents, gather_poison, pick, tail_stats, write_dlogits
from fastkd._kernels.rows import (
    LOG_ZERO,
    RowGradient,
    Tail,
    TopK,
    TopKLoss,
    chunks,
    columns_of,
    leading_dimension,
)
from fastkd._kernels.sparse_kl import row_math, student_rows, teacher_rows
from fastkd._kernels.vocab_parallel import merge_tails

# Row-sized temporaries of the row mathematics, in tensors of [c, K]: they count towards a chunk.
_KEPT_TEMPORARIES = 12


def finish_rows(
    problem: Problem,
    outputs: Outputs,
    part: slice,
    teacher: TopK,
    keep_K: Tensor | None,
    held_K: Tensor | None,
    picked_K: Tensor,
    tail: Tail | None,
    label_logit: Tensor | None,
) -> tuple[RowGradient, Tensor | None]:
    """∂loss/∂logits (weights and 1/T applied) and the tail's logsumexp, of a chunk whose logits were measured.

    ``picked_K`` are the raw logits at the kept ids, ``held_K`` says which of them are real here (None: all). Loss
    and statistics go to ``outputs``.
    """
    o, shards = problem.objective, problem.shards
    raw_K = picked_K if held_K is None else picked_K.masked_fill(~held_K, LOG_ZERO)
    z_K = raw_K if o.temperature == 1.0 else raw_K / o.temperature
    sides = teacher_rows(teacher, keep_K, o, z_K.dtype, problem.whole_vocabulary)
    lse_kept = z_K.logsumexp(1)
    top_logit = highest = None
    if o.stats and tail is not None:
        top_logit = z_K.gather(1, sides.log_p_K.argmax(1, keepdim=True)).squeeze(1)
        highest = torch.maximum(tail.max, z_K.amax(1))
    if tail is not None and tail.lse_raw is not None:
        tail = tail._replace(lse_raw=torch.logaddexp(tail.lse_raw, raw_K.logsumexp(1)))
    lse_kept, tail, top_logit, highest, label_logit = shards.merge(lse_kept, tail, top_logit, highest, label_logit)
    student = student_rows(z_K, tail, lse_kept)
    loss, gradient, entropy = row_math(student, sides, o, held_K if shards.parallel else None, shards.sum)

    # A row of weight 0 that could not be dropped without a device synchronisation may hold anything: where, not ×.
    weights = problem.weights[part]
    live = weights != 0
    results = {"per_token": loss, "teacher_mass": sides.mass, "entropy": entropy}
    if student.tail is not None:
        results["student_mass"] = torch.exp(student.lse_kept - student.lse)
        if label_logit is not None:
            normaliser = student.lse if student.tail.lse_raw is None else student.tail.lse_raw
            results["label_logprob"] = label_logit - normaliser
    for name, values in results.items():
        if values is not None:
            values = values.clamp(max=1.0) if name.endswith("mass") else values
            outputs.put(part, name, torch.where(live, values, 0.0))
    if top_logit is not None and highest is not None:
        outputs.put(part, "top1_agree", (top_logit >= highest) & live)
    outputs.loss += torch.where(live, loss.double() * weights.double(), 0.0).sum()

    scale = weights / o.temperature
    alpha, beta = (None if x is None else torch.where(live, x * scale, 0.0) for x in gradient[:2])
    complete_K = torch.where(live[:, None], gradient.complete_K * scale[:, None], 0.0)
    return RowGradient(alpha, beta, complete_K), None if student.tail is None else student.tail.lse


def run_fast(head: LinearHead | GivenLogits, problem: Problem, outputs: Outputs) -> None:
    """Chunks of rows over the whole shard; every logit is computed once."""
    o, columns = problem.objective, problem.columns
    leading, kept = leading_dimension(columns), problem.teacher.indices.shape[1]
    row_bytes = leading * head.bytes_per_logit + kept * _KEPT_TEMPORARIES * head.dtype.itemsize
    buffer = None
    for part in chunks(len(problem.weights), row_bytes, problem.chunk_bytes - head.scratch_bytes):
        c = part.stop - part.start
        if buffer is None:  # no later chunk is larger
            buffer = torch.empty((c, leading), dtype=head.dtype, device=problem.weights.device)
        chunk, logits = buffer[:c], buffer[:c, :columns]
        head.fill(part, logits)

        teacher = problem.teacher_at(part)
        keep_K = problem.kept(teacher)
        columns_K = columns_of(teacher.indices, problem.vocab_start, columns, keep_K)
        partial = keep_K is not None or problem.shards.parallel
        label_logit = None
        if problem.labels is not None and problem.wants_labels:
            label_columns = columns_of(problem.labels[part], problem.vocab_start, columns, None)
            label_logit = pick(chunk, label_columns, columns)
        picked_K = gather_poison(chunk, columns_K)
        tail = None
        if o.needs_tail:
            tail = tail_stats(
                logits, o.temperature, mean=o.needs_tail_mean, raw=problem.wants_raw, linear=o.linear_term
            )
        shift = tail.max if tail is not None else None  # of this shard: ``finish_rows`` merges its own copy
        gradient, lse_tail = finish_rows(
            problem,
            outputs,
            part,
            teacher,
            keep_K,
            columns_K != columns if partial else None,
            picked_K,
            tail,
            label_logit,
        )
        if head.needs_gradient:
            write_dlogits(logits, shift, lse_tail, gradient)
            chunk.scatter_(1, columns_K, gradient.complete_K)
            head.drain(part, logits)


# ---------------------------------------------------------------- low memory: slabs of vocabulary


class Slabs:
    """Ranges of the shard's columns, or of only those columns that some kept id needs.

    ``position_K`` [n, K] says where each kept id stands in the chosen columns (their number, where it does not).
    """

    def __init__(self, head: LinearHead, problem: Problem, everything: Tensor):
        teacher = problem.teacher_at(slice(0, len(problem.weights)))
        local_K = columns_of(teacher.indices, problem.vocab_start, problem.columns, problem.kept(teacher))
        self.head, self.ids, self.position_K, self.count = head, None, local_K, problem.columns
        if not problem.objective.needs_tail:
            used, self.position_K = torch.unique(local_K, return_inverse=True)
            self.ids = used[used < problem.columns]
            self.count = len(self.ids)
        n, d = everything.shape
        # A slab holds its logits for all rows, and its weight rows where they have to be copied or widened.
        copied = self.ids is not None or head.weight.dtype != head.dtype
        column_bytes = (n + d * (copied + head.need_weight)) * head.dtype.itemsize
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

    def weight_rows(self, part: slice) -> slice | Tensor:
        """Weight rows of a slab."""
        return part if self.ids is None else self.ids[part]


def run_low(head: LinearHead, problem: Problem, outputs: Outputs) -> None:
    """Slabs of vocabulary for all rows at once: statistics, row mathematics, then the slabs again for gradients."""
    o, n = problem.objective, len(problem.weights)
    if n == 0:
        return
    everything = slice(0, n)
    x = head.activations(everything)
    slabs = Slabs(head, problem, x)
    values_K = x.new_full(slabs.position_K.shape, LOG_ZERO, dtype=head.dtype)  # logits first, gradients later
    label_logit = label_columns = tail = None
    if problem.labels is not None and problem.wants_labels:
        label_columns = columns_of(problem.labels, problem.vocab_start, problem.columns, None)
        label_logit = values_K.new_full((n,), LOG_ZERO)
    for part, gemms, chunk in slabs:
        v = part.stop - part.start
        gemms.logits(x, chunk[:, :v])
        columns_K = columns_of(slabs.position_K, part.start, v, None)
        if label_columns is not None and label_logit is not None:
            label_logit = torch.maximum(label_logit, pick(chunk, columns_of(label_columns, part.start, v, None), v))
        values_K = torch.where(columns_K == v, values_K, gather_poison(chunk, columns_K))
        if o.needs_tail:
            found = tail_stats(chunk[:, :v], o.temperature, mean=o.needs_tail_mean, raw=problem.wants_raw)
            tail = found if tail is None else _join(tail, found)
    if tail is None and o.needs_tail:  # a shard without a valid id
        tail = tail_stats(values_K[:, :0], o.temperature, mean=o.needs_tail_mean, raw=problem.wants_raw)

    gradient, lse_tail = _finish_in_chunks(problem, outputs, slabs, values_K, tail, label_logit)
    if not head.needs_gradient:
        return
    grad_x = head.hidden_slot(everything).zero_() if head.need_hidden else None
    if head.grad_weight is not None and slabs.ids is not None:
        head.grad_weight.zero_()
    head.accumulate = True
    for part, gemms, chunk in slabs:
        v = part.stop - part.start
        logits = chunk[:, :v]
        if o.dense_gradient and lse_tail is not None:
            gemms.logits(x, logits)
            exponents(logits, o.temperature, lse_tail, o.linear_term)
        write_dlogits(logits, lse_tail, lse_tail, gradient)
        chunk.scatter_(1, columns_of(slabs.position_K, part.start, v, None), gradient.complete_K)
        dz = gemms.narrow(logits)
        if grad_x is not None:
            gemms.grad_hidden(dz, grad_x, accumulate=True)
        if head.grad_weight is not None:
            wide = gemms.weight.new_empty(gemms.weight.shape, dtype=head.dtype)
            gemms.grad_weight(dz, x, wide, accumulate=False)
            head.grad_weight[slabs.weight_rows(part)] = wide.to(head.grad_weight.dtype)
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
    for part in chunks(n, kept * _KEPT_TEMPORARIES * values_K.element_size(), problem.chunk_bytes):
        teacher = problem.teacher_at(part)
        gradient, lse_tail = finish_rows(
            problem,
            outputs,
            part,
            teacher,
            problem.kept(teacher),
            slabs.position_K[part] != slabs.count,
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


# ---------------------------------------------------------------- the autograd node


class TopKDivergence(torch.autograd.Function):
    """Σ weights · L with its gradient computed in forward; only the loss is differentiable."""

    @staticmethod
    def forward(ctx, inputs: Tensor, weight: Tensor | None, problem: Problem, with_gradient: bool):
        """``inputs`` hidden [N, D] with ``weight`` [Vl, D], or logits [N, Vl] with None."""
        need_inputs, need_weight = (with_gradient and need for need in ctx.needs_input_grad[:2])
        result, gradients = TopKDivergence.solve(inputs, weight, problem, need_inputs, need_weight)
        ctx.problem, ctx.gradients, ctx.needs = problem, gradients, (need_inputs, need_weight)
        ctx.save_for_backward(inputs, weight)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(field for field in result[1:] if field is not None))
        return tuple(result)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor | None, *_):
        """The stored gradients times ``grad_loss``; a second backward through the graph computes them again."""
        if grad_loss is None:
            return None, None, None, None
        # Saved tensors are read even when not needed: they report an input changed in place since forward.
        inputs, weight = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            _, gradients = TopKDivergence.solve(inputs, weight, ctx.problem, *ctx.needs)
        # On the CPU the usual factor 1 is seen for free and spares a pass over dW; elsewhere a look would wait.
        if grad_loss.device.type != "cpu" or grad_loss.item() != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(grad_loss)
        return *gradients, None, None

    @staticmethod
    def solve(inputs: Tensor, weight: Tensor | None, problem: Problem, need_inputs: bool, need_weight: bool):
        """(TopKLoss, (gradient of inputs, gradient of weight)). Autocast is off: it would compute in bfloat16."""
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            if weight is None:
                head = GivenLogits(inputs, problem, need_inputs)
            else:
                head = LinearHead(inputs, weight, problem, need_inputs, need_weight)
            outputs = Outputs(inputs.shape[0], problem, head.dtype, inputs.device)
            if problem.by_slabs and isinstance(head, LinearHead):
                run_low(head, problem, outputs)
            else:
                run_fast(head, problem, outputs)
            return outputs.result(), head.gradients()


def topk_divergence(inputs: Tensor, weight: Tensor | None, problem: Problem) -> TopKLoss:
    """Run a checked problem; see ``fastkd.kernels.topk_kl``."""
    values = TopKDivergence.apply(inputs, weight, problem, torch.is_grad_enabled())
    return TopKLoss(*values)

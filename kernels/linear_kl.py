"""The fused linear head and top-K divergence: the chunk loop over GEMMs and row passes, without autograd.

Per chunk of rows: Z = X Wᵀ, statistics of the poisoned logits, row mathematics on [c, K], dlogits in place, dX = dZ W,
dW += dZᵀ X. Three GEMM passes with the gradient computed in forward; two with a frozen head, one without gradients.
``linear_kl_low`` is the path that needs less memory and one pass more.

Letters: N tokens of the caller, c rows of a chunk, D hidden, V vocabulary rows of this shard, K kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd._kernels.heads import GivenLogits, Gradients, LinearHead, Needs
from fastkd._kernels.linear_kl_low import run_low
from fastkd._kernels.problem import Outputs, Problem
from fastkd._kernels.rows import TopKLoss, chunks, leading_dimension


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
    row_bytes = leading_dimension(problem.even_columns) * head.bytes_per_logit
    row_bytes += kept * passes.kept_temporaries * head.dtype.itemsize
    buffer = None
    parts = list(chunks(len(problem.weights), row_bytes, problem.chunk_bytes - head.scratch_bytes))
    head.start(len(parts) or 1)
    for part in parts:
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

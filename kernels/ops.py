"""The registered operators: what torch.compile, checkpoint policies and profilers see of the kernels.

    fastkd::topk_kl            loss, per-token fields and gradients in one call
    fastkd::vocab_topk         the teacher's head
    fastkd::scale_gradients_   what is left for backward

``topk_kl`` computes its gradients in forward and returns them beside the loss; backward hands them on, times the
incoming factor. Each has a fake kernel, so that a compiler knows its shapes without running it, and is opaque
otherwise. A field that was not asked for is an empty tensor here (a schema has no optional results);
``fastkd.kernels`` turns those into None.

Letters: N tokens, n tokens that count, D hidden, Vl vocabulary rows of this shard, K kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd._kernels.heads import Needs
from fastkd._kernels.linear_kl import solve
from fastkd._kernels.linear_topk import linear_topk
from fastkd._kernels.problem import Problem, field_names, new_field
from fastkd._kernels.rows import Objective, TopK, TopKLoss, compute_dtype, on_host
from fastkd._kernels.tuning import on_device, use_triton
from fastkd._kernels.values import check_active, check_rows, drop_zeros, warn_about_logsumexp
from fastkd._kernels.vocab_parallel import Shards

FIELDS = TopKLoss._fields[1:]


@torch.library.custom_op("fastkd::topk_kl", mutates_args=())
def topk_kl(
    inputs: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    indices: Tensor,
    logits: Tensor,
    logsumexp: Tensor | None,
    tail_logsumexp: Tensor | None,
    token_weights: Tensor | None,
    active: Tensor | None,
    labels: Tensor | None,
    kl: str,
    outside: str,
    mixed_weight: float,
    jsd_beta: float,
    temperature: float,
    stats: bool,
    softcap: float | None,
    valid: int,
    columns: int,
    vocab_start: int,
    group: str | None,
    sequence_parallel: bool,
    low: bool,
    chunk_bytes: int,
    validate: bool,
    need_inputs: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, the six fields of ``TopKLoss``, gradients of inputs, weight and bias); empty where absent.

    Arguments as of ``fastkd.kernels.topk_kl``, checked for shapes and dtypes; ``valid`` and ``columns`` are the valid
    ids of all ranks and of this one, ``group`` the name of the process group.
    """
    shards = Shards(group)
    problem = _problem(
        TopK(indices, logits, logsumexp, tail_logsumexp),
        inputs.shape[0] * (shards.size if sequence_parallel else 1),
        token_weights,
        active,
        labels,
        Objective(kl, outside, mixed_weight, jsd_beta, temperature, stats, softcap),
        valid=valid,
        columns=columns,
        vocab_start=vocab_start,
        chunk_bytes=chunk_bytes,
        low=low,
        sequence_parallel=sequence_parallel,
        shards=shards,
        validate=validate,
        device=inputs.device,
        dtype=compute_dtype(inputs.dtype),
    )
    with on_device(inputs.device):
        result, gradients = solve(inputs, weight, bias, problem, Needs(need_inputs, need_weight, need_bias))
    return tuple(inputs.new_empty(0) if value is None else value for value in (*result, *gradients))  # type: ignore


@topk_kl.register_fake
def _(
    inputs, weight, bias, indices, logits, logsumexp, tail_logsumexp, token_weights, active, labels, kl, outside,
    mixed_weight, jsd_beta, temperature, stats, softcap, valid, columns, vocab_start, group, sequence_parallel, low,
    chunk_bytes, validate, need_inputs, need_weight, need_bias,
):  # fmt: skip
    tokens = inputs.shape[0] * (Shards(group).size if sequence_parallel else 1)
    objective = Objective(kl, outside, mixed_weight, jsd_beta, temperature, stats, softcap)
    knows_mass = indices.shape[1] == valid or logsumexp is not None or tail_logsumexp is not None
    names = field_names(objective, knows_mass, labels is not None)
    dtype = compute_dtype(inputs.dtype)

    def field(name):
        return new_field(name, tokens, dtype, inputs.device) if name in names else inputs.new_empty(0)

    def gradient(of, needed):
        return of.new_empty(of.shape) if needed else inputs.new_empty(0)

    return (
        inputs.new_empty((), dtype=dtype),
        *(field(name) for name in FIELDS),
        gradient(inputs, need_inputs),
        gradient(weight, need_weight),
        gradient(bias, need_bias),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    # Not saved as outputs: backward multiplies them in place, and hands them on without a copy.
    ctx.gradients = output[-3:]
    ctx.arguments = inputs[3:]
    ctx.save_for_backward(*inputs[:3])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple:
    """The gradients of forward times ``grad_loss``; a second backward through the graph computes them again."""
    nothing = (None,) * len(ctx.arguments)
    if grad_loss is None:
        return None, None, None, *nothing
    # Saved tensors are read even when not needed: they report an input changed in place since forward.
    saved = ctx.saved_tensors
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None:
        gradients = torch.ops.fastkd.topk_kl(*(None if x is None else x.detach() for x in saved), *ctx.arguments)[-3:]
    needs = ctx.arguments[-3:]
    if type(grad_loss) is Tensor:
        wanted = [gradient for gradient, need in zip(gradients, needs, strict=True) if need]
        torch.ops.fastkd.scale_gradients_(wanted, grad_loss)
    else:  # traced by a compiler, which decides itself where the product is put
        gradients = [gradient * grad_loss if need else None for gradient, need in zip(gradients, needs, strict=True)]
    return *(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)), *nothing


topk_kl.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("fastkd::scale_gradients_", mutates_args={"gradients"})
def scale_gradients_(gradients: list[Tensor], factor: Tensor) -> None:
    """gradients *= factor, in place. The usual factor 1 costs nothing: a pass over dW is a hundredth of a step."""
    if on_host(factor.device):
        if factor.item() == 1.0:
            return
    elif use_triton(factor.device, torch.float32):
        from fastkd._kernels.triton_stats import scale_unless_one

        with on_device(factor.device):
            for gradient in gradients:
                scale_unless_one(gradient, factor)
        return
    for gradient in gradients:
        gradient.mul_(factor)


@scale_gradients_.register_fake
def _(gradients, factor):
    return None


# ---------------------------------------------------------------- the teacher's head


@torch.library.custom_op("fastkd::vocab_topk", mutates_args=())
def vocab_topk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    temperature: float,
    softcap: float | None,
    columns: int,
    vocab_start: int,
    group: str | None,
    sequence_parallel: bool,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(indices, logits, logsumexp, tail_logsumexp); arguments as of ``fastkd.kernels.vocab_topk``, checked."""
    shards = Shards(group)
    if sequence_parallel:
        hidden = shards.gather_blocks(hidden)
    with on_device(hidden.device):
        result = linear_topk(
            hidden,
            weight,
            bias,
            k,
            temperature=temperature,
            softcap=softcap,
            columns=columns,
            vocab_start=vocab_start,
            chunk_bytes=chunk_bytes,
            shards=shards,
        )
    assert result.logsumexp is not None and result.tail_logsumexp is not None
    return result.indices, result.logits, result.logsumexp, result.tail_logsumexp


@vocab_topk.register_fake
def _(hidden, weight, bias, k, temperature, softcap, columns, vocab_start, group, sequence_parallel, chunk_bytes):
    n = hidden.shape[0] * (Shards(group).size if sequence_parallel else 1)
    dtype = compute_dtype(weight.dtype)
    return (
        hidden.new_empty((n, k), dtype=torch.int32),
        hidden.new_empty((n, k), dtype=dtype),
        hidden.new_empty((n,), dtype=dtype),
        hidden.new_empty((n,), dtype=dtype),
    )


# ---------------------------------------------------------------- from tensors to a problem


def _problem(
    teacher: TopK,
    tokens: int,
    token_weights: Tensor | None,
    active: Tensor | None,
    labels: Tensor | None,
    objective: Objective,
    *,
    valid: int,
    validate: bool,
    device: torch.device,
    dtype: torch.dtype,
    **rest: Any,
) -> Problem:
    """Select the rows that count, check values where that was asked for, drop weight 0 where it is seen for free."""
    rows = None
    if active is not None:
        if validate or on_host(active.device):
            check_active(active, tokens)
        rows = active.to(device, non_blocking=True)
    count = tokens if rows is None else len(rows)
    kept = teacher.indices.shape[1]
    if objective.outside == "bucket" and teacher.tail_logsumexp is None and kept < valid:
        warn_about_logsumexp()

    def of_rows(values: Tensor) -> Tensor:
        return values if rows is None or len(values) == count else values.index_select(0, rows)

    by_token = len(teacher.indices) == tokens
    weights = torch.ones(count, dtype=dtype, device=device)
    if token_weights is not None:
        weights = of_rows(token_weights.detach()).to(dtype)
    labels = None if labels is None else of_rows(labels)
    if on_host(device):
        rows, teacher, by_token, weights, labels = drop_zeros(rows, teacher, by_token, weights, labels)
    may_ignore = True
    if validate:
        may_ignore = check_rows(teacher, rows if by_token else None, labels, valid)
    return Problem(
        teacher=teacher,
        teacher_by_token=by_token,
        rows=rows,
        weights=weights,
        labels=labels,
        objective=objective,
        valid=valid,
        may_ignore=may_ignore,
        **rest,
    )

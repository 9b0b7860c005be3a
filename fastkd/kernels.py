"""The public kernel API: fused linear head + top-K divergence, and the exact top-K of a teacher's head.

    from fastkd.kernels import topk_kl, vocab_topk

    teacher = vocab_topk(teacher_hidden, teacher_head, k=512)
    out = topk_kl(student_hidden, student_head, teacher, kl="reverse", outside="bucket", token_weights=weights)
    out.loss.backward()

Neither call ever holds [N, V] logits. Importing this module needs torch and nothing else. Wrong arguments raise
ValueError naming the argument, its value and the fix. Call the functions outside activation-checkpointed regions
(gradients are computed in forward; a recomputed call would do everything twice); autocast is switched off inside.

Letters: N tokens, D hidden, Vl vocabulary rows of this rank's shard, V vocabulary (over all ranks), K kept, T
temperature, n tokens that count.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastkd._kernels.linear_kl import topk_divergence
from fastkd._kernels.linear_topk import linear_topk
from fastkd._kernels.problem import Problem
from fastkd._kernels.rows import Objective, TopK, TopKLoss, compute_dtype, default_chunk_bytes
from fastkd._kernels.vocab_parallel import Shards

__all__ = ["TopK", "TopKLoss", "topk_kl", "topk_kl_from_logits", "vocab_topk"]

KLS = ("forward", "reverse", "mixed", "jsd")
OUTSIDES = ("renormalize", "zero", "bucket", "drop")
_FLOATS = (torch.float32, torch.bfloat16, torch.float64)
_warned_about_logsumexp = False


def vocab_topk(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    valid_vocab: int | None = None,
    vocab_start: int = 0,
    group: Any = None,
    chunk_bytes: int | None = None,
) -> TopK:
    """The K largest logits of every row of hidden · weightᵀ, exactly; of equal logits the lower id is kept.

    Args:
        hidden: [N, D] float32, bfloat16 or float64.
        weight: [Vl, D], same dtype: the head's rows ``vocab_start`` … ``vocab_start + Vl``.
        k: entries to keep, 1 … V.
        temperature: T of the logsumexps; the logits returned are raw.
        valid_vocab: ids ≥ this are padding and take part in nothing. Default: all.
        group: process group whose ranks hold the other shards; ``hidden`` is the same on all of them, and so is the
            result.
        chunk_bytes: memory for logits. Default: 160 MiB on the CPU, 1 GiB elsewhere.

    Returns:
        TopK with [N, K] int32 ids and float32 logits (float64 for float64 inputs), and both logsumexps. No gradient.

    Raises:
        ValueError: an argument is wrong, or a row holds NaN.
    """
    _check_head(hidden, weight)
    shards, columns, valid = _vocabulary(weight.shape[0], valid_vocab, vocab_start, group)
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= valid:
        raise ValueError(f"k={k!r}: must be an integer from 1 to the vocabulary size {valid}; lower k")
    _check_positive("temperature", temperature)
    return linear_topk(
        hidden,
        weight,
        k,
        temperature=float(temperature),
        columns=columns,
        vocab_start=vocab_start,
        chunk_bytes=_chunk_bytes(chunk_bytes, hidden.device),
        shards=shards,
    )


def topk_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher: TopK,
    *,
    kl: str = "forward",
    mixed_weight: float = 0.5,
    jsd_beta: float = 0.5,
    outside: str = "bucket",
    temperature: float = 1.0,
    token_weights: Tensor | None = None,
    active: Tensor | None = None,
    labels: Tensor | None = None,
    stats: bool = True,
    valid_vocab: int | None = None,
    vocab_start: int = 0,
    group: Any = None,
    memory: str = "fast",
    chunk_bytes: int | None = None,
    validate: bool | None = None,
) -> TopKLoss:
    """Σ_n token_weights[n] · D(teacher_n, softmax(hidden_n · weightᵀ / T)) without the [N, V] logits.

    With p the teacher's probabilities, q the student's, S the kept ids, P and Q the masses on S, and a tilde for
    "renormalised on S", the divergence of one token is

    * ``kl``: "forward" KL(p‖q), "reverse" KL(q‖p), "mixed" = mixed_weight · forward + (1 − mixed_weight) · reverse,
      "jsd" = jsd_beta · KL(p‖m) + (1 − jsd_beta) · KL(q‖m) with m = jsd_beta · p + (1 − jsd_beta) · q;
    * ``outside``, what becomes of probability outside S: "renormalize" (p̃ against q̃: no gradient outside S), "zero"
      (p̃ against q over the whole vocabulary; reverse takes log p = −100 outside), "bucket" (one more cell, 1 − P
      against 1 − Q: a true KL over K + 1 cells and the recommended choice), "drop" (terms outside are left out).

    Args:
        hidden: [N, D] float32, bfloat16 or float64 (float64 is computed in float64, all else in float32).
        weight: [Vl, D], same dtype: the head's rows ``vocab_start`` … ``vocab_start + Vl``.
        teacher: what :func:`vocab_topk` returned, [N, K]; or one row per entry of ``active``. Its logsumexps are at
            this T.
        temperature: T > 0, of both sides. The loss is not multiplied by T².
        token_weights: [N] float (or one per entry of ``active``). Tokens of weight 0 are dropped; default 1 each.
            Divide by the number of tokens here: the loss is a sum.
        active: int64 ids of the tokens that count, ascending; the others are dropped without a device
            synchronisation. Default: all. ``token_weights`` 0 drops them too, before the GEMMs on the CPU.
        labels: [N] int64 (or one per entry of ``active``) for ``label_logprob``.
        stats: False leaves out the fields that need an extra pass over the vocabulary (None).
        valid_vocab: ids ≥ this are padding and take part in nothing. Default: all.
        group: process group whose ranks hold the other shards of ``weight``. All else is the same on all of them;
            so are the result and the gradient of ``hidden`` (summed over the ranks).
        memory: "fast" three GEMM passes; "low" four, without a float32 copy of the weight's gradient.
        chunk_bytes: memory for logits and scratch. Default: 160 MiB on the CPU, 1 GiB elsewhere.
        validate: check the values of ``teacher``, ``active`` and ``labels``. Default: only on the CPU, because it
            waits for the device.

    Returns:
        TopKLoss. ``loss`` is differentiable once, in ``hidden`` and ``weight``; the rest is detached.

    Raises:
        ValueError: an argument is wrong.
    """
    _check_head(hidden, weight)
    problem = _problem(
        hidden, weight.shape[0], teacher, kl=kl, mixed_weight=mixed_weight, jsd_beta=jsd_beta, outside=outside,
        temperature=temperature, token_weights=token_weights, active=active, labels=labels, stats=stats,
        valid_vocab=valid_vocab, vocab_start=vocab_start, group=group, memory=memory, chunk_bytes=chunk_bytes,
        validate=validate,
    )  # fmt: skip
    return topk_divergence(hidden, weight, problem)


def topk_kl_from_logits(
    logits: Tensor,
    teacher: TopK,
    *,
    kl: str = "forward",
    mixed_weight: float = 0.5,
    jsd_beta: float = 0.5,
    outside: str = "bucket",
    temperature: float = 1.0,
    token_weights: Tensor | None = None,
    active: Tensor | None = None,
    labels: Tensor | None = None,
    stats: bool = True,
    valid_vocab: int | None = None,
    vocab_start: int = 0,
    group: Any = None,
    memory: str = "fast",
    chunk_bytes: int | None = None,
    validate: bool | None = None,
) -> TopKLoss:
    """:func:`topk_kl` for callers that already hold raw logits [N, Vl]; differentiable in them.

    The logits are copied a chunk at a time and stay unchanged; −inf marks ids that are masked out. Their gradient
    has their dtype: prefer float32 logits, bfloat16 ones have lost what a student near its teacher differs in.
    ``memory`` has no effect here.

    Raises:
        ValueError: an argument is wrong.
    """
    _check_matrix("logits", logits)
    problem = _problem(
        logits, logits.shape[1], teacher, kl=kl, mixed_weight=mixed_weight, jsd_beta=jsd_beta, outside=outside,
        temperature=temperature, token_weights=token_weights, active=active, labels=labels, stats=stats,
        valid_vocab=valid_vocab, vocab_start=vocab_start, group=group, memory=memory, chunk_bytes=chunk_bytes,
        validate=validate,
    )  # fmt: skip
    return topk_divergence(logits, None, problem)


# ---------------------------------------------------------------- from arguments to a checked problem


def _problem(
    inputs: Tensor, shard_rows: int, teacher: TopK, *, kl: str, mixed_weight: float, jsd_beta: float, outside: str,
    temperature: float, token_weights: Tensor | None, active: Tensor | None, labels: Tensor | None, stats: bool,
    valid_vocab: int | None, vocab_start: int, group: Any, memory: str, chunk_bytes: int | None, validate: bool | None,
) -> Problem:  # fmt: skip
    device, tokens = inputs.device, inputs.shape[0]
    objective = _objective(kl, mixed_weight, jsd_beta, outside, temperature, stats)
    if memory not in ("fast", "low"):
        raise ValueError(f"memory={memory!r}: must be 'fast' or 'low'")
    shards, columns, valid = _vocabulary(shard_rows, valid_vocab, vocab_start, group)
    check_values = device.type == "cpu" if validate is None else validate

    rows = _active(active, tokens, device, check_values)
    count = tokens if rows is None else len(rows)
    by_token = _check_teacher(teacher, objective, tokens, count, device, valid)
    if token_weights is None:
        weights = torch.ones(count, dtype=torch.float32, device=device)
    else:
        weights = _per_token("token_weights", token_weights, rows, tokens, device).detach()
        if not weights.is_floating_point():
            raise ValueError(f"token_weights has dtype {weights.dtype}: must be a float dtype; call .float() on it")
    weights = weights.to(compute_dtype(inputs.dtype))
    labels = None if labels is None else _per_token("labels", labels, rows, tokens, device)
    if labels is not None and labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels has dtype {labels.dtype}: must be int64 vocabulary ids")

    if device.type == "cpu":  # looking at values is free here, so weight 0 drops a token before any GEMM
        rows, teacher, by_token, weights, labels = _drop_zeros(rows, teacher, by_token, weights, labels)
    may_ignore = True
    if check_values:
        may_ignore = _check_values(teacher, rows if by_token else None, labels, valid)
    return Problem(
        teacher=teacher,
        teacher_by_token=by_token,
        rows=rows,
        weights=weights,
        labels=labels,
        objective=objective,
        vocab_start=vocab_start,
        columns=columns,
        whole_vocabulary=teacher.indices.shape[1] == valid,
        may_ignore=may_ignore,
        chunk_bytes=_chunk_bytes(chunk_bytes, device),
        low=memory == "low",
        shards=shards,
    )


def _objective(
    kl: str, mixed_weight: float, jsd_beta: float, outside: str, temperature: float, stats: bool
) -> Objective:
    if kl not in KLS:
        raise ValueError(f"kl={kl!r}: must be one of {', '.join(KLS)}")
    if outside not in OUTSIDES:
        raise ValueError(f"outside={outside!r}: must be one of {', '.join(OUTSIDES)}")
    if kl == "jsd" and outside in ("zero", "drop"):
        raise ValueError(f"outside={outside!r} with kl='jsd': not a divergence; use 'bucket' or 'renormalize'")
    if not 0.0 <= mixed_weight <= 1.0:
        raise ValueError(f"mixed_weight={mixed_weight!r}: the share of the forward term, must be from 0 to 1")
    if not 0.0 < jsd_beta < 1.0:
        raise ValueError(f"jsd_beta={jsd_beta!r}: must be above 0 and below 1; the ends are kl='forward', 'reverse'")
    _check_positive("temperature", temperature)
    return Objective(kl, outside, float(mixed_weight), float(jsd_beta), float(temperature), bool(stats))


def _check_positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name}={value!r}: must be positive and finite")


def _chunk_bytes(chunk_bytes: int | None, device: torch.device) -> int:
    if chunk_bytes is not None and chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes={chunk_bytes!r}: must be positive; leave it out for the default")
    return default_chunk_bytes(device, chunk_bytes)


def _check_matrix(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor) or value.dim() != 2:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} is {shape}: must be a 2-dimensional tensor; flatten batch and sequence first")
    if value.dtype not in _FLOATS:
        raise ValueError(f"{name} has dtype {value.dtype}: must be float32, bfloat16 or float64; cast it")


def _check_head(hidden: Tensor, weight: Tensor) -> None:
    _check_matrix("hidden", hidden)
    _check_matrix("weight", weight)
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"weight is {tuple(weight.shape)} but hidden is {tuple(hidden.shape)}: both must end in the hidden size; "
            "pass the head's weight as [vocabulary, hidden]"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(f"weight has dtype {weight.dtype} but hidden has {hidden.dtype}: cast one to the other")
    if hidden.device != weight.device:
        raise ValueError(f"weight is on {weight.device} but hidden is on {hidden.device}: move one to the other")


def _vocabulary(shard_rows: int, valid_vocab: int | None, vocab_start: int, group: Any) -> tuple[Shards, int, int]:
    """The ranks, the valid ids held here, and the valid ids over all ranks."""
    if vocab_start < 0:
        raise ValueError(f"vocab_start={vocab_start!r}: must be the first id of this shard, 0 or more")
    if group is None:
        if vocab_start:
            raise ValueError(f"vocab_start={vocab_start!r}: needs group, the ranks that hold the other ids")
        total = shard_rows
    else:
        if not dist.is_initialized():
            raise ValueError("group is given but torch.distributed is not initialised; call init_process_group first")
        total = 0
    shards = Shards(group)
    if group is not None:
        total = shards.vocabulary(vocab_start, shard_rows) if valid_vocab is None else valid_vocab
    if valid_vocab is not None and (valid_vocab < 1 or (group is None and valid_vocab > shard_rows)):
        raise ValueError(f"valid_vocab={valid_vocab!r}: must be from 1 to the vocabulary size {shard_rows}")
    valid = total if valid_vocab is None else valid_vocab
    return shards, min(max(valid - vocab_start, 0), shard_rows), valid


def _active(active: Tensor | None, tokens: int, device: torch.device, check_values: bool) -> Tensor | None:
    if active is None:
        return None
    if not isinstance(active, Tensor) or active.dim() != 1 or active.dtype != torch.int64:
        found = f"{tuple(active.shape)} {active.dtype}" if isinstance(active, Tensor) else type(active).__name__
        raise ValueError(f"active is {found}: must be a 1-dimensional int64 tensor of token ids (not a mask)")
    if len(active) and (check_values or active.device.type == "cpu"):
        first, last = int(active[0]), int(active[-1])
        if first < 0 or last >= tokens or bool((active[1:] <= active[:-1]).any()):
            raise ValueError(f"active runs from {first} to {last}: must ascend without repeats within 0 … {tokens - 1}")
    return active.to(device, non_blocking=True)


def _per_token(name: str, value: Tensor, rows: Tensor | None, tokens: int, device: torch.device) -> Tensor:
    """[n] values of the tokens that count, from [N] or [n] ones."""
    count = tokens if rows is None else len(rows)
    if not isinstance(value, Tensor) or value.dim() != 1 or len(value) not in (tokens, count):
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} is {shape}: must be a tensor with one entry per token, ({tokens},)")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}: must be on {device} like the logits; move it")
    return value if rows is None or len(value) == count else value.index_select(0, rows)


def _check_teacher(
    teacher: TopK, objective: Objective, tokens: int, count: int, device: torch.device, valid: int
) -> bool:
    """Shapes, dtypes, devices; True when there is one teacher row per token, not one per active token."""
    if not isinstance(teacher, tuple) or len(teacher) != 4:
        raise ValueError(f"teacher is {type(teacher).__name__}: must be a fastkd.kernels.TopK")
    indices, logits = teacher.indices, teacher.logits
    if indices.dim() != 2 or indices.shape != logits.shape or indices.shape[0] not in (tokens, count):
        raise ValueError(
            f"teacher.indices is {tuple(indices.shape)} and teacher.logits {tuple(logits.shape)}: both must be "
            f"[tokens, K] with {tokens} tokens" + (f" (or {count} active ones)" if count != tokens else "")
        )
    kept = indices.shape[1]
    if not 1 <= kept <= valid:
        raise ValueError(f"teacher.indices keeps K={kept} ids: must be from 1 to the vocabulary size {valid}; lower K")
    if indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"teacher.indices has dtype {indices.dtype}: must be int32")
    if not logits.is_floating_point():
        raise ValueError(f"teacher.logits has dtype {logits.dtype}: must be float32 or bfloat16")
    for name, field in zip(TopK._fields, teacher, strict=True):
        if field is None:
            continue
        if field.device != device:
            raise ValueError(f"teacher.{name} is on {field.device}: must be on {device} like the student; move it")
        if name.endswith("logsumexp") and field.shape != (indices.shape[0],):
            raise ValueError(f"teacher.{name} is {tuple(field.shape)}: must be ({indices.shape[0]},)")
    missing = teacher.logsumexp is None and teacher.tail_logsumexp is None and kept < valid
    if missing and objective.outside in ("bucket", "drop"):
        raise ValueError(
            f"outside={objective.outside!r} needs the teacher's probabilities outside the kept ids: give "
            "teacher.tail_logsumexp (vocab_topk does) or teacher.logsumexp, or use outside='renormalize' or 'zero'"
        )
    if objective.outside == "bucket" and teacher.tail_logsumexp is None and kept < valid:
        _warn_about_logsumexp()
    return indices.shape[0] == tokens


def _warn_about_logsumexp() -> None:
    global _warned_about_logsumexp
    if not _warned_about_logsumexp:
        _warned_about_logsumexp = True
        warnings.warn(
            "teacher.tail_logsumexp is missing: the mass outside the kept ids is taken from a difference, which "
            "float32 cannot resolve below about 1e-6 and which is clamped there. Ship tail_logsumexp if you can.",
            stacklevel=5,
        )


def _drop_zeros(
    rows: Tensor | None, teacher: TopK, by_token: bool, weights: Tensor, labels: Tensor | None
) -> tuple[Tensor | None, TopK, bool, Tensor, Tensor | None]:
    """Leave out tokens of weight 0."""
    live = weights != 0
    if bool(live.all()):
        return rows, teacher, by_token, weights, labels
    places = live.nonzero().squeeze(1)
    if not by_token:  # the teacher's rows follow ``rows``, which gets shorter
        teacher = teacher.map(lambda field: field.index_select(0, places))
    rows = places if rows is None else rows.index_select(0, places)
    return rows, teacher, by_token, weights[places], None if labels is None else labels[places]


def _check_values(teacher: TopK, rows: Tensor | None, labels: Tensor | None, valid: int) -> bool:
    """Check ids and logits of the rows that count; True when some logit is −inf."""
    indices, logits = teacher.indices, teacher.logits
    if rows is not None:
        indices, logits = indices.index_select(0, rows), logits.index_select(0, rows)
    if labels is not None and len(labels):
        low, high = (int(x) for x in labels.aminmax())
        if low < 0 or high >= valid:
            raise ValueError(
                f"labels hold {low if low < 0 else high}: must be ids from 0 to {valid - 1}; give tokens without a "
                "label weight 0"
            )
    if indices.numel() == 0:
        return False
    low, high = (int(x) for x in indices.aminmax())
    if low < 0 or high >= valid:
        raise ValueError(f"teacher.indices hold {low if low < 0 else high}: must be from 0 to {valid - 1}")
    ascending = indices[:, 1:] > indices[:, :-1]
    finite = torch.isfinite(logits)
    if bool(finite.all()):
        if not bool(ascending.all()):
            raise ValueError(_ORDER.format(int((~ascending).any(1).nonzero()[0])))
        return False
    wrong = ~finite & ~torch.isneginf(logits)
    if bool(wrong.any()):
        row = int(wrong.any(1).nonzero()[0])
        raise ValueError(f"teacher.logits row {row} holds NaN or +inf: only finite values and −inf (ignored) are legal")
    empty = ~finite.any(1)
    if bool(empty.any()):
        row = int(empty.nonzero()[0])
        raise ValueError(f"teacher.logits row {row} has no finite entry: give that token weight 0")
    # The largest finite id so far, before each entry; a finite entry must exceed it.
    seen = torch.where(finite, indices.long(), -1).cummax(1).values
    wrong = finite[:, 1:] & (indices[:, 1:] <= seen[:, :-1])
    if bool(wrong.any()):
        raise ValueError(_ORDER.format(int(wrong.any(1).nonzero()[0])))
    return True


_ORDER = (
    "teacher.indices row {} does not ascend strictly: ids must be unique and sorted; sort each row by id (and logits "
    "with it), and merge duplicates"
)

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

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastkd._kernels import ops
from fastkd._kernels.problem import field_names
from fastkd._kernels.rows import Objective, TopK, TopKLoss, default_chunk_bytes, on_host
from fastkd._kernels.vocab_parallel import last_id

__all__ = ["TopK", "TopKLoss", "topk_kl", "topk_kl_from_logits", "vocab_topk"]

KLS = ("forward", "reverse", "mixed", "jsd")
OUTSIDES = ("renormalize", "zero", "bucket", "drop")
_FLOATS = (torch.float32, torch.bfloat16, torch.float64)


def vocab_topk(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    valid_vocab: int | None = None,
    vocab_start: int = 0,
    group: Any = None,
    sequence_parallel: bool = False,
    chunk_bytes: int | None = None,
) -> TopK:
    """The K largest logits of every row of hidden · weightᵀ, exactly; of equal logits the lower id is kept.

    Args:
        hidden: [N, D] float32, bfloat16 or float64.
        weight: [Vl, D], same dtype: the head's rows ``vocab_start`` … ``vocab_start + Vl``.
        k: entries to keep, 1 … V.
        temperature: T of the logsumexps; the logits returned are raw.
        bias: [Vl], same dtype: added to the logits.
        softcap: c of logit → c · tanh(logit / c), after the bias (Gemma 2, "final_logit_softcapping"). Where it makes
            logits equal, the uncapped ones decide.
        valid_vocab: ids ≥ this are padding and take part in nothing. Default: all.
        group: process group whose ranks hold the other shards; ``hidden`` is the same on all of them, and so is the
            result.
        sequence_parallel: ``hidden`` [N / R, D] is this rank's block of the rows instead (R equal blocks, in rank
            order); the result has all N rows.
        chunk_bytes: memory for logits. Default: 160 MiB on the CPU, 1 GiB elsewhere.

    Returns:
        TopK with [N, K] int32 ids and float32 logits (float64 for float64 inputs), and both logsumexps. No gradient.

    Raises:
        ValueError: an argument is wrong, or a row holds NaN.
    """
    _check_head(hidden, weight, bias, softcap)
    name, columns, valid = _vocabulary(weight.shape[0], valid_vocab, vocab_start, group)
    _check_sequence_parallel(sequence_parallel, group)
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= valid:
        raise ValueError(f"k={k!r}: must be an integer from 1 to the vocabulary size {valid}; lower k")
    _check_positive("temperature", temperature)
    return TopK(
        *ops.vocab_topk(
            hidden.detach(), weight.detach(), None if bias is None else bias.detach(), k, float(temperature),
            None if softcap is None else float(softcap), columns, vocab_start, name, sequence_parallel,
            _chunk_bytes(chunk_bytes, hidden.device),
        )
    )  # fmt: skip


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
    bias: Tensor | None = None,
    softcap: float | None = None,
    valid_vocab: int | None = None,
    vocab_start: int = 0,
    group: Any = None,
    sequence_parallel: bool = False,
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
        bias: [Vl], same dtype as ``weight``: added to the logits.
        softcap: c of logit → c · tanh(logit / c), after the bias (Gemma 2, "final_logit_softcapping").
        valid_vocab: ids ≥ this are padding and take part in nothing. Default: all.
        group: process group whose ranks hold the other shards of ``weight``. All else is the same on all of them;
            so are the result and the gradient of ``hidden`` (summed over the ranks).
        sequence_parallel: ``hidden`` [N / R, D] is this rank's block of the rows instead (R equal blocks, in rank
            order), and so is its gradient. All else is for all N rows.
        memory: "fast" three GEMM passes; "low" four, without a float32 copy of the weight's gradient.
        chunk_bytes: memory for logits and scratch (of an even share of the vocabulary, with a group). Default: 160 MiB
            on the CPU; elsewhere 1 GiB, and 200 MiB for "low".
        validate: check the values of ``teacher``, ``active`` and ``labels``. Default: only on the CPU, because it
            waits for the device.

    Returns:
        TopKLoss. ``loss`` is differentiable once, in ``hidden``, ``weight`` and ``bias``; the rest is detached.

    Raises:
        ValueError: an argument is wrong.
    """
    _check_head(hidden, weight, bias, softcap)
    _check_sequence_parallel(sequence_parallel, group)
    return _divergence(
        hidden, weight, bias, weight.shape[0], teacher, kl=kl, mixed_weight=mixed_weight, jsd_beta=jsd_beta,
        outside=outside, temperature=temperature, token_weights=token_weights, active=active, labels=labels,
        stats=stats, softcap=softcap, valid_vocab=valid_vocab, vocab_start=vocab_start, group=group,
        sequence_parallel=sequence_parallel, memory=memory, chunk_bytes=chunk_bytes, validate=validate,
    )  # fmt: skip


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
    return _divergence(
        logits, None, None, logits.shape[1], teacher, kl=kl, mixed_weight=mixed_weight, jsd_beta=jsd_beta,
        outside=outside, temperature=temperature, token_weights=token_weights, active=active, labels=labels,
        stats=stats, softcap=None, valid_vocab=valid_vocab, vocab_start=vocab_start, group=group,
        sequence_parallel=False, memory=memory, chunk_bytes=chunk_bytes, validate=validate,
    )  # fmt: skip


# ---------------------------------------------------------------- from checked arguments to the operator


def _divergence(
    inputs: Tensor, weight: Tensor | None, bias: Tensor | None, shard_rows: int, teacher: TopK, *, kl: str,
    mixed_weight: float, jsd_beta: float, outside: str, temperature: float, token_weights: Tensor | None,
    active: Tensor | None, labels: Tensor | None, stats: bool, softcap: float | None, valid_vocab: int | None,
    vocab_start: int, group: Any, sequence_parallel: bool, memory: str, chunk_bytes: int | None, validate: bool | None,
) -> TopKLoss:  # fmt: skip
    device, tokens = inputs.device, inputs.shape[0]
    o = _objective(kl, mixed_weight, jsd_beta, outside, temperature, stats, softcap)
    if memory not in ("fast", "low"):
        raise ValueError(f"memory={memory!r}: must be 'fast' or 'low'")
    name, columns, valid = _vocabulary(shard_rows, valid_vocab, vocab_start, group)
    if sequence_parallel:
        tokens *= dist.get_world_size(group)
    _check_active(active)
    count = tokens if active is None else len(active)
    _check_teacher(teacher, o, tokens, count, device, valid)
    _check_per_token("token_weights", token_weights, tokens, count, device)
    if token_weights is not None and not token_weights.is_floating_point():
        raise ValueError(f"token_weights has dtype {token_weights.dtype}: must be a float dtype; call .float() on it")
    _check_per_token("labels", labels, tokens, count, device)
    if labels is not None and labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels has dtype {labels.dtype}: must be int64 vocabulary ids")

    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (inputs, weight, bias)]
    values = ops.topk_kl(
        inputs, weight, bias, *teacher, None if token_weights is None else token_weights.detach(), active, labels,
        o.kl, o.outside, o.mixed_weight, o.jsd_beta, o.temperature, o.stats, o.softcap, valid, columns, vocab_start,
        name, sequence_parallel, memory == "low", _chunk_bytes(chunk_bytes, device, memory),
        on_host(device) if validate is None else bool(validate), *needs,
    )  # fmt: skip
    knows_mass = teacher.indices.shape[1] == valid or any(x is not None for x in teacher[2:])
    reported = field_names(o, knows_mass, labels is not None)
    fields = dict(zip(TopKLoss._fields[1:], values[1:7], strict=True))
    return TopKLoss(values[0], **{key: value if key in reported else None for key, value in fields.items()})  # type: ignore


# ---------------------------------------------------------------- checks of shapes, dtypes and settings


def _objective(
    kl: str,
    mixed_weight: float,
    jsd_beta: float,
    outside: str,
    temperature: float,
    stats: bool,
    softcap: float | None,
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
    return Objective(
        kl,
        outside,
        float(mixed_weight),
        float(jsd_beta),
        float(temperature),
        bool(stats),
        None if softcap is None else float(softcap),
    )


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}={value!r}: must be positive and finite")


def _chunk_bytes(chunk_bytes: int | None, device: torch.device, memory: str = "fast") -> int:
    if chunk_bytes is not None and chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes={chunk_bytes!r}: must be positive; leave it out for the default")
    return default_chunk_bytes(device, chunk_bytes, memory)


def _check_matrix(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor) or value.dim() != 2:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} is {shape}: must be a 2-dimensional tensor; flatten batch and sequence first")
    if hasattr(value, "to_local"):
        raise ValueError(
            f"{name} is a DTensor: give this rank's rows ({name}.to_local(), vocab_start and group), or call from the "
            "forward of the module that FSDP gathers it for"
        )
    if value.dtype not in _FLOATS:
        raise ValueError(f"{name} has dtype {value.dtype}: must be float32, bfloat16 or float64; cast it")


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> None:
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
    if bias is not None:
        if not isinstance(bias, Tensor) or bias.shape != weight.shape[:1]:
            shape = tuple(bias.shape) if isinstance(bias, Tensor) else type(bias).__name__
            raise ValueError(f"bias is {shape}: must be a tensor with one entry per row of weight, ({len(weight)},)")
        if bias.dtype != weight.dtype or bias.device != weight.device:
            raise ValueError(
                f"bias is {bias.dtype} on {bias.device}: must be {weight.dtype} on {weight.device} like weight"
            )
    if softcap is not None:
        _check_positive("softcap", softcap)


def _check_sequence_parallel(sequence_parallel: bool, group: Any) -> None:
    if sequence_parallel and group is None:
        raise ValueError("sequence_parallel=True: needs group, the ranks that hold the other rows of hidden")


def _vocabulary(shard_rows: int, valid_vocab: int | None, vocab_start: int, group: Any) -> tuple[str | None, int, int]:
    """The group's name, the valid ids held here, and the valid ids over all ranks."""
    if vocab_start < 0:
        raise ValueError(f"vocab_start={vocab_start!r}: must be the first id of this shard, 0 or more")
    if group is None:
        if vocab_start:
            raise ValueError(f"vocab_start={vocab_start!r}: needs group, the ranks that hold the other ids")
        if valid_vocab is not None and not 1 <= valid_vocab <= shard_rows:
            raise ValueError(f"valid_vocab={valid_vocab!r}: must be from 1 to the vocabulary size {shard_rows}")
        valid = shard_rows if valid_vocab is None else valid_vocab
        return None, valid, valid
    if not dist.is_initialized():
        raise ValueError("group is given but torch.distributed is not initialised; call init_process_group first")
    if valid_vocab is not None and valid_vocab < 1:
        raise ValueError(f"valid_vocab={valid_vocab!r}: must be 1 or more")
    valid = last_id(group, vocab_start + shard_rows) if valid_vocab is None else valid_vocab
    return group.group_name, min(max(valid - vocab_start, 0), shard_rows), valid


def _check_active(active: Tensor | None) -> None:
    if active is None:
        return
    if not isinstance(active, Tensor) or active.dim() != 1 or active.dtype != torch.int64:
        found = f"{tuple(active.shape)} {active.dtype}" if isinstance(active, Tensor) else type(active).__name__
        raise ValueError(f"active is {found}: must be a 1-dimensional int64 tensor of token ids (not a mask)")


def _check_per_token(name: str, value: Tensor | None, tokens: int, count: int, device: torch.device) -> None:
    """One entry per token, or per active token."""
    if value is None:
        return
    if not isinstance(value, Tensor) or value.dim() != 1 or len(value) not in (tokens, count):
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} is {shape}: must be a tensor with one entry per token, ({tokens},)")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}: must be on {device} like the logits; move it")


def _check_teacher(
    teacher: TopK, objective: Objective, tokens: int, count: int, device: torch.device, valid: int
) -> None:
    """Shapes, dtypes, devices."""
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

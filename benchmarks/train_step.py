"""One training step with random weights: teacher trunk and top-K, student trunk, loss, backward; fused or not.

Shapes are Qwen3-1.7B (student) and Qwen3-4B (teacher), built from their configurations without a download, in
bfloat16, packed sequences of 1,024 tokens of which 128 are prompt, activation recomputation on. No optimizer: it is
the same for everyone. "Fused" computes the loss with ``topk_kl``; "materialised" from full logits, as TRL does.

Letters: N packed tokens, A loss-active rows, D hidden, V vocabulary, K kept.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.measure import Bench, Skipped, reason
from benchmarks.providers import trl, work_dtype
from benchmarks.records import Row, hardware
from fastkd.batch import Batch, Prompt, Rollout, pack
from fastkd.kernels import TopK, topk_kl, vocab_topk


class Models(NamedTuple):
    """Configurations of both models, and the batch."""

    student: dict[str, Any]
    teacher: dict[str, Any]
    tokens: tuple[int, ...]
    """Packed tokens of a micro-batch; each is a row group of the table."""
    sequence: int
    """Tokens of one sequence, an eighth of them prompt."""
    k: int
    most: int = 1 << 19
    """Tokens of the longest micro-batch that is tried."""


_QWEN3 = dict(
    vocab_size=151_936, num_key_value_heads=8, head_dim=128, max_position_embeddings=40_960, tie_word_embeddings=True
)
QWEN3 = Models(
    student=dict(
        hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16, **_QWEN3
    ),
    teacher=dict(
        hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, **_QWEN3
    ),
    tokens=(8192, 20_480),
    sequence=1024,
    k=512,
)  # fmt: skip
_TINY = dict(
    vocab_size=1000, num_key_value_heads=2, head_dim=16, max_position_embeddings=256, tie_word_embeddings=True,
    intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
)  # fmt: skip
TINY = Models(
    dict(hidden_size=32, **_TINY), dict(hidden_size=48, **_TINY), tokens=(128, 256), sequence=64, k=16, most=512
)  # fmt: skip


# Dense bfloat16 peak of the vendor's data sheets, FLOP/s; the first name found in the device's counts.
_PEAKS = {"H100 PCIe": 756e12, "GH200": 989e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12}


def utilisation(operations_per_second: float) -> Row:
    """Model FLOPs utilisation in per cent of the device's bfloat16 peak; nothing for a device that is not listed."""
    peak = next((flops for name, flops in _PEAKS.items() if name in hardware()), None)
    return {} if peak is None else {"MFU %": 100 * operations_per_second / peak}


@dataclass
class Pair:
    """Both models on the device."""

    student: Any
    teacher: Any

    def trunk(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """(hidden states of the loss-active rows [A, D], head weight [V, D])."""
        from fastkd.models import head_weight, packed_hidden

        return packed_hidden(model, batch).index_select(0, batch.active_A), head_weight(model)


def build(models: Models, device: torch.device) -> Pair:
    """Random weights in the working dtype; recomputation in the student."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from fastkd import attention

    def one(settings: dict[str, Any], seed: int) -> Any:
        torch.manual_seed(seed)
        with torch.device(device):
            return Qwen3ForCausalLM._from_config(
                Qwen3Config(**settings), attn_implementation=attention.NAME, dtype=work_dtype(device)
            )

    student, teacher = one(models.student, 0).train(), one(models.teacher, 1).eval().requires_grad_(False)
    enable = getattr(student, "activation_checkpointing_enable", None)  # its name depends on the version
    (enable or student.gradient_checkpointing_enable)({"use_reentrant": False})
    return Pair(student, teacher)


def packed(models: Models, tokens: int) -> Batch:
    """Random ids: ``tokens`` packed tokens in sequences of equal length."""
    rng = random.Random(0)
    prompt = models.sequence // 8
    vocab = models.student["vocab_size"]
    rollouts = []
    for index in range(max(1, tokens // models.sequence)):
        # The last response token predicts nothing and is not packed.
        ids = [rng.randrange(vocab) for _ in range(models.sequence + 1)]
        rollouts.append(Rollout(Prompt(index, "", None, "", tuple(ids[:prompt])), 0, tuple(ids[prompt:]), True, 0))
    return pack(rollouts)


def _fused(memory: str) -> Callable[[Tensor, Tensor, TopK], Tensor]:
    def loss(hidden: Tensor, weight: Tensor, teacher: TopK) -> Tensor:
        even = torch.full((len(hidden),), 1.0 / len(hidden), device=hidden.device)
        return topk_kl(hidden, weight, teacher, kl="forward", outside="bucket", token_weights=even, memory=memory).loss

    return loss


LOSSES: dict[str, Callable[[Tensor, Tensor, TopK], Tensor]] = {
    "fused, fast": _fused("fast"),
    "fused, low memory": _fused("low"),
    "materialised": trl,
}


def step_table(bench: Bench, models: Models) -> None:
    """Check that all losses agree, then time a step of each and its phases, and read its peak memory; then the longest
    micro-batch that fits with each."""
    pair = build(models, bench.device)
    rows: list[Row] = []
    for tokens in models.tokens:
        if bench.late:
            rows.append({"tokens": tokens, "loss": "all", "note": "not run: no time left"})
            continue
        rows += _rows(bench, models, pair, packed(models, tokens).to(bench.device), tokens)
    names = "Qwen3-1.7B ← Qwen3-4B shapes" if models is QWEN3 else "tiny models"
    kind = str(work_dtype(bench.device)).removeprefix("torch.")
    bench.report("step", f"One training step, {names}, random weights, {kind}, K={models.k}, recomputation on", rows)
    if bench.device.type == "cuda":  # elsewhere memory is not counted finely enough
        title = f"The longest micro-batch, {names}, both models loaded, no optimizer"
        bench.report("step_longest", title, [_longest(bench, models, pair, name, rows) for name in LOSSES])


def _longest(bench: Bench, models: Models, pair: Pair, name: str, measured: list[Row]) -> Row:
    """Predicted from the peaks of two lengths, whose difference is what a token takes; then a step of 95 % of it."""
    row: Row = {"loss": name}
    points = [
        (int(one["tokens"]), 1e9 * one["peak GB"]) for one in measured if one["loss"] == name and "peak GB" in one
    ]
    if len(points) < 2 or points[-1][1] <= points[0][1]:
        return row | {"note": "skipped: needs the peaks of two lengths"}
    (few, low), (many, high) = points[0], points[-1]
    a_token = (high - low) / (many - few)
    # The teacher's rows lie there too.
    a_token_held = a_token + models.k * 8 * (1 - 1 / 8)
    fits = int((bench.free_bytes() - (low - few * a_token)) / a_token_held)
    tried = min(int(0.95 * fits), models.most) // models.sequence * models.sequence
    row |= {"KB a token": 1e-3 * a_token, "predicted tokens": fits, "tried": tried}
    speed = next(one["tokens/s"] for one in measured if one["loss"] == name and one["tokens"] == many)
    if 2 * tried / speed > 0.3 * (bench.deadline - time.monotonic()):
        return row | {"note": "not run: no time left"}
    batch = packed(models, tried).to(bench.device)
    teacher = _any_rows(models, len(batch.active_A), bench.device)

    def step() -> None:
        LOSSES[name](*pair.trunk(pair.student, batch), teacher).backward()

    timing = bench.race({name: step}, rounds=1, warm=False)[name]
    pair.student.zero_grad(set_to_none=True)
    if isinstance(timing, Skipped):
        return row | {"note": timing.reason}
    peak = None if timing.extra_bytes is None else 1e-9 * timing.extra_bytes
    return row | {"peak GB": peak, "predicted GB": 1e-9 * (low + (tried - few) * a_token)}


def _any_rows(models: Models, active: int, device: torch.device) -> TopK:
    """Rows of a teacher that nobody asked: what they take is what counts."""
    logits = torch.zeros(active, models.k, device=device)
    ids = torch.arange(models.k, dtype=torch.int32, device=device).expand(active, -1).contiguous()
    sums = torch.full((active,), 10.0, device=device)
    return TopK(ids, logits, sums, sums.clone())


def _rows(bench: Bench, models: Models, pair: Pair, batch: Batch, tokens: int) -> list[Row]:
    # Peak memory is above the level with both models loaded and no gradients.
    def score() -> TopK:
        with torch.no_grad():
            hidden, weight = pair.trunk(pair.teacher, batch)
            return vocab_topk(hidden, weight, models.k)

    scoring = bench.race({"teacher": score}, rounds=3, limit=10.0)["teacher"]
    if isinstance(scoring, Skipped):
        bench.failures.append(f"teacher at {tokens} tokens: {scoring.reason}")
        return [{"tokens": tokens, "loss": "teacher", "note": f"skipped: {scoring.reason}"}]
    teacher = score()
    # As a fused loss sees it: 6 P N for the student's trunk and head, 2 P N for the teacher's; recomputation and
    # attention scores are not counted.
    student_size, teacher_size = (sum(p.numel() for p in model.parameters()) for model in (pair.student, pair.teacher))
    operations = (6 * student_size + 2 * teacher_size) * tokens
    values: dict[str, float] = {}
    rows: list[Row] = []
    active = len(batch.active_A)
    for name, loss in LOSSES.items():
        needed = int((20.0 if bench.device.type == "cuda" else 16.0) * active * models.student["vocab_size"])
        if name == "materialised" and (lack := bench.lacks(needed)):
            rows.append({"tokens": tokens, "loss": name, "note": f"skipped: {lack}"})
            continue
        phases = dict.fromkeys(("trunk", "head and loss", "backward"), 0.0)

        def step(
            loss: Callable[[Tensor, Tensor, TopK], Tensor] = loss, name: str = name, phases: dict[str, float] = phases
        ) -> None:
            kept: dict[str, Any] = {}

            def head() -> None:
                kept["loss"] = loss(*kept.pop("trunk"), teacher)

            phases["trunk"] = bench.seconds(lambda: kept.update(trunk=pair.trunk(pair.student, batch)))
            phases["head and loss"] = bench.seconds(head)
            values[name] = float(kept["loss"].detach())
            phases["backward"] = bench.seconds(kept.pop("loss").backward)
            pair.student.zero_grad(set_to_none=True)

        timing = bench.race({name: step}, rounds=3, limit=15.0)[name]
        if isinstance(timing, Skipped):
            rows.append({"tokens": tokens, "loss": name, "note": f"skipped: {timing.reason}"})
            pair.student.zero_grad(set_to_none=True)
            if name != "materialised":
                bench.failures.append(f"step, {name}: {timing.reason}")
            continue
        total = timing.median + scoring.median
        rows.append(
            {
                "tokens": tokens,
                "loss": name,
                "tokens/s": tokens / total,
                "step s": total,
                "teacher s": scoring.median,
                **{f"{phase} s": seconds for phase, seconds in phases.items()},
                "TFLOP/s": 1e-12 * operations / total,
                **utilisation(operations / total),
                "peak GB": None if timing.extra_bytes is None else timing.extra_bytes / 1e9,
                "loss value": values[name],
            }
        )
    if len(values) > 1:
        expected = values["fused, fast"] if "fused, fast" in values else next(iter(values.values()))
        for name, value in values.items():
            if abs(value - expected) > 0.02 * abs(expected):
                bench.failures.append(f"step, {name}: loss {value}, expected {expected}")
    return rows


def missing() -> str | None:
    """What this part needs and cannot import."""
    try:
        import transformers  # noqa: F401

        from fastkd import attention, models  # noqa: F401
    except ModuleNotFoundError as error:
        return reason(error)
    return None

"""topk_kl forward and backward against the bare GEMMs on the same tensors, and against every other provider.

100 % are three GEMMs (logits, dX, dW) that allocate dX and dW as any training step does, whole or in row chunks as
large as ours, whichever is faster. ``linear_kl_table`` is also what gpu_report.py calls.

Letters: N tokens, D hidden, V vocabulary, K kept.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.measure import Bench, Skipped, Timing, Work, reason
from benchmarks.providers import (
    Case,
    Provider,
    Shape,
    compiled,
    fused,
    gate,
    make,
    materialised,
    packages,
    step,
    work_dtype,
)
from benchmarks.records import Row
from fastkd._kernels.rows import default_chunk_bytes
from fastkd.kernels import topk_kl

CPU_SHAPES = {"large-vocabulary": Shape(512, 1024, 151_936, 512), "laptop": Shape(1800, 96, 400, 32)}
CUDA_SHAPES = {
    "reference": Shape(16_384, 4096, 151_936, 512),
    "narrow": Shape(65_536, 2048, 151_936, 512),
    "wide": Shape(16_384, 5120, 151_936, 512),
    "k64": Shape(16_384, 4096, 151_936, 64),
    "shard": Shape(16_384, 4096, 18_992, 512),  # V/8: one rank's part of the reference
}
SHAPES = CUDA_SHAPES if torch.cuda.is_available() else CPU_SHAPES
# The first shape meets every provider; the others our modes and one materialised way.
FULL = ("reference", "large-vocabulary", "laptop")
LOSSES = [
    ("forward", "bucket"), ("forward", "zero"), ("forward", "renormalize"), ("forward", "drop"),
    ("reverse", "bucket"), ("reverse", "zero"), ("reverse", "renormalize"), ("reverse", "drop"),
    ("mixed", "bucket"), ("jsd", "bucket"),
]  # fmt: skip
# Seconds that the rounds of one table may take.
LIMIT = {"cuda": 25.0, "cpu": 330.0}


def chunk_rows(shape: Shape, device: torch.device) -> int:
    """Rows of a chunk of float32 logits: even chunks, as the kernel makes them."""
    rows = max(1, min(shape.n, default_chunk_bytes(device, None) // (shape.v * 4)))
    return -(-shape.n // -(-shape.n // rows))


def bare_gemms(hidden: Tensor, weight: Tensor, rows: int) -> None:
    """Logits, dX and dW of ``rows`` rows at a time; dW in float32 over several chunks, as it has to be."""
    x, w = hidden.detach(), weight.detach()
    n, wide = x.shape[0], torch.float32
    if rows >= n:
        z = x @ w.T
        _ = z @ w, z.T @ x
        return
    dx, dw = torch.empty_like(x), torch.empty_like(w, dtype=wide)
    z = torch.empty(rows, w.shape[0], dtype=x.dtype, device=x.device)
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        chunk = z[: part.stop - part.start]
        torch.mm(x[part], w.T, out=chunk)
        torch.mm(chunk, w, out=dx[part])
        if x.dtype == wide:
            torch.addmm(dw, chunk.T, x[part], beta=int(start > 0), out=dw)
        else:
            torch.addmm(dw, chunk.T, x[part], out_dtype=wide, beta=int(start > 0), out=dw)


def baselines(bench: Bench, case: Case) -> tuple[dict[str, Work], dict[str, str]]:
    """Bare GEMMs whole (where they fit) and in our chunks; and those left out, with the reason."""
    shape, rows = case.shape, chunk_rows(case.shape, bench.device)
    work: dict[str, Work] = {}
    skipped = {}
    size = case.hidden.element_size()
    if rows < shape.n:
        work[f"bare GEMMs, {rows:,} rows"] = lambda: bare_gemms(*case.leaves, rows)
    lack = bench.lacks(shape.n * shape.v * size + 2 * case.gradient_bytes)
    if lack:
        skipped["bare GEMMs, whole"] = lack
    else:
        work["bare GEMMs, whole"] = lambda: bare_gemms(*case.leaves, shape.n)
    return work, skipped


def half_of_the_tokens(case: Case) -> dict[str, Work]:
    """``topk_kl`` on every second token, and the bare GEMMs of as many rows: every other token is masked."""
    active = torch.arange(0, case.shape.n, 2, device=case.hidden.device)
    few = case.hidden.detach()[active].requires_grad_()
    rows = min(chunk_rows(case.shape, case.hidden.device), len(active))
    return {
        "half of the tokens masked: bare GEMMs": lambda: bare_gemms(few, case.weight, rows),
        "half of the tokens masked: topk_kl forward/bucket": lambda: step(
            topk_kl(*case.leaves, case.teacher, active=active, token_weights=case.even).loss, case
        ),
    }


def contenders(device: torch.device, full: bool) -> list[Provider]:
    """Who runs on a shape."""
    ours = [fused(kl, outside) for kl, outside in (LOSSES if full else (*LOSSES[:3], LOSSES[4]))]
    ours += [fused("forward", "bucket", memory="low")]
    if not full:
        return [*ours, materialised()[0]]
    ours += [fused("forward", "bucket", stats=False), fused("forward", "renormalize", stats=False)]
    return [*ours, *materialised(), *compiled(), *packages(device)]


def linear_kl_table(bench: Bench, name: str, shape: Shape, *, full: bool = True, limit: float | None = None) -> None:
    """Check, time, print and store ``linear_kl_<name>``."""
    providers = contenders(bench.device, full)
    errors = gate(bench, providers)
    dtype = work_dtype(bench.device)
    case = make(shape, bench.device, dtype)
    work, skipped = baselines(bench, case)
    for one in providers:
        error = errors[one.name]
        if isinstance(error, Skipped):
            skipped[one.name] = error.reason
            continue
        if one.bytes_per_logit and (lack := bench.lacks(int(one.bytes_per_logit * shape.n * shape.v))):
            skipped[one.name] = lack
            continue
        try:
            loss = one.prepare(case) if one.prepare else one.loss
        except Exception as problem:
            skipped[one.name] = reason(problem)
            continue
        work[one.name] = lambda loss=loss: step(loss(case), case)
    work |= half_of_the_tokens(case)
    # On a CPU a call takes seconds: the one for the memory is warm-up enough.
    warm = bench.device.type == "cuda"
    timings = bench.race(work, limit=LIMIT[bench.device.type] if limit is None else limit, warm=warm)
    ours = {one.name for one in providers if one.ours}
    rows = rows_of(timings, "bare GEMMs, ", case.gradient_bytes)
    for row in rows:
        error = errors.get(row["provider"])
        if isinstance(error, float):
            row["gradient error"] = error
        if row["provider"] in ours and row.get("note"):
            bench.failures.append(f"{row['provider']}: {row['note']}")
    rows += [{"provider": key, "note": f"skipped: {why}"} for key, why in skipped.items()]
    kind = str(dtype).removeprefix("torch.")
    bench.report(
        f"linear_kl_{name}",
        f"topk_kl forward + backward, {shape}, {kind}",
        rows,
        rounds=max((len(t.seconds) for t in timings.values() if isinstance(t, Timing)), default=0),
        shape=shape._asdict(),
    )


def rows_of(timings: dict[str, Timing | Skipped], baseline: str, held: int) -> list[Row]:
    """Table rows: times, speed against the fastest named ``baseline``…, memory beyond ``held`` bytes."""
    found = [t.median for name, t in timings.items() if name.startswith(baseline) and isinstance(t, Timing)]
    rows: list[Row] = []
    for name, timing in timings.items():
        if isinstance(timing, Skipped):
            rows.append({"provider": name, "note": f"skipped: {timing.reason}"})
            continue
        row: Row = {"provider": name, **timing.cells()}
        if found:
            row["% of bare GEMM speed"] = 100.0 * min(found) / timing.median
        if timing.extra_bytes is not None:
            row["extra MB"] = max(0, timing.extra_bytes - held) / 1e6
        rows.append(row)
    return rows


# ---------------------------------------------------------------- memory alone

MEMORY_SHAPES = {"cuda": CUDA_SHAPES["reference"], "cpu": Shape(4096, 256, 65_536, 64)}


def memory_table(bench: Bench, shape: Shape) -> None:
    """Peak memory beyond X, W, dX and dW, of one call each, and how many times less it is than materialised logits."""
    dtype = work_dtype(bench.device)
    case = make(shape, bench.device, dtype)
    providers = [
        fused("forward", "bucket"),
        fused("reverse", "zero"),
        fused("jsd", "bucket"),
        fused("forward", "bucket", memory="low"),
        fused("forward", "renormalize", stats=False),
        *materialised(),
    ]
    small = make(shape._replace(n=min(shape.n, 64)), bench.device, dtype)
    extra: dict[str, int] = {}
    rows: list[Row] = []
    for one in providers:
        if one.bytes_per_logit and (lack := bench.lacks(int(one.bytes_per_logit * shape.n * shape.v))):
            rows.append({"provider": one.name, "note": f"skipped: {lack}"})
            continue
        step(one.loss(small), small)  # what a first call loads is no part of the loss
        timing = bench.race({one.name: lambda one=one: step(one.loss(case), case)}, rounds=0, warm=False)[one.name]
        if isinstance(timing, Skipped) or timing.extra_bytes is None:
            why = timing.reason if isinstance(timing, Skipped) else "peak memory cannot be read here"
            rows.append({"provider": one.name, "note": f"skipped: {why}"})
            continue
        extra[one.name] = max(0, timing.extra_bytes - case.gradient_bytes)
    theirs = [value for name, value in extra.items() if name.startswith("materialised")]
    for name, value in extra.items():
        row: Row = {"provider": name, "extra MB": value / 1e6}
        if theirs and not name.startswith("materialised"):
            row["× less than the least materialised"] = min(theirs) / max(value, 1)
        rows.append(row)
    kind = str(dtype).removeprefix("torch.")
    bench.report(
        "memory", f"Peak memory beyond X, W, dX and dW, {shape}, {kind}", rows, shape=shape._asdict(), rounds=1
    )


@pytest.mark.parametrize("name", SHAPES)
def test_linear_kl(bench, name):
    linear_kl_table(bench, name, SHAPES[name], full=name in FULL)


def test_memory(bench):
    memory_table(bench, MEMORY_SHAPES[bench.device.type])

"""vocab_topk against the bare GEMM on the same tensors, and against the GEMM followed by torch.topk.

``linear_topk_table`` is also what gpu_report.py calls.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.bench_linear_kl import chunk_rows, rows_of
from benchmarks.measure import Bench, Timing, Work
from benchmarks.providers import Shape, work_dtype
from fastkd._kernels import reference
from fastkd.kernels import vocab_topk

CPU_SHAPES = {
    "large-vocabulary": Shape(512, 1024, 151_936, 512),
    "k64": Shape(512, 1024, 151_936, 64),
    "laptop": Shape(1800, 128, 400, 32),
}
CUDA_SHAPES = {
    "reference": Shape(16_384, 4096, 151_936, 512),
    "narrow": Shape(65_536, 2048, 151_936, 512),
    "wide": Shape(16_384, 5120, 151_936, 512),
    "k64": Shape(16_384, 4096, 151_936, 64),
    "shard": Shape(16_384, 4096, 18_992, 512),
}
SHAPES = CUDA_SHAPES if torch.cuda.is_available() else CPU_SHAPES
LIMIT = {"cuda": 15.0, "cpu": 60.0}


def gemm(hidden: Tensor, weight: Tensor, rows: int, after: Callable[[Tensor], object] = lambda logits: None) -> None:
    """Logits of ``rows`` rows at a time, each chunk handed to ``after``."""
    buffer = torch.empty(min(rows, len(hidden)), len(weight), dtype=hidden.dtype, device=hidden.device)
    for start in range(0, len(hidden), rows):
        part = hidden[start : start + rows]
        after(torch.mm(part, weight.T, out=buffer[: len(part)]))


def topk_and_logsumexp(k: int) -> Callable[[Tensor], None]:
    """What other packages do with a chunk of logits."""

    def after(logits: Tensor) -> None:
        logits.float().topk(k, dim=1)
        logits.float().logsumexp(1)

    return after


def check(hidden: Tensor, weight: Tensor, k: int) -> None:
    """AssertionError unless some rows are exact in float64, and in the timed dtype hold the K largest values."""
    exact_logits = (hidden[:8].double() @ weight.double().T).cpu()
    expected = reference.topk(exact_logits, k)
    few = vocab_topk(hidden[:8].double(), weight.double(), k)
    assert torch.equal(few.indices.long().cpu(), expected[0])
    assert few.tail_logsumexp is not None
    torch.testing.assert_close(few.tail_logsumexp.cpu(), expected[3])
    timed = vocab_topk(hidden[:8], weight, k)
    values = exact_logits.topk(k, 1).values
    # float32 logits: neighbours closer than its rounding may change places, their values may not.
    torch.testing.assert_close(
        timed.logits.cpu().double().sort(1, descending=True).values, values, rtol=1e-4, atol=1e-4
    )


def linear_topk_table(bench: Bench, name: str, shape: Shape, *, limit: float | None = None) -> None:
    """Check, time, print and store ``linear_topk_<name>``."""
    dtype = work_dtype(bench.device)
    torch.manual_seed(0)
    hidden = torch.randn(shape.n, shape.d, device=bench.device, dtype=dtype)
    weight = torch.randn(shape.v, shape.d, device=bench.device, dtype=dtype).mul_(2.0 / shape.d**0.5)
    check(hidden, weight, shape.k)

    rows = chunk_rows(shape, bench.device)
    work: dict[str, Work] = {}
    skipped = {}
    if rows < shape.n:
        work[f"bare GEMM, {rows:,} rows"] = lambda: gemm(hidden, weight, rows)
    lack = bench.lacks(shape.n * shape.v * hidden.element_size())
    if lack:
        skipped["bare GEMM, whole"] = lack
    else:
        work["bare GEMM, whole"] = lambda: gemm(hidden, weight, shape.n)
    work["vocab_topk"] = lambda: vocab_topk(hidden, weight, shape.k)
    work["GEMM + torch.topk + logsumexp"] = lambda: gemm(hidden, weight, rows, topk_and_logsumexp(shape.k))
    work["GEMM + torch.topk (no logsumexp)"] = lambda: gemm(hidden, weight, rows, lambda z: z.topk(shape.k, dim=1))
    timings = bench.race(work, limit=LIMIT[bench.device.type] if limit is None else limit)
    table = rows_of(timings, "bare GEMM, ", 0)
    for row in table:
        if row["provider"] == "vocab_topk" and row.get("note"):
            bench.failures.append(f"vocab_topk: {row['note']}")
    table += [{"provider": key, "note": f"skipped: {why}"} for key, why in skipped.items()]
    bench.report(
        f"linear_topk_{name}",
        f"vocab_topk, {shape}, {str(dtype).removeprefix('torch.')}",
        table,
        rounds=max((len(t.seconds) for t in timings.values() if isinstance(t, Timing)), default=0),
        shape=shape._asdict(),
    )


@pytest.mark.parametrize("name", SHAPES)
def test_linear_topk(bench, name):
    linear_topk_table(bench, name, SHAPES[name])

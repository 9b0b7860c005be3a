"""vocab_topk against the bare GEMM on the same tensors, and against the GEMM followed by torch.topk."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastkd._kernels import reference
from fastkd._kernels.rows import default_chunk_bytes
from fastkd.kernels import vocab_topk


class Shape(NamedTuple):
    """N tokens, D hidden, V vocabulary, K kept."""

    n: int
    d: int
    v: int
    k: int


CPU_SHAPES = {
    "large-vocabulary": Shape(512, 1024, 151_936, 512),
    "k64": Shape(512, 1024, 151_936, 64),
    "laptop": Shape(1800, 128, 400, 32),
}
CUDA_SHAPES = {
    "reference": Shape(16_384, 4096, 151_936, 512),
    "wide": Shape(16_384, 5120, 151_936, 512),
    "k64": Shape(16_384, 4096, 151_936, 64),
}
SHAPES = CUDA_SHAPES if torch.cuda.is_available() else CPU_SHAPES


def gemm(hidden: Tensor, weight: Tensor, rows: int, after=lambda logits: None) -> None:
    """Logits of ``rows`` rows at a time, each chunk handed to ``after``."""
    buffer = torch.empty(min(rows, len(hidden)), len(weight), dtype=hidden.dtype, device=hidden.device)
    for start in range(0, len(hidden), rows):
        part = hidden[start : start + rows]
        after(torch.mm(part, weight.T, out=buffer[: len(part)]))


@pytest.mark.parametrize("name", SHAPES)
def test_linear_topk(bench, name):
    shape = SHAPES[name]
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    hidden = torch.randn(shape.n, shape.d, device=bench.device, dtype=dtype)
    weight = (2.0 / shape.d**0.5) * torch.randn(shape.v, shape.d, device=bench.device, dtype=dtype)

    few = vocab_topk(hidden[:8].double(), weight.double(), shape.k)
    expected = reference.topk((hidden[:8].double() @ weight.double().T).cpu(), shape.k)
    assert torch.equal(few.indices.long().cpu(), expected[0])
    torch.testing.assert_close(few.tail_logsumexp.cpu(), expected[3])

    rows = max(1, min(shape.n, default_chunk_bytes(bench.device, None) // (shape.v * 4)))
    rows = -(-shape.n // -(-shape.n // rows))

    def topk_and_logsumexp(logits: Tensor) -> None:
        logits.float().topk(shape.k, dim=1)
        logits.float().logsumexp(1)

    competitors = {"bare GEMM, whole": lambda: gemm(hidden, weight, shape.n)}
    if rows < shape.n:
        competitors[f"bare GEMM, {rows} rows"] = lambda: gemm(hidden, weight, rows)
    competitors["vocab_topk"] = lambda: vocab_topk(hidden, weight, shape.k)
    competitors["GEMM + torch.topk + logsumexp"] = lambda: gemm(hidden, weight, rows, topk_and_logsumexp)
    seconds = bench.time(competitors)
    best = min(value for key, value in seconds.items() if key.startswith("bare"))
    bench.report(
        f"linear_topk_{name}",
        f"vocab_topk, N={shape.n} D={shape.d} V={shape.v} K={shape.k} {dtype}".replace("torch.", ""),
        [
            {
                "what": key,
                "ms": 1e3 * value,
                "% of bare GEMM speed": 100.0 * best / value,
                "MB": bench.peak_bytes(competitors[key]) / 1e6,
            }
            for key, value in seconds.items()
        ],
    )

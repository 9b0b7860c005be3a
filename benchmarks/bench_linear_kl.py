"""topk_kl forward and backward against the bare GEMMs on the same tensors, and against materialised logits.

100 % are three GEMMs (logits, dX, dW) that allocate dX and dW as any training step does, whole or in row chunks as
large as ours, whichever is faster. The materialised way is what RL libraries do: full logits, log_softmax, gather,
autograd.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastkd._kernels import reference
from fastkd._kernels.rows import default_chunk_bytes
from fastkd.kernels import TopK, topk_kl, vocab_topk


class Shape(NamedTuple):
    """N tokens, D hidden, V vocabulary, K kept."""

    n: int
    d: int
    v: int
    k: int


CPU_SHAPES = {"large-vocabulary": Shape(512, 1024, 151_936, 512), "laptop": Shape(1800, 96, 400, 32)}
CUDA_SHAPES = {
    "reference": Shape(16_384, 4096, 151_936, 512),
    "narrow": Shape(65_536, 2048, 151_936, 512),
    "wide": Shape(16_384, 5120, 151_936, 512),
    "k64": Shape(16_384, 4096, 151_936, 64),
}
SHAPES = CUDA_SHAPES if torch.cuda.is_available() else CPU_SHAPES
LOSSES = [
    ("forward", "bucket"), ("forward", "zero"), ("forward", "renormalize"), ("reverse", "bucket"),
    ("reverse", "zero"), ("reverse", "renormalize"), ("mixed", "bucket"), ("jsd", "bucket"),
]  # fmt: skip


def make(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, TopK]:
    """A student, and a teacher that is a noisy copy of it, so that the kept ids are the likely ones."""
    torch.manual_seed(0)
    hidden = torch.randn(shape.n, shape.d, device=device, dtype=dtype)
    weight = (2.0 / shape.d**0.5) * torch.randn(shape.v, shape.d, device=device, dtype=dtype)
    teacher = vocab_topk(hidden + 0.3 * torch.randn_like(hidden), weight, shape.k)
    return hidden.requires_grad_(), weight.requires_grad_(), teacher


def step(loss: Tensor, *leaves: Tensor) -> None:
    """Backward, and drop the gradients."""
    torch.autograd.grad(loss, leaves)


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


def materialised(hidden: Tensor, weight: Tensor, teacher: TopK, kl: str) -> Tensor:
    """Renormalised top-K KL from full logits, one autograd operation after another."""
    logits = (hidden @ weight.T).float()
    log_q = torch.log_softmax(logits, -1).gather(1, teacher.indices.long())
    log_q = log_q - log_q.logsumexp(1, keepdim=True)
    log_p = torch.log_softmax(teacher.logits.float(), 1)
    difference = log_p - log_q if kl == "forward" else log_q - log_p
    return ((log_p if kl == "forward" else log_q).exp() * difference).sum() / len(hidden)


def check(device: torch.device, dtype: torch.dtype) -> None:
    """Values and gradients of every timed loss against the float64 oracle."""
    hidden, weight, teacher = make(Shape(64, 64, 1000, 32), device, dtype)
    for kl, outside in LOSSES:
        x, w = hidden.detach().cpu().double().requires_grad_(), weight.detach().cpu().double().requires_grad_()
        rows = TopK(*(None if field is None else field.cpu() for field in teacher))
        expected = reference.topk_kl(x @ w.T, *rows, kl=kl, outside=outside).per_token.sum()
        wanted = torch.autograd.grad(expected, (x, w))
        loss = topk_kl(hidden, weight, teacher, kl=kl, outside=outside).loss
        got = torch.autograd.grad(loss, (hidden, weight))
        torch.testing.assert_close(loss.detach().cpu().double(), expected.detach(), rtol=1e-4, atol=1e-5)
        for a, b in zip(got, wanted, strict=True):
            error = (a.cpu().double() - b).norm() / b.norm()
            assert error < (5e-3 if dtype == torch.bfloat16 else 1e-4), f"{kl}/{outside}: {error:.1e}"
    plain = topk_kl(hidden, weight, teacher, outside="renormalize", token_weights=_even(hidden)).loss
    torch.testing.assert_close(
        plain.detach(), materialised(hidden.float(), weight.float(), teacher, "forward").detach(), rtol=1e-3, atol=1e-4
    )


def _even(hidden: Tensor) -> Tensor:
    return torch.full((len(hidden),), 1.0 / len(hidden), device=hidden.device)


@pytest.mark.parametrize("name", SHAPES)
def test_linear_kl(bench, name):
    shape = SHAPES[name]
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    check(bench.device, dtype)
    hidden, weight, teacher = make(shape, bench.device, dtype)
    even, budget = _even(hidden), default_chunk_bytes(bench.device, None)
    half = even * (torch.arange(shape.n, device=hidden.device) % 2)
    rows = max(1, min(shape.n, budget // (shape.v * 4)))
    rows = -(-shape.n // -(-shape.n // rows))  # even chunks, as the kernel makes them

    def fused(**options):
        options = {"token_weights": even, **options}
        return lambda: step(topk_kl(hidden, weight, teacher, **options).loss, hidden, weight)

    competitors = {"bare GEMMs, whole": lambda: bare_gemms(hidden, weight, shape.n)}
    if rows < shape.n:
        competitors[f"bare GEMMs, {rows} rows"] = lambda: bare_gemms(hidden, weight, rows)
    for kl, outside in LOSSES:
        competitors[f"topk_kl {kl}/{outside}"] = fused(kl=kl, outside=outside)
    competitors["topk_kl forward/bucket, stats=False"] = fused(stats=False)
    competitors["topk_kl forward/renormalize, stats=False"] = fused(outside="renormalize", stats=False)
    competitors["topk_kl forward/bucket, half the tokens"] = fused(token_weights=half)
    competitors["topk_kl forward/bucket, memory=low"] = fused(memory="low")
    for kl in ("forward", "reverse"):
        competitors[f"materialised {kl}/renormalize"] = lambda kl=kl: step(
            materialised(hidden, weight, teacher, kl), hidden, weight
        )
    seconds = bench.time(competitors)
    best = min(value for key, value in seconds.items() if key.startswith("bare"))
    gradients = hidden.numel() * hidden.element_size() + weight.numel() * weight.element_size()
    bench.report(
        f"linear_kl_{name}",
        f"topk_kl forward + backward, N={shape.n} D={shape.d} V={shape.v} K={shape.k} {dtype}".replace("torch.", ""),
        [
            {
                "what": key,
                "ms": 1e3 * value,
                "% of bare GEMM speed": 100.0 * best / value,
                "MB beyond dX, dW": max(0, bench.peak_bytes(competitors[key]) - gradients) / 1e6,
            }
            for key, value in seconds.items()
        ],
    )

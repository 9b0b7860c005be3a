"""The Triton kernels on tensors of the simulated GPU, interpreted: the way through the code that CUDA takes.

``tests/interpreted`` runs the same kernels on tensors of the CPU, where GEMMs are not mixed; here bfloat16 operands
meet float32 logits, and dlogits are written in their place.
"""

from __future__ import annotations

import os

import pytest
import torch

from fastkd._kernels import reference, tuning
from fastkd.kernels import TopK, topk_kl, vocab_topk

N, D, V, K = 5, 24, 333, 12
VARIANTS = [
    (kl, outside)
    for kl in ("forward", "reverse", "mixed", "jsd")
    for outside in ("renormalize", "zero", "bucket", "drop")
    if kl != "jsd" or outside in ("renormalize", "bucket")
]
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")


@pytest.fixture(scope="module")
def inputs():
    make = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, D, generator=make), 0.3 * torch.randn(V, D, generator=make)
    return hidden, weight, 0.1 * torch.randn(N, D, generator=make), torch.rand(N, generator=make) + 0.1


# Every variant as training computes it; the other dtype and mode, whose rows are the same, once each.
CASES = [(*variant, torch.bfloat16, "fast") for variant in VARIANTS]
CASES += [("mixed", "zero", torch.bfloat16, "low"), ("jsd", "bucket", torch.float32, "fast")]


@pytest.mark.parametrize(("kl", "outside", "dtype", "memory"), CASES)
def test_loss_and_gradients(kl, outside, dtype, memory, inputs):
    hidden, weight, shift, token_weights = inputs
    x, w = (t.to(dtype).to("cuda").requires_grad_() for t in (hidden, weight))
    assert tuning.use_triton(x.device, torch.float32)
    exact_x, exact_w = (t.detach().cpu().double().requires_grad_() for t in (x, w))
    ids, logits, lse, tail = reference.topk((exact_x + shift) @ exact_w.T, K)
    rows = TopK(ids.int(), logits.detach().float(), lse.detach().float(), tail.detach().float())
    out = topk_kl(
        x, w, rows.map(torch.Tensor.cuda), kl=kl, outside=outside, token_weights=token_weights.cuda(), memory=memory,
        chunk_bytes=3 * V * 4, labels=torch.zeros(N, dtype=torch.int64, device="cuda"),
    )  # fmt: skip
    out.loss.backward()
    exact = reference.topk_kl(exact_x @ exact_w.T, *rows, kl=kl, outside=outside)
    (exact.per_token * token_weights.double()).sum().backward()
    torch.testing.assert_close(out.per_token.cpu().double(), exact.per_token.detach(), rtol=1e-3, atol=1e-4)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2  # the interpreter truncates to bfloat16
    for ours, theirs in ((x.grad, exact_x.grad), (w.grad, exact_w.grad)):
        assert ours is not None and ours.is_cuda
        assert (ours.cpu().double() - theirs).norm() <= tolerance * theirs.norm()


def test_top_k_is_exact(inputs):
    hidden, weight, *_ = inputs
    found = vocab_topk(hidden.cuda(), weight.cuda(), K)
    assert all(field is not None and field.is_cuda for field in found)
    ids, logits, lse, tail = reference.topk(hidden.double() @ weight.double().T, K)
    assert torch.equal(found.indices.cpu().long(), ids)
    for ours, theirs in zip(found[1:], (logits, lse, tail), strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_no_call_waits_for_the_device(memory, inputs, monkeypatch):
    """The launches alone copy to the host and back, because they are interpreted."""
    from triton.runtime import interpreter

    launch = interpreter.GridExecutor.__call__

    def unwatched(self, *args, **kwargs):
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        try:
            return launch(self, *args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode(mode)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", unwatched)
    hidden, weight, *_ = inputs
    x, w = (t.bfloat16().cuda().requires_grad_() for t in (hidden, weight))
    labels, active = torch.zeros(N, dtype=torch.int64, device="cuda"), torch.arange(0, N, 2, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        teacher = vocab_topk(x.detach(), w.detach(), K)
        for outside, stats in (("bucket", True), ("renormalize", False)):
            options = dict(outside=outside, stats=stats, labels=labels, active=active, memory=memory)
            topk_kl(x, w, teacher, chunk_bytes=3 * V * 4, **options).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.grad is not None and x.grad.is_cuda

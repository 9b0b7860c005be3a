"""FlashAttention's operators for sequences of varying length, on the simulated GPU: scores and softmax, written out.

What the kernels refuse is refused: other dtypes than 16 bits, lengths that are not int32 on the device, rows that are
not contiguous, head sizes that are no multiple of 8. Masks are aligned at the lower right, as theirs are.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

_library: Any = None


def register() -> None:
    """Let ``torch.nn.attention.varlen`` find them."""
    global _library
    _library = torch.library.Library("aten", "IMPL")
    _library.impl("_flash_attention_forward", forward, "CUDA")
    _library.impl("_flash_attention_backward", backward, "CUDA")
    torch.backends.cuda.is_flash_attention_available = lambda: True


def without_autocast(function):
    """A kernel computes as it was written, whoever calls it."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        with torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return run


@without_autocast
def forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
    window_size_left=None, window_size_right=None, **unused,
):  # fmt: skip
    """(output [N, H, d], logsumexp [H, N] float32, and three that nobody reads)."""
    check(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k)
    assert not dropout_p and not return_debug_mask and all(one is None for one in unused.values())
    out, lse = torch.empty_like(query), query.new_empty(query.shape[1], len(query), dtype=torch.float32)
    for q, k, sees in sequences(cum_seq_q, cum_seq_k, is_causal, window_size_left, window_size_right, query.device):
        out[q], lse[:, q] = attend(query[q].float(), key[k].float(), value[k].float(), sees, scale)
    nothing = query.new_empty(0)
    return out, lse, nothing, nothing, nothing


@without_autocast
def backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state,
    unused, *, scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    """Gradients of query, key and value."""
    check(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k)
    grads = [torch.zeros_like(one) for one in (query, key, value)]
    scale = scale or 1 / math.sqrt(query.shape[-1])
    groups = query.shape[1] // key.shape[1]
    for q, k, sees in sequences(cum_seq_q, cum_seq_k, is_causal, window_size_left, window_size_right, query.device):
        wide_q, d_out = query[q].float(), grad_out[q].float()
        wide_k, wide_v = (x[k].float().repeat_interleave(groups, 1) for x in (key, value))
        scores = (torch.einsum("nhd,mhd->hnm", wide_q, wide_k) * scale).masked_fill(~sees, -torch.inf)
        p = (scores - logsumexp[:, q, None]).exp()
        own = (d_out * out[q].float()).sum(-1).t()[:, :, None]
        d_scores = p * (torch.einsum("nhd,mhd->hnm", d_out, wide_v) - own) * scale
        grads[0][q] = torch.einsum("hnm,mhd->nhd", d_scores, wide_k)
        for grad, found in (
            (grads[1], torch.einsum("hnm,nhd->mhd", d_scores, wide_q)),
            (grads[2], torch.einsum("hnm,nhd->mhd", p, d_out)),
        ):
            grad[k] = found.unflatten(1, (-1, groups)).sum(2).to(grad.dtype)
    return tuple(grads)


def check(query: Tensor, key: Tensor, value: Tensor, cum_q: Tensor, cum_k: Tensor, max_q: int, max_k: int) -> None:
    for x in (query, key, value):
        assert x.dtype == query.dtype and x.dtype in (torch.float16, torch.bfloat16), x.dtype
        assert x.is_cuda and x.dim() == 3 and x.stride(-1) == 1 and x.shape[-1] == query.shape[-1], x.shape
    assert query.shape[-1] % 8 == 0 and query.shape[-1] <= 256 and query.shape[1] % key.shape[1] == 0
    for lengths, most, tokens in ((cum_q, max_q, len(query)), (cum_k, max_k, len(key))):
        assert lengths.is_cuda and lengths.dtype == torch.int32 and lengths.is_contiguous()
        bounds = on_host(lengths)
        assert bounds[0] == 0 and bounds[-1] == tokens, (bounds, tokens)
        assert most >= max(after - before for before, after in pairwise(bounds))


def on_host(values: Tensor) -> list[int]:
    """int32 values, read where they lie: kernels read them on the device, and nobody waits."""
    return list((ctypes.c_int32 * values.numel()).from_address(values.data_ptr()))


def sequences(
    cum_q: Tensor, cum_k: Tensor, is_causal: bool, left: int | None, right: int | None, device: torch.device
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Queries and keys of each sequence, and [n, m] which keys a query sees."""
    left, right = -1 if left is None else left, 0 if is_causal else -1 if right is None else right
    q, k = on_host(cum_q), on_host(cum_k)
    for (q0, q1), (k0, k1) in zip(pairwise(q), pairwise(k), strict=True):
        n, m = q1 - q0, k1 - k0
        distance = torch.arange(m - n, m, device=device)[:, None] - torch.arange(m, device=device)
        sees = torch.ones_like(distance, dtype=torch.bool)
        if left >= 0:
            sees &= distance <= left
        if right >= 0:
            sees &= distance >= -right
        yield slice(q0, q1), slice(k0, k1), sees


def attend(query: Tensor, key: Tensor, value: Tensor, sees: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """([n, H, d], [H, n]) of one sequence."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.einsum("nhd,mhd->hnm", query, key) * (scale or 1 / math.sqrt(query.shape[-1]))
    scores = scores.masked_fill(~sees, -torch.inf)
    return torch.einsum("hnm,mhd->nhd", scores.softmax(-1), value), scores.logsumexp(-1)

"""Attention over packed sequences: block-diagonal, causal, never a [N, N] mask.

transformers calls whatever is registered under ``config._attn_implementation``. Ours does three things:

* with cumulative lengths (a packed batch) on a CUDA device, in half precision: FlashAttention's kernel for sequences of
  varying length, by ``torch.nn.attention.varlen``;
* with them elsewhere it gathers each sequence into a row of [S, H, Lmax, d], runs the causal SDPA kernel, and scatters
  the rows back. Padding exists only inside attention, where it costs S·Lmax² instead of the N² of a block-diagonal
  mask, and no mask is built at all;
* without them (generation: left-padded, KV-cached) it is transformers' own SDPA attention and mask.

Under context parallelism a sequence's queries are its last tokens alone, and its keys come from all ranks
(``fastkd.context_parallel``). "Causal" is aligned at the lower right: the last query sees the last key.

Trap: given flat tokens without lengths, transformers treats them as ONE sequence, with no warning and errors of
order one. Every packed model call therefore goes through ``fastkd.models.packed_hidden``.

Letters: N packed tokens, M their keys, S sequences, H heads, L longest sequence, d head size.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "fastkd_packed"

# Above this ratio of padded to real tokens one long sequence among short ones would make padding cost more than
# it saves; sequences are then attended one by one.
_MAX_PADDING = 2.0

# Queries that share one mask, where a mask is needed: it has this many rows, however long the sequence is.
_BLOCK = 512

# torch 2.11 asks for as many key heads as query heads.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def packed_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """The attention function that transformers calls; see the module docstring.

    Args:
        query: [B, H, N, d]; key, value: [B, Hkv, N, d]. B is 1 for packed calls.

    Returns:
        ([B, N, H, d], None), as transformers expects.
    """
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if cu_seqlens is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    query_NHd, key_MHd, value_MHd = (x[0].transpose(0, 1) for x in (query, key, value))
    elsewhere: dict[str, Any] = {}
    if (context := kwargs.get("packed_context")) is not None:
        key_MHd, value_MHd = context.keys(key_MHd, value_MHd)
        elsewhere = {"key_lengths": context.lengths, "key_cu_seqlens": context.cu_seqlens}
    out_NHd = attend_packed(
        query_NHd,
        key_MHd,
        value_MHd,
        lengths=kwargs["packed_lengths"],
        cu_seqlens=cu_seqlens,
        scale=scaling,
        window=kwargs.get("sliding_window"),
        **elsewhere,
    )
    return out_NHd[None], None


def attend_packed(
    query_NHd: Tensor,
    key_MHd: Tensor,
    value_MHd: Tensor,
    *,
    lengths: tuple[int, ...],
    cu_seqlens: Tensor,
    key_lengths: tuple[int, ...] | None = None,
    key_cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal attention within each packed sequence.

    Args:
        query_NHd: [N, H, d]; key_MHd, value_MHd: [M, Hkv, d] with Hkv dividing H.
        lengths: [S] queries of each sequence, on the host; they add up to N.
        cu_seqlens: [S + 1] int32, their cumulative sums.
        key_lengths: [S] keys of each sequence, at least its queries, which are its last tokens; they add up to M.
            None: every token is a query.
        key_cu_seqlens: [S + 1] int32, their cumulative sums; given with ``key_lengths``.
        scale: multiplies the scores; 1/sqrt(d) when None.
        window: each token sees itself and the window - 1 tokens before it (sliding-window models).

    Returns:
        [N, H, d].
    """
    if key_lengths is None or key_cu_seqlens is None:
        key_lengths, key_cu_seqlens = lengths, cu_seqlens
    longest = max(key_lengths)
    if window is not None and window >= longest:
        window = None
    if _flash_runs(query_NHd):
        return _flash(
            query_NHd, key_MHd, value_MHd, cu_seqlens, key_cu_seqlens, max(lengths), longest, scale, window
        )  # fmt: skip
    if key_lengths != lengths or len(lengths) * longest > _MAX_PADDING * sum(lengths):
        parts = [
            _attend(q[None], k[None], v[None], scale, window)[0]
            for q, k, v in zip(
                query_NHd.split(lengths), key_MHd.split(key_lengths), value_MHd.split(key_lengths), strict=True
            )
        ]
        return torch.cat(parts)
    device, total = query_NHd.device, query_NHd.shape[0]
    starts_S = cu_seqlens[:-1]
    rows_SL = starts_S[:, None] + torch.arange(longest, device=device)
    # Rows past the end of a sequence read a neighbour: causality hides them from every real query, and what
    # they compute is dropped below. Only those of the last sequences could run past N.
    rows_SL = rows_SL.clamp_(max=total - 1)
    out_SLHd = _attend(query_NHd[rows_SL], key_MHd[rows_SL], value_MHd[rows_SL], scale, window)
    # Back to the real rows by index: a boolean mask would wait for the device.
    shift_S = torch.arange(len(lengths), device=device) * longest - starts_S
    shift_N = torch.repeat_interleave(shift_S, cu_seqlens.diff(), output_size=total)
    return out_SLHd.flatten(0, 1)[torch.arange(total, device=device) + shift_N]


def _attend(query_SNHd: Tensor, key_SMHd: Tensor, value_SMHd: Tensor, scale: float | None, window: int | None):
    """S sequences of one length, N queries each; they are the last of its M keys' tokens."""
    query, key, value = (x.transpose(1, 2) for x in (query_SNHd, key_SMHd, value_SMHd))
    queries, keys = query.shape[2], key.shape[2]
    options: dict[str, Any] = {"scale": scale, "enable_gqa": key.shape[1] != query.shape[1]}
    if window is None and queries == keys:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, **options).transpose(1, 2)
    blocks = []
    for first in range(0, queries, _BLOCK):
        last = min(first + _BLOCK, queries)
        # Of the keys, those from the first that the block's first query sees to the last that its last query sees.
        here = torch.arange(keys - queries + first, keys - queries + last, device=query.device)
        start, end = 0 if window is None else max(keys - queries + first - window + 1, 0), keys - queries + last
        distance = here[:, None] - torch.arange(start, end, device=query.device)
        mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        blocks.append(
            F.scaled_dot_product_attention(
                query[:, :, first:last], key[:, :, start:end], value[:, :, start:end], attn_mask=mask, **options
            )
        )
    return torch.cat(blocks, 2).transpose(1, 2)


def _flash_runs(query: Tensor) -> bool:
    """Whether torch's FlashAttention takes these heads: half precision, and a head size it can also differentiate."""
    if not query.is_cuda or not torch.backends.cuda.is_flash_attention_available():
        return False
    size = query.shape[-1]
    return (
        _compute_dtype(query) in (torch.float16, torch.bfloat16)
        and size % 8 == 0
        and (size <= 192 or size == 256)
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _flash(query, key, value, cu_seqlens, key_cu_seqlens, longest: int, longest_key: int, scale, window):
    dtype = _compute_dtype(query)
    if not _GROUPED and (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    # (left, right): tokens before and after itself that a query sees; -1 is all of them.
    sees = (-1 if window is None else window - 1, 0)
    out: Any = varlen_attn(
        query.to(dtype), key.to(dtype), value.to(dtype), cu_seqlens, key_cu_seqlens, longest, longest_key,
        scale=scale, window_size=sees, **_GROUPED,
    )  # fmt: skip
    return out


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype autocast would give attention: the operator behind ``varlen_attn`` does not ask it."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _mask(*args, attention_mask=None, **kwargs):
    # No padding mask means a packed call (generation always passes one): the mask is implied by the lengths.
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, _mask)

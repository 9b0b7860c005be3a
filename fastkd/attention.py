"""Attention over packed sequences: block-diagonal, causal, never a [N, N] mask.

transformers calls whatever is registered under ``config._attn_implementation``. Ours does two things:

* with cumulative lengths (a packed batch) it gathers each sequence into a row of [S, H, Lmax, d], runs the causal
  SDPA kernel, and scatters the rows back. Padding exists only inside attention, where it costs
  S·Lmax² instead of the N² of a block-diagonal mask, and no mask is built at all;
* without them (generation: left-padded, KV-cached) it is transformers' own SDPA attention and mask.

Trap: given flat tokens without lengths, transformers treats them as ONE sequence, with no warning and errors of
order one. Every packed model call therefore goes through ``fastkd.models.packed_hidden``.

Letters: N packed tokens, S sequences, H heads, L longest sequence, d head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "fastkd_packed"

# Above this ratio of padded to real tokens one long sequence among short ones would make padding cost more than
# it saves; sequences are then attended one by one.
_MAX_PADDING = 2.0


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
    out_NHd = attend_packed(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        lengths=kwargs["packed_lengths"],
        cu_seqlens=cu_seqlens,
        scale=scaling,
        window=kwargs.get("sliding_window"),
    )
    return out_NHd[None], None


def attend_packed(
    query_NHd: Tensor,
    key_NHd: Tensor,
    value_NHd: Tensor,
    *,
    lengths: tuple[int, ...],
    cu_seqlens: Tensor,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal attention within each packed sequence.

    Args:
        query_NHd: [N, H, d]; key_NHd, value_NHd: [N, Hkv, d] with Hkv dividing H.
        lengths: [S] tokens of each sequence, on the host; they add up to N.
        cu_seqlens: [S + 1] int32, their cumulative sums.
        scale: multiplies the scores; 1/sqrt(d) when None.
        window: each token sees itself and the window - 1 tokens before it (sliding-window models).

    Returns:
        [N, H, d].
    """
    longest = max(lengths)
    if window is not None and window >= longest:
        window = None
    if len(lengths) * longest > _MAX_PADDING * sum(lengths):
        parts = [
            _attend(q[None], k[None], v[None], scale, window)[0]
            for q, k, v in zip(query_NHd.split(lengths), key_NHd.split(lengths), value_NHd.split(lengths), strict=True)
        ]
        return torch.cat(parts)
    device, total = query_NHd.device, query_NHd.shape[0]
    starts_S = cu_seqlens[:-1]
    rows_SL = starts_S[:, None] + torch.arange(longest, device=device)
    # Rows past the end of a sequence read a neighbour: causality hides them from every real query, and what
    # they compute is dropped below. Only those of the last sequences could run past N.
    rows_SL = rows_SL.clamp_(max=total - 1)
    out_SLHd = _attend(query_NHd[rows_SL], key_NHd[rows_SL], value_NHd[rows_SL], scale, window)
    # Back to the real rows by index: a boolean mask would wait for the device.
    shift_S = torch.arange(len(lengths), device=device) * longest - starts_S
    shift_N = torch.repeat_interleave(shift_S, cu_seqlens.diff(), output_size=total)
    return out_SLHd.flatten(0, 1)[torch.arange(total, device=device) + shift_N]


def _attend(query_SLHd, key_SLHd, value_SLHd, scale: float | None, window: int | None) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query_SLHd, key_SLHd, value_SLHd))
    mask = None
    if window is not None:
        distance = torch.arange(query.shape[2], device=query.device)
        distance = distance[:, None] - distance
        mask = (distance >= 0) & (distance < window)
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return out.transpose(1, 2)


def _mask(*args, attention_mask=None, **kwargs):
    # No padding mask means a packed call (generation always passes one): the mask is implied by the lengths.
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, _mask)

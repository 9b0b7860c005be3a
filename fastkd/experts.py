"""Mixture-of-experts blocks: each token goes through the few experts that its router chose, as grouped matrix products.

Rows (a token, one of its experts) are sorted by expert, so that each expert multiplies one piece of them:

    y_n = Σ_k p_nk · down_e(act(gate_e x_n) ⊙ up_e x_n),    e = chosen_nk.

The product is torch's grouped matmul on CUDA in bfloat16, and one matrix product per expert elsewhere. transformers
calls this wherever ``adopt`` said so: in training, scoring and generation, sharded or not. Against its own version:
under autocast the products have autocast's dtype, and every gradient is a sum in a fixed order, so that a step can be
repeated bit for bit. With an ``exchange`` (``fastkd.expert_parallel``) rows travel to the ranks that hold their
experts.

No balancing loss is added: the divergence is the objective, and a router that is distilled follows its teacher's data.

Letters: N tokens, K experts of a token, E experts, L of them on this rank, M rows on this rank, D hidden, F width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "fastkd_grouped"
FUSED = ("gate_up_proj", "down_proj")
"""Parameters of an experts module: [E, 2F, D], the gate's rows first, and [E, D, F]."""


def experts_of(causal_lm: Any) -> Iterator[tuple[str, Any]]:
    """(name, module) of every module that holds the experts of a block in fused tensors."""
    for name, module in causal_lm.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if all(one in own and own[one].dim() == 3 for one in FUSED) and hasattr(module, "num_experts"):
            yield name, module


def is_plain(module: Any) -> bool:
    """Whether an experts module computes the formula above: no biases, no norms, nothing transposed or interleaved."""
    return (
        all(getattr(module, name, False) for name in ("has_gate", "is_concatenated"))
        and not any(getattr(module, name, False) for name in ("has_bias", "is_transposed", "has_post_expert_norm"))
        and {name for name, _ in module.named_parameters(recurse=False)} == set(FUSED)
    )


def adopt(causal_lm: Any) -> None:
    """Have the experts of a transformers model computed here, in place. A model without experts, or with experts of
    another kind, stays as it is."""
    found = [module for _, module in experts_of(causal_lm)]
    if found and all(map(is_plain, found)):
        causal_lm.set_experts_implementation(NAME)


@torch.compiler.disable
def grouped_experts(module: Any, hidden_ND: Tensor, chosen_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """What transformers calls: the weighted sum of the chosen experts' outputs.

    Args:
        module: holds the experts, or this rank's of them and an ``exchange``.
        hidden_ND: [N, D].
        chosen_NK: [N, K] integers below E.
        weights_NK: [N, K].

    Returns:
        [N, D] in the dtype of ``hidden_ND``.
    """
    N, K = chosen_NK.shape
    chosen = chosen_NK.reshape(-1)
    order = chosen.argsort(stable=True)
    # Not bincount: on CUDA it waits for the device.
    counts_E = torch.zeros(module.num_experts, dtype=torch.int64, device=chosen.device)
    counts_E.scatter_add_(0, chosen, torch.ones_like(chosen))
    rows = permute(hidden_ND, order, copies=K)
    exchange = getattr(module, "exchange", None)
    if exchange is None:
        out = expert_mlp(module, rows, counts_E)
    else:
        out = exchange(rows, counts_E, lambda rows, counts_L: expert_mlp(module, rows, counts_L))
    out_NKD = permute(out, inverse(order)).view(N, K, -1)
    # One product of [1, K] and [K, D] per token: it accumulates in float32 and keeps no weighted copy.
    summed = torch.bmm(weights_NK[:, None].to(out_NKD.dtype), out_NKD)[:, 0]
    # A copy: FSDP hangs its backward hook on the output, and could lose it if that were a view.
    return summed.to(hidden_ND.dtype, copy=True)


def expert_mlp(module: Any, rows_MD: Tensor, counts_L: Tensor) -> Tensor:
    """[M, D]: every row through its expert.

    Args:
        rows_MD: sorted by expert.
        counts_L: [L] int64, rows of each.
    """
    gate_up, down = (_local(getattr(module, name)) for name in FUSED)
    sizes: Any = counts_L.cumsum(0).int() if _has_kernel(rows_MD, gate_up) else counts_L.tolist()
    first, second = _products(module)
    return second(module._apply_gate(first(rows_MD, gate_up, sizes)), down, sizes)


def _products(module: Any) -> list[Callable[[Tensor, Tensor, Any], Tensor]]:
    """What multiplies with each fused tensor: with quantisers (``fastkd.quantization``), of NVFP4 values."""
    quantizers = getattr(module, "quantizers", None)
    if quantizers is None:
        return [grouped_linear] * len(FUSED)
    return [partial(quantizers[own], first=getattr(module, "first_expert", 0)) for own in FUSED]


def grouped_linear(x_MI: Tensor, weight_LOI: Tensor, sizes: Any) -> Tensor:
    """[M, O]: x_m Wᵀ with the W of its group.

    Args:
        x_MI: [M, I], sorted by group.
        weight_LOI: [L, O, I].
        sizes: rows of each group as a list, or, for torch's kernel, where each ends ([L] int32).
    """
    x, weight = compute_dtype(x_MI), compute_dtype(weight_LOI)
    if isinstance(sizes, Tensor):
        return F.grouped_mm(x, weight.transpose(-2, -1), offs=sizes)
    pieces = zip(x.split(sizes), weight.unbind(0), strict=True)
    return torch.cat([F.linear(piece, one) for piece, one in pieces])


def compute_dtype(x: Tensor) -> Tensor:
    """``x`` as autocast would have it: neither grouped matmul nor quantisation is one of its operators."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped matmul takes these: bfloat16 on CUDA, rows of a multiple of 16 bytes, and some rows."""
    if not x.is_cuda or not x.shape[0] or torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else weight.dtype
    outputs, inputs = weight.shape[1:]  # of gate and up: down has half as many inputs
    return dtype == torch.bfloat16 and outputs % 16 == 0 and inputs % 8 == 0


def held(tensor: Tensor) -> slice:
    """Which experts this rank holds of a fused tensor, or rows of."""
    if not isinstance(tensor, DTensor):
        return slice(0, tensor.shape[0])
    if not tensor.to_local().numel():
        return slice(0, 0)
    (chunk,) = tensor.__create_chunk_list__()  # how torch.distributed.checkpoint asks
    return slice(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0])


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


# ---------------------------------------------------------------- rows


def permute(x: Tensor, order: Tensor, *, copies: int = 1) -> Tensor:
    """Row ``order[i] // copies`` of ``x`` at place i.

    Args:
        x: [N, D].
        order: [N · copies], a permutation.
    """
    return _Permute.apply(x, order, copies)  # type: ignore


def inverse(order: Tensor) -> Tensor:
    """The permutation that undoes ``order``."""
    undone = torch.empty_like(order)
    undone[order] = torch.arange(len(order), device=order.device)
    return undone


class _Permute(torch.autograd.Function):
    # Its own gradient: that of indexing adds with atomics on CUDA, in an order that changes from run to run.
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.copies = copies
        return x.index_select(0, order if copies == 1 else order.div(copies, rounding_mode="floor"))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (order,) = ctx.saved_tensors
        gradient = gradients[0].index_select(0, inverse(order))
        return gradient if ctx.copies == 1 else gradient.unflatten(0, (-1, ctx.copies)).sum(1), None, None


ALL_EXPERTS_FUNCTIONS.register(NAME, grouped_experts)

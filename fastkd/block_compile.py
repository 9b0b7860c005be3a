"""torch.compile, one block at a time, for packed batches of ever new lengths.

Compiling blocks and not the model keeps compile time independent of the depth, and leaves FSDP's hooks outside.
Packed attention stays eager: it reads the lengths of the sequences on the host. The lengths must not even pass through
the compiled code, which is compiled anew for every number of sequences otherwise: a block hands them to its
attention around it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from fastkd import attention

_NAME = "fastkd_packed_eager"
_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "packed_lengths", "packed_context")


@torch.compiler.disable
def _attend(module: Any, *args: Any, **kwargs: Any) -> Any:
    return attention.packed_attention(module, *args, **kwargs, **module.packing)


def compile_blocks(causal_lm: Any, backend: str = "inductor") -> None:
    """Compile every block of ``causal_lm``, in place, on its first call."""
    # All blocks share one function's graphs; modes, adapters on and off, and the first block's input make variants.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)  # pyright: ignore
    for block in causal_lm.base_model.layers:
        _compile(block, backend)
    causal_lm.config.get_text_config()._attn_implementation = _NAME


def _compile(block: nn.Module, backend: str) -> None:
    compiled = torch.compile(block.forward, backend=backend)
    attention_module: Any = block.self_attn

    def forward(*args: Any, **kwargs: Any) -> Any:
        # Set on every call: recomputation in backward calls the block again, with the lengths of its own batch.
        attention_module.packing = {name: kwargs.pop(name) for name in _PACKING if name in kwargs}
        return compiled(*args, **kwargs)

    block.forward = forward


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, AttentionMaskInterface()[attention.NAME])

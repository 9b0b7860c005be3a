"""LoRA: the student trains low-rank adapters over a frozen base (Hu et al. 2021).

A chosen linear layer computes

    y = W x + bias + s · B A dropout(x),    s = alpha / r,    A [r, inputs], B [outputs, r],

with W and bias frozen. A starts random and B at zero, so training starts at the base. ``apply`` adds A and B as
parameters ``lora_A`` and ``lora_B`` of the layer itself. So they are sharded with it: a tensor-parallel style cuts them
as it cuts W (``fastkd.tensor_styles``), and FSDP holds them in the block's unit.

* The base is the teacher of self-distillation: inside ``disabled`` the forward is the base's, bit for bit, and costs no
  second copy of the weights.
* The LM head is frozen, so the fused loss computes no gradient for it: two matrix products instead of three.
* Split layers need no further collective for activations. The gradients of A (layers split by outputs) and of B (split
  by inputs) are terms of a sum over the group; each is reduced once per backward, r · inputs or r · outputs elements.
* Dropout masks come from a counter, not from the random state of a rank: ranks that share an input drop the same
  values, and recomputation drops what forward dropped. So run backward before the next forward.

Letters: r rank of an adapter.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from fastkd.config import LoRA
from fastkd.lora_choice import choose

NAMES = ("lora_A", "lora_B")


class Adapters:
    """What the adapters of one model share."""

    def __init__(self, config: LoRA):
        self.config = config
        self.on = True
        self.seed = 0
        self.step = 0
        self.calls = 0
        """Forward passes of this step, counted for dropout."""
        self.ranks = (0, 0)
        """Of dp and cp: they see other tokens."""

    @property
    def scale(self) -> float:
        """s = alpha / r."""
        return self.config.alpha / self.config.dim


class Term:
    """Adds s · B A dropout(x) to the output of one layer."""

    def __init__(self, name: str, adapters: Adapters):
        self.name, self.adapters = name, adapters

    def __call__(
        self, out: Tensor, x: Tensor, A: Tensor, B: Tensor, *, inputs: int = 0, outputs: int = 0, training: bool
    ) -> Tensor:
        """``out`` plus the adapter's term, or ``out`` itself while adapters are off.

        Args:
            out: [..., outputs] what the base computes.
            x: [..., inputs] its input.
            A: [r, inputs].
            B: [outputs, r].
            inputs, outputs: which part of the layer's inputs and outputs these are, when ranks hold parts.
            training: whether dropout applies.
        """
        adapters = self.adapters
        if not adapters.on:
            return out
        dropout = adapters.config.dropout if training else 0.0
        before = adapters.config.dropout_position == "pre"
        if dropout and before:
            x = _drop(x, dropout, self, inputs)
        term = F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype)) * adapters.scale
        if dropout and not before:
            term = _drop(term, dropout, self, outputs)
        return out + term


@torch.compiler.disable()
def _drop(x: Tensor, share: float, term: Term, part: int) -> Tensor:
    adapters = term.adapters
    seed = _seed(adapters.seed, adapters.step, adapters.calls, *adapters.ranks, term.name, part)
    make = torch.Generator(x.device).manual_seed(seed)
    return x * torch.empty_like(x).bernoulli_(1.0 - share, generator=make).div_(1.0 - share)


def _seed(*parts: Any) -> int:
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")


class AdaptedLinear(nn.Linear):
    """A linear layer with an adapter, not split over ranks. ``apply`` makes an ``nn.Linear`` one."""

    lora: Term
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        """W x + bias + s · B A dropout(x)."""
        out = F.linear(input, self.weight, self.bias)
        return self.lora(out, input, self.lora_A, self.lora_B, training=self.training)


# ---------------------------------------------------------------- adding them


def apply(causal_lm: Any, config: LoRA, *, seed: int = 0, dtype: torch.dtype | None = None) -> list[str]:
    """Freeze ``causal_lm`` and give its chosen layers adapters, in place. Call it before ``parallel.shard``.

    Adapters of a materialised model are initialised. On meta, call :func:`initialise` once there are values.

    Args:
        causal_lm: a transformers causal language model, not sharded.
        config: which layers, rank, scale.
        seed: of A and of dropout.
        dtype: of A and B. Default: the layer's, but at least float32, so that no small update is lost.

    Returns:
        Names of the adapted layers.

    Raises:
        ModelError: a name in the recipe matches nothing, or no layer is left, or one is not a plain linear layer.
    """
    names = choose(causal_lm, config)
    causal_lm.requires_grad_(False)
    adapters = Adapters(config)
    for name in names:
        layer = causal_lm.get_submodule(name)
        weight = layer.weight
        own = dtype or torch.promote_types(weight.dtype, torch.float32)
        layer.lora_A = nn.Parameter(torch.empty(config.dim, layer.in_features, dtype=own, device=weight.device))
        layer.lora_B = nn.Parameter(torch.empty(layer.out_features, config.dim, dtype=own, device=weight.device))
        layer.lora = Term(name, adapters)
        layer.__class__ = AdaptedLinear
    causal_lm.fastkd_adapters = adapters
    adapters.seed = seed
    if config.dropout:
        _count_calls(causal_lm, adapters)
    if not any(parameter.is_meta for parameter in causal_lm.parameters()):
        initialise(causal_lm, seed)
    return names


def _count_calls(causal_lm: Any, adapters: Adapters) -> None:
    def count(*_: Any) -> None:
        # Not in passes without gradient: the teacher's may lie between a forward and its backward.
        if adapters.on and torch.is_grad_enabled():
            adapters.calls += 1
            layout = getattr(causal_lm, "fastkd_layout", None)
            if layout is not None:
                adapters.ranks = tuple(layout.mesh[name].get_local_rank() for name in ("dp", "cp"))

    causal_lm.base_model.register_forward_pre_hook(count)


@torch.no_grad()
def initialise(causal_lm: Any, seed: int) -> None:
    """Starting values: A random, B zero. Equal on every sharding and every number of ranks; all ranks call it.

    A is uniform in ±1/√inputs (Kaiming with a = √5, as in PEFT) or Xavier normal, as the recipe says.
    """
    adapters = adapters_of(causal_lm)
    adapters.seed = seed
    for name, layer in adapted_layers(causal_lm):
        make = torch.Generator().manual_seed(_seed(seed, name))
        values = torch.empty(adapters.config.dim, layer.in_features)
        if adapters.config.lora_A_init == "xavier":
            nn.init.xavier_normal_(values, generator=make)
        else:
            nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=make)
        A, B = layer.lora_A, layer.lora_B
        if isinstance(A, DTensor):
            values = distribute_tensor(values, A.device_mesh, A.placements, src_data_rank=None).to_local()
            A, B = A.to_local(), B.to_local()
        A.copy_(values)
        B.zero_()


# ---------------------------------------------------------------- using them


def has_adapters(causal_lm: Any) -> bool:
    """Whether :func:`apply` was called on this model."""
    return getattr(causal_lm, "fastkd_adapters", None) is not None


def adapters_of(causal_lm: Any) -> Adapters:
    """What :func:`apply` left on the model."""
    return causal_lm.fastkd_adapters


def adapted_layers(causal_lm: Any) -> Iterator[tuple[str, Any]]:
    """(name, layer) of every layer with an adapter, sharded or not."""
    for name, module in causal_lm.named_modules():
        if isinstance(module, AdaptedLinear):
            yield name, module


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's: the files of the base do not hold it."""
    return name.rpartition(".")[2] in NAMES


@contextmanager
def disabled(causal_lm: Any) -> Iterator[None]:
    """Inside, the model is its frozen base. A model without adapters stays as it is.

    Backward of a forward that was run outside must be run outside.
    """
    if not has_adapters(causal_lm):
        yield
        return
    adapters = adapters_of(causal_lm)
    before, adapters.on = adapters.on, False
    try:
        yield
    finally:
        adapters.on = before


def set_step(causal_lm: Any, step: int) -> None:
    """Start a new optimizer step: dropout masks depend on its number, so that a resumed run draws the same."""
    adapters = adapters_of(causal_lm)
    adapters.step, adapters.calls = step, 0

"""How one module is split over a tensor-parallel group: parameters as DTensors, arithmetic on plain tensors.

FSDP, checkpoints and optimizers understand DTensors. The arithmetic uses explicit collectives instead: torch's own
styles run every operator through DTensor dispatch, which costs more than a small layer itself, and which torch.compile
cannot trace when the number of tokens varies (torch 2.13).

* ``Columns``, ``Rows``: linear layers split by outputs and by inputs (Shoeybi et al. 2019, "Megatron-LM").
* ``SharedInput``: q, k and v (gate and up) read one input. It is gathered once, and its gradient is summed once.
* ``Norm``: its input may be a part (some heads, some tokens). Then its weight gradient is one term of a sum. Left
  alone it is wrong by about its own size, while the loss and every other gradient are right.
* ``OneHead``: with fewer key/value heads than ranks, k_proj and v_proj are replicated, each rank computes the one head
  that its queries use, and their gradients are summed over the group.
* ``Embedding``: rows of the vocabulary, unevenly when they do not divide.

``sp`` is sequence parallelism (Korthikanti et al. 2022, "Reducing Activation Recomputation"): between the blocks each
rank holds N / R tokens, and all-reduces become pairs of all-gather and reduce-scatter.

Letters: N tokens, D hidden, V vocabulary, R ranks of the group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Placement, Replicate, Shard, distribute_tensor

from fastkd.collectives import move
from fastkd.errors import ModelError


def vocab_shard(rows: int, mesh: DeviceMesh) -> tuple[int, int]:
    """First row and number of rows that this rank holds of ``rows``, as DTensor's Shard(0) cuts them."""
    each = -(-rows // mesh.size())
    start = min(mesh.get_local_rank() * each, rows)
    return start, min(each, rows - start)


# ---------------------------------------------------------------- between the residual stream and a split layer


def _share(hidden: Tensor, sp: bool, mesh: DeviceMesh) -> Tensor:
    """From the residual stream into a split layer: all tokens, and a gradient summed over the ranks."""
    return move(hidden, "gather" if sp else "keep", "scatter" if sp else "sum", 1, mesh)


def _join(terms: Tensor, sp: bool, mesh: DeviceMesh) -> Tensor:
    """From a split layer to the residual stream: the sum over the ranks, or this rank's tokens of it."""
    return move(terms, "scatter" if sp else "sum", "gather" if sp else "keep", 1, mesh)


# ---------------------------------------------------------------- what is done to a module


class Style:
    """Splits one module over a group: its parameters become DTensors, its forward works on this rank's part."""

    def apply(self, module: Any, mesh: DeviceMesh) -> None:
        """Change ``module`` in place."""
        raise NotImplementedError


def _distribute(module: nn.Module, mesh: DeviceMesh, **placements: Placement) -> None:
    """Turn parameters into DTensors, each rank keeping its part of what it holds already."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        data = distribute_tensor(parameter.detach(), mesh, [placements[name]], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(data, requires_grad=parameter.requires_grad))


def _local(parameter: Any, *, partial: bool = False) -> Any:
    """This rank's part; ``partial``: its gradient is one term of a sum over the group."""
    return None if parameter is None else parameter.to_local(grad_placements=[Partial()] if partial else None)


def _linear(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, of quantised values where the layer has a quantiser (``fastkd.quantization``)."""
    quantizer = getattr(module, "quantizer", None)
    return F.linear(x, weight, bias) if quantizer is None else quantizer(module, x, weight, bias)


def _adapted(module: Any, out: Tensor, x: Tensor, rows: slice = slice(None), **parts: int) -> Tensor:
    """``out`` plus this rank's part of the layer's adapter (``fastkd.lora``), if it has one.

    What is replicated of A and B multiplies a part of the layer, so its gradient is one term of a sum.
    """
    if getattr(module, "lora", None) is None:
        return out
    A, B = (_local(one, partial=one.placements[0].is_replicate()) for one in (module.lora_A, module.lora_B))
    return module.lora(out, x, A, B[rows], training=module.training, **parts)


class Columns(Style):
    """A linear layer split by outputs. Its input is whole, and ``SharedInput`` sums the input's gradient."""

    def __init__(self, *, gather_output: bool = False):
        self.gather_output = gather_output

    def apply(self, module: Any, mesh: DeviceMesh) -> None:
        if self.gather_output and module.weight.shape[0] % mesh.size():
            raise ModelError(
                "model",
                f"a layer of {module.weight.shape[0]} outputs must be gathered from {mesh.size()} equal parts",
                "Use a tensor_parallel_size that divides it",
            )
        _distribute(module, mesh, weight=Shard(0), bias=Shard(0), lora_A=Replicate(), lora_B=Shard(0))
        part = mesh.get_local_rank()

        def forward(hidden: Tensor) -> Tensor:
            out = _linear(module, hidden, _local(module.weight), _local(module.bias))
            out = _adapted(module, out, hidden, outputs=part)
            return move(out, "gather", "slice", -1, mesh) if self.gather_output else out

        module.forward = forward


class Rows(Style):
    """A linear layer split by inputs; the ranks' results are summed."""

    def __init__(self, sp: bool, *, split_input: bool = False):
        self.sp, self.split_input = sp, split_input

    def apply(self, module: Any, mesh: DeviceMesh) -> None:
        _distribute(module, mesh, weight=Shard(1), bias=Replicate(), lora_A=Shard(1), lora_B=Replicate())
        part = mesh.get_local_rank()

        def forward(x: Tensor) -> Tensor:
            if self.split_input:
                x = move(x, "slice", "gather", -1, mesh)
            out = _adapted(module, _linear(module, x, _local(module.weight)), x, inputs=part)
            out = _join(out, self.sp, mesh)
            return out if module.bias is None else out + _local(module.bias, partial=self.sp)

        module.forward = forward


class OneHead(Style):
    """k_proj or v_proj with fewer heads than ranks: replicated, and each rank computes the head of its queries."""

    def __init__(self, kv_heads: int):
        self.kv_heads = kv_heads

    def apply(self, module: Any, mesh: DeviceMesh) -> None:
        whole = Replicate()
        _distribute(module, mesh, weight=whole, bias=whole, lora_A=whole, lora_B=whole)
        head, size = mesh.get_local_rank() * self.kv_heads // mesh.size(), module.weight.shape[0] // self.kv_heads
        rows = slice(head * size, (head + 1) * size)

        def forward(hidden: Tensor) -> Tensor:
            bias = None if module.bias is None else _local(module.bias, partial=True)[rows]
            out = _linear(module, hidden, _local(module.weight, partial=True)[rows], bias)
            return _adapted(module, out, hidden, rows, outputs=head)

        module.forward = forward


class SharedInput(Style):
    """An attention or MLP module whose linear layers read one input."""

    def __init__(self, sp: bool):
        self.sp = sp

    def apply(self, module: Any, mesh: DeviceMesh) -> None:
        inner = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if args:
                return inner(_share(args[0], self.sp, mesh), *args[1:], **kwargs)
            return inner(**kwargs | {"hidden_states": _share(kwargs["hidden_states"], self.sp, mesh)})

        module.forward = forward


class Norm(Style):
    """A replicated norm, or router. ``partial``: its input is this rank's part of the heads or tokens."""

    def __init__(self, *, partial: bool):
        self.partial = partial

    def apply(self, module: Any, mesh: DeviceMesh) -> None:
        _distribute(module, mesh, weight=Replicate(), bias=Replicate())
        formula = type(module).forward

        def forward(hidden: Tensor) -> Tensor:
            return formula(_WithLocalWeight(module, _local(module.weight, partial=self.partial)), hidden)

        module.forward = forward


class _WithLocalWeight:
    """Stands for a norm or router in its own forward, with a plain tensor for its weight."""

    def __init__(self, module: Any, weight: Tensor):
        self.module, self.weight = module, weight

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class Embedding(Style):
    """Rows of the vocabulary: each rank looks up the ids it holds, and the results are summed."""

    def __init__(self, sp: bool):
        self.sp = sp

    def apply(self, module: Any, mesh: DeviceMesh) -> None:
        _distribute(module, mesh, weight=Shard(0))
        start, count = vocab_shard(module.weight.shape[0], mesh)
        padding = module.padding_idx  # this id's row gets no gradient here
        padding = padding - start if padding is not None and start <= padding < start + count else None

        def forward(ids: Tensor) -> Tensor:
            ids = ids - start
            elsewhere = (ids < 0) | (ids >= count)
            rows = F.embedding(ids.masked_fill(elsewhere, 0), _local(module.weight), padding)
            rows = rows.masked_fill(elsewhere[..., None], 0.0)
            if getattr(module, "embed_scale", None) is not None:  # Gemma 3
                rows = rows * torch.as_tensor(module.embed_scale).to(rows)
            # A copy: FSDP hangs its backward hook on the output, and could lose it if that were a view.
            return _join(rows, self.sp, mesh).clone()

        module.forward = forward

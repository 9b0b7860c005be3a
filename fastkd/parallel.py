"""Sharding: the only place that knows how a model is spread over ranks.

A mesh has the dimensions dp (other sequences), cp (parts of one sequence) and tp (parts of every layer). ``shard``
turns a model inside its root module (whose forward returns the loss) into a sharded one, in place:

* cp: every batch is cut by ``local_batch``, and attention gathers keys and values (``fastkd.context_parallel``);
* tp: the model's own plan (``fastkd.tensor_plan``), embedding and head split by vocabulary rows;
* experts: whole ones, over ranks of all three dimensions (``fastkd.expert_parallel``);
* dp × cp: FSDP2, a unit per block, compute in ``param_dtype``, gradients reduced in float32;
* recompute, compile and CPU offload per block.

**Gradients are summed over ranks, never averaged**: the loss divides by the tokens of the whole global batch. So the
gradient, its norm and the updated weights do not depend on the mesh.

**The head's weight is used in the head's forward** (``through_head``): FSDP gathers a unit when its forward is called,
and only then. The unit is the head alone; with tied weights it is embedding, final norm and head, because a parameter
belongs to one unit.

Parameters are DTensors afterwards. Take ``root.parameters()`` for the optimizer after ``shard``, before any forward.

Letters: N tokens, D hidden, V vocabulary, Vl rows of it on this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from fastkd import block_compile
from fastkd import expert_parallel as experts
from fastkd.batch import Batch, pad
from fastkd.collectives import gather
from fastkd.context_parallel import split
from fastkd.errors import UserError
from fastkd.tensor_plan import apply_plan, check_tensor_parallel
from fastkd.tensor_styles import vocab_shard

KEY = "policy.dtensor_cfg"
Out = TypeVar("Out")


@dataclass(frozen=True, slots=True)
class HeadShard:
    """This rank's rows of the LM head: what ``topk_kl`` and ``vocab_topk`` need to know of the sharding."""

    weight: Tensor
    """[Vl, D], a plain tensor; differentiable."""
    vocab_start: int
    """Id of its first row."""
    vocab: int
    """V: rows on all ranks."""
    group: Any
    """The ranks that hold the other rows; None when there are none."""
    sequence_parallel: bool
    """The hidden states are this rank's block of rows."""

    def options(self, valid_vocab: int | None = None, *, all_tokens: bool = False) -> dict[str, Any]:
        """Keyword arguments of the kernels, besides ``hidden`` and ``weight``.

        ``all_tokens``: the hidden states given to the kernel come from :meth:`all_tokens`.
        """
        if self.group is None:
            return {"valid_vocab": valid_vocab}
        return {
            "valid_vocab": self.vocab if valid_vocab is None else valid_vocab,  # given: spares an exchange
            "vocab_start": self.vocab_start,
            "group": self.group,
            "sequence_parallel": self.sequence_parallel and not all_tokens,
        }

    def all_tokens(self, hidden_ND: Tensor) -> Tensor:
        """[N, D] hidden states of all tokens, gathered where each rank holds a block of them; without gradient."""
        return gather(hidden_ND.detach(), self.group) if self.sequence_parallel else hidden_ND


@dataclass(frozen=True, slots=True)
class _Layout:
    mesh: DeviceMesh
    sequence_parallel: bool
    experts: bool = False
    """Some blocks have experts: tp ranks work on a part of the tokens there."""


def build_mesh(tp: int, cp: int, dp: int | None, device_type: str, *, key: str = KEY) -> DeviceMesh:
    """The mesh with dimensions ("dp", "cp", "tp"); the ranks of a tp group are neighbours.

    Args:
        dp: None takes the ranks that are left.
        key: prefix of the recipe keys named in errors.

    Raises:
        UserError: the degrees do not multiply to the number of ranks.
    """
    world = dist.get_world_size()
    if tp < 1 or world % tp:
        raise UserError(
            f"{key}.tensor_parallel_size",
            f"does not divide the {world} ranks of this pool",
            f"Use one of {_divisors(world)}, or start a multiple of {max(tp, 1)} ranks",
            value=tp,
        )
    if cp < 1 or world // tp % cp:
        raise UserError(
            f"{key}.context_parallel_size",
            f"does not divide the {world // tp} ranks that {world} leave beside tensor_parallel_size={tp}",
            f"Use one of {_divisors(world // tp)}, or start a multiple of {tp * max(cp, 1)} ranks",
            value=cp,
        )
    if dp is not None and dp * cp * tp != world:
        raise UserError(
            f"{key}.data_parallel_size",
            f"data {dp} × context {cp} × tensor {tp} is {dp * cp * tp}, but there are {world} ranks",
            f"Use {world // (tp * cp)}, or start {dp * cp * tp} ranks",
            value=dp,
        )
    return init_device_mesh(device_type, (world // (tp * cp), cp, tp), mesh_dim_names=("dp", "cp", "tp"))


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def shard(
    root: nn.Module,
    causal_lm: Any,
    mesh: DeviceMesh,
    *,
    sequence_parallel: bool = False,
    expert_parallel: int = 1,
    recompute: bool = False,
    compile_blocks: bool | str = False,
    offload: bool = False,
    param_dtype: torch.dtype | None = None,
    key: str = KEY,
) -> None:
    """Spread ``root`` over the mesh, in place.

    All ranks must hold the same weights, or meta tensors: nothing is sent. The forward of ``root`` must reach the
    trunk and the head (through :func:`through_head`), with batches that went through :func:`local_batch`; neither may
    be called from outside it.

    Args:
        root: the module whose forward is called (``fastkd.losses.PackedModel``); contains ``causal_lm``.
        causal_lm: a transformers causal language model.
        sequence_parallel: between the blocks each rank of tp holds a block of the tokens. Less memory, the same
            traffic. No effect with tp 1.
        expert_parallel: ranks that share one set of the experts, neighbours in the mesh.
        recompute: run each block again in backward instead of keeping its activations.
        compile_blocks: torch.compile every block; a string names the backend.
        offload: parameters, gradients and optimizer state live in host memory.
        param_dtype: of compute, of the gathered weights and of sums over tp; gradients are reduced over dp × cp in
            float32. None: as they are.

    Raises:
        UserError: the model cannot be split so.
        ModelError: its tensor-parallel plan is missing or not understood.
    """
    tp_mesh, tp = mesh["tp"], mesh["tp"].size()
    check_tensor_parallel(causal_lm.config, tp, f"{key}.tensor_parallel_size")
    experts.check(causal_lm.config, mesh.size(), expert_parallel, f"{key}.expert_parallel_size")
    sequence_parallel = sequence_parallel and tp > 1
    embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    tied = head.weight is embedding.weight
    spread = experts.apply(causal_lm, mesh, expert_parallel, tp_mesh, sequence_parallel=sequence_parallel)
    if tp > 1:
        apply_plan(causal_lm, tp_mesh, sequence_parallel=sequence_parallel)
        data = head.weight.detach()
        head.weight = embedding.weight if tied else nn.Parameter(
            distribute_tensor(data, tp_mesh, [Shard(0)], src_data_rank=None), requires_grad=head.weight.requires_grad
        )  # fmt: skip
    causal_lm.fastkd_layout = _Layout(mesh, sequence_parallel, bool(spread))
    head.forward = _HeadForward(head, mesh, sequence_parallel)
    if recompute:
        recompute_blocks(causal_lm)
    if compile_blocks:
        block_compile.compile_blocks(causal_lm, compile_blocks if isinstance(compile_blocks, str) else "inductor")
    _fully_shard(root, causal_lm, mesh, spread, tied, param_dtype, offload)


def recompute_blocks(causal_lm: Any) -> None:
    """Run each block again in backward instead of keeping its activations. The fused head lies outside the blocks."""
    # The method's name depends on the transformers version. Not re-entrant: keeps autocast, works on a frozen input.
    enable = getattr(causal_lm, "activation_checkpointing_enable", None)
    (enable or causal_lm.gradient_checkpointing_enable)({"use_reentrant": False})


def _fully_shard(
    root: nn.Module,
    causal_lm: Any,
    mesh: DeviceMesh,
    spread: list[Any],
    tied: bool,
    param_dtype: torch.dtype | None,
    offload: bool,
) -> None:
    embedding, head, trunk = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings(), causal_lm.base_model
    # One dimension for both: to a parameter, other tokens of a sequence are as good as other sequences.
    data_mesh = mesh["dp"] if mesh["cp"].size() == 1 else mesh["dp", "cp"]._flatten("dp_cp")
    options: dict[str, Any] = {
        "mesh": data_mesh,
        # Inputs are not cast: FSDP would round the teacher's logits and the token weights with everything else. The
        # embedding's output has param_dtype already.
        "mp_policy": MixedPrecisionPolicy(param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy(),
    }
    for module in spread:
        data = module.expert_mesh[experts.DATA]
        cut = partial(experts.shard_dimension, shards=data.size())
        fully_shard(module, **options | {"mesh": data}, shard_placement_fn=cut)
    for block in trunk.layers:
        fully_shard(block, **options)
    if tied:
        fully_shard([embedding, trunk.norm, head], **options)
    else:
        fully_shard(embedding, **options)
        fully_shard(head, **options)
    fully_shard(root, **options)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            # Sums, on every unit: the divide factor alone fails on gloo, on the root alone it mis-scales the blocks.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


# ---------------------------------------------------------------- who works on what


def data_rank(mesh: DeviceMesh | None) -> tuple[int, int]:
    """Which share of the sequences this rank works on, and how many shares there are."""
    return (0, 1) if mesh is None else (mesh["dp"].get_local_rank(), mesh["dp"].size())


def sum_over_data(values: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """The sum of a small tensor over the ranks that hold other tokens (dp × cp), the same on all ranks."""
    if mesh is None:
        return values
    values = values.to(mesh.device_type, copy=True)
    for name in ("dp", "cp"):
        dist.all_reduce(values, group=mesh[name].get_group())
    return values


def meet(mesh: DeviceMesh | None) -> None:
    """Wait for all ranks of the mesh."""
    for name in () if mesh is None else mesh.mesh_dim_names or ():
        dist.barrier(group=mesh[name].get_group())  # pyright: ignore[reportOptionalSubscript]


# ---------------------------------------------------------------- inside the root's forward


class _HeadForward:
    """The head's forward after ``shard``: calls the given function with the gathered weight."""

    def __init__(self, head: nn.Module, mesh: DeviceMesh, sequence_parallel: bool):
        self.head, self.mesh, self.sequence_parallel = head, mesh["tp"], sequence_parallel

    def __call__(self, hidden_ND: Tensor, function: Callable[[Tensor, HeadShard], Out]) -> Out:
        weight: Any = self.head.weight
        if self.mesh.size() == 1:
            return function(hidden_ND, HeadShard(weight, 0, weight.shape[0], None, False))
        start, _ = vocab_shard(weight.shape[0], self.mesh)
        rows = HeadShard(weight.to_local(), start, weight.shape[0], self.mesh.get_group(), self.sequence_parallel)
        return function(hidden_ND, rows)


def through_head(causal_lm: Any, hidden_ND: Tensor, function: Callable[[Tensor, HeadShard], Out]) -> Out:
    """``function(hidden, head shard)``, run as the forward of the LM head; sharded or not.

    Call it from the root's forward. ``function`` returns a tensor or a (named) tuple of tensors, and reads the weight
    nowhere else: FSDP frees it afterwards.
    """
    head = causal_lm.get_output_embeddings()
    if getattr(causal_lm, "fastkd_layout", None) is None:
        return function(hidden_ND, HeadShard(head.weight, 0, head.weight.shape[0], None, False))
    return head(hidden_ND, function)


def local_batch(causal_lm: Any, batch: Batch) -> Batch:
    """What this rank computes of a batch that all ranks of a dp index are given; call it in the root's forward.

    N is made a multiple of what the mesh needs, by one more sequence without active rows. Under context parallelism
    the result is this rank's share: ``Batch.take`` picks what belongs to it from [A] rows of the whole batch, and
    ``Batch.join`` puts such rows together again.
    """
    layout = getattr(causal_lm, "fastkd_layout", None)
    if layout is None:
        return batch
    cp, tp = layout.mesh["cp"], layout.mesh["tp"].size() if layout.sequence_parallel or layout.experts else 1
    if cp.size() == 1:
        return pad(batch, tp)
    # Two chunks on every rank, and a share that divides over tp.
    batch = pad(batch, cp.size() * math.lcm(2, tp))
    return split(batch, cp.size(), cp.get_local_rank(), cp.get_group())

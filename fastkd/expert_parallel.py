"""Expert parallelism: which rank holds which experts, and how rows reach them.

The ranks that share one set of experts are neighbours, whatever else they share: dp × cp × tp ranks are

    expert data × expert    (``expert_mesh``),

and every rank computes other tokens than all others. It sorts its rows by expert, sends them to the ranks that hold
the experts (all-to-all), and gets the results back the same way. So the tensor-parallel ranks of a block with experts
work on a part of the tokens each: the part they hold under sequence parallelism, else one cut off before the block and
gathered after it (``own_tokens``). The experts themselves are never split by tensor parallelism (Megatron's expert
tensor parallelism of 1). FSDP2 shards them over the expert-data ranks and sums their gradients there: every row that an
expert multiplied, of whatever rank, is in that sum once.

With one rank per set of experts (size 1) nothing travels, and FSDP shards the experts over all ranks.

Letters: R ranks of the expert group, E experts, L = E / R of them on one rank, M rows sent or received, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed._functional_collectives as functional
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from fastkd.collectives import move
from fastkd.errors import ModelError, UserError
from fastkd.experts import experts_of, inverse, is_plain, permute

DATA, EXPERT = "expert_data", "expert"


def check(config: Any, ranks: int, size: int, key: str) -> None:
    """Whether the experts of this model can be spread so. ``key`` is named in the error.

    Args:
        config: a transformers configuration.
        ranks: of the whole mesh.
        size: ranks that share one set of experts.

    Raises:
        UserError: with every size that would do.
    """
    experts = count(config)
    if size == 1:
        return
    if not experts:
        raise UserError(key, "the model has no experts", "Use 1, or a mixture of experts", value=size)
    fits = [n for n in range(1, experts + 1) if experts % n == 0 and ranks % n == 0]
    if size not in fits:
        raise UserError(
            key,
            f"must divide the {experts} experts of the model and the {ranks} ranks that hold it",
            f"Use one of {', '.join(map(str, fits))}, or start a multiple of {max(size, 1)} ranks",
            value=size,
        )


def count(config: Any) -> int:
    """E of a configuration; 0 for a dense model."""
    config = config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return next((value for name in names if (value := getattr(config, name, None))), 0)


def expert_mesh(mesh: DeviceMesh, size: int) -> DeviceMesh:
    """The ranks of ``mesh`` with the dimensions (expert data, expert); those of an expert group are neighbours."""
    return init_device_mesh(mesh.device_type, (mesh.size() // size, size), mesh_dim_names=(DATA, EXPERT))


def apply(causal_lm: Any, mesh: DeviceMesh, size: int, tp_mesh: DeviceMesh, *, sequence_parallel: bool) -> list[Any]:
    """Give every rank its experts, in place; the modules that hold them, with ``expert_mesh`` set for FSDP.

    Raises:
        ModelError: the experts are of a kind that is not computed here.
    """
    found = list(experts_of(causal_lm))
    for name, module in found:
        if not is_plain(module):
            rule = f"the experts of {type(causal_lm).__name__} have biases or another layout ({name})"
            raise ModelError("model", rule, "Use one device with this model", value=type(module).__name__)
    own_mesh = expert_mesh(mesh, size) if found else mesh
    for name, module in found:
        for own, parameter in list(module.named_parameters(recurse=False)):
            data = distribute_tensor(parameter.detach(), own_mesh[EXPERT], [Shard(0)], src_data_rank=None)
            module.register_parameter(own, nn.Parameter(data, requires_grad=parameter.requires_grad))
        if size > 1:
            module.exchange = Exchange(own_mesh[EXPERT])
        module.first_expert = own_mesh[EXPERT].get_local_rank() * (module.num_experts // size)
        module.expert_mesh = own_mesh
        block = causal_lm.get_submodule(name.rpartition(".")[0])
        if tp_mesh.size() > 1 and not sequence_parallel:
            own_tokens(block, tp_mesh)
        # Numbers of rows are known on the host only when they are there: a compiler would break off at each.
        block.forward = torch.compiler.disable(block.forward)
    return [module for _, module in found]


def own_tokens(block: Any, tp_mesh: DeviceMesh) -> None:
    """Have a module of hidden states [1, N, D] work on this rank's tokens alone, in place. N must divide."""
    inner = block.forward

    def forward(hidden_states: Tensor) -> Tensor:
        return move(inner(move(hidden_states, "slice", "gather", 1, tp_mesh)), "gather", "slice", 1, tp_mesh)

    block.forward = forward


def shard_dimension(parameter: nn.Parameter, shards: int) -> Shard:
    """Which dimension FSDP cuts of a rank's experts: whole experts where they divide, else their rows."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    experts, rows = local.shape[:2]
    return Shard(1) if experts % shards and rows % shards == 0 else Shard(0)


class Exchange:
    """Takes rows to the ranks that hold their experts, and the results back."""

    def __init__(self, mesh: DeviceMesh):
        self.ranks, self.group = mesh.size(), mesh.get_group()

    def __call__(self, rows: Tensor, counts_E: Tensor, compute: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """[M, D] of this rank's own rows, in their order.

        Args:
            rows: [M, D] sorted by expert.
            counts_E: [E] int64, rows of each.
            compute: (rows sorted by expert, rows of each of the L) → one result per row.
        """
        sent_RL = counts_E.view(self.ranks, -1)
        received_RL = _all_to_all(sent_RL, None, None, self.group)
        # The one wait for the device: sizes of messages are numbers of the host.
        sent, received = torch.stack((sent_RL.sum(1), received_RL.sum(1))).tolist()
        arrived = _AllToAll.apply(rows, received, sent, self.group)
        # They lie rank by rank, and by expert inside: a stable sort keeps the ranks' order.
        experts = torch.arange(received_RL.shape[1], device=rows.device).repeat(self.ranks)
        experts = experts.repeat_interleave(received_RL.reshape(-1), output_size=sum(received))
        order = experts.argsort(stable=True)
        out = compute(permute(arrived, order), received_RL.sum(0))
        return _AllToAll.apply(permute(out, inverse(order)), sent, received, self.group)  # type: ignore


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, received: list[int], sent: list[int], group: Any) -> Tensor:
        ctx.received, ctx.sent, ctx.group = received, sent, group
        return _all_to_all(x, received, sent, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _all_to_all(gradients[0], ctx.sent, ctx.received, ctx.group), None, None, None


def _all_to_all(x: Tensor, received: list[int] | None, sent: list[int] | None, group: Any) -> Tensor:
    return functional.wait_tensor(functional.all_to_all_single(x.contiguous(), received, sent, group))

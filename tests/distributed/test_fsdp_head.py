"""topk_kl inside modules that FSDP2 shards over two gloo ranks, against one process on both batches.

The head's weight belongs to the root module's parameter group, which is gathered while the root's forward runs, so
the call lies inside that forward. FSDP averages gradients over ranks; token weights of ranks / (tokens on all ranks)
undo that for ranks with unequal numbers of tokens. This file is its own worker program.

Letters: N tokens, D hidden, V vocabulary, K kept.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

RANKS, D, V, K = 2, 16, 101, 7
TOKENS = [7, 5]  # of each rank


def test_two_ranks_equal_one_process(tmp_path, launch):
    launch(__file__, RANKS, tmp_path / "rendezvous")


class Student(nn.Module):
    """Embedding, two layers, and a head whose forward is the fused loss."""

    def __init__(self, tied: bool, checkpointed: bool = False):
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(2))
        self.head = nn.Linear(D, V, bias=False)
        self.checkpointed = checkpointed
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids, teacher, **options):
        from fastkd.kernels import topk_kl

        hidden = self.embedding(ids)
        for layer in self.layers:
            change = checkpoint(layer, hidden, use_reentrant=False) if self.checkpointed else layer(hidden)
            hidden = hidden + torch.tanh(change)
        return topk_kl(hidden, self.head.weight, teacher, **options)


def build(tied, dtype=torch.float32, **options):
    torch.manual_seed(0)
    return Student(tied, **options).to(dtype)


def batches():
    """(ids, teacher rows) of every rank."""
    from fastkd.kernels import vocab_topk

    make = torch.Generator().manual_seed(1)
    teacher_head = torch.randn(V, 8, generator=make)
    for tokens in TOKENS:
        ids = torch.randint(V, (tokens,), generator=make)
        yield ids, vocab_topk(torch.randn(tokens, 8, generator=make), teacher_head, K)


def shard(model, **options):
    """The usual layout: a group per layer, and one for the rest, head included."""
    for layer in model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def alone(tied, kl, steps=2, **options):
    """(losses, gradients of the first step) of one process that sees all tokens."""
    from fastkd.kernels import TopK

    model, losses, gradients = build(tied, **options), [], {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ids, teachers = zip(*batches(), strict=True)
    teacher = TopK(*(torch.cat(field) for field in zip(*teachers, strict=True)))
    weights = torch.full((sum(TOKENS),), 1 / sum(TOKENS))
    for _ in range(steps):
        result = model(torch.cat(ids), teacher, kl=kl, token_weights=weights)
        optimizer.zero_grad()
        result.loss.backward()
        losses.append(result.loss.item())
        gradients = gradients or {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
    return losses, gradients


def sharded(tied, kl, steps=2, policy=None, **options):
    """The same of this rank's part, under FSDP2."""
    model, losses, gradients = build(tied, **options), [], {}
    shard(model, **({} if policy is None else {"mp_policy": policy}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ids, teacher = list(batches())[dist.get_rank()]
    weights = torch.full((len(ids),), RANKS / sum(TOKENS))
    for _ in range(steps):
        result = model(ids, teacher, kl=kl, token_weights=weights)
        optimizer.zero_grad()
        result.loss.backward()
        total = result.loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / RANKS)
        gradients = gradients or {name: p.grad.full_tensor() for name, p in model.named_parameters()}
        optimizer.step()
    return losses, gradients, model


def check_float32():
    for tied in (False, True):
        for kl, checkpointed in (("forward", False), ("reverse", True), ("jsd", False)):
            losses, gradients = alone(tied, kl)
            got_losses, got_gradients, _ = sharded(tied, kl, checkpointed=checkpointed)
            torch.testing.assert_close(got_losses, losses, rtol=1e-5, atol=1e-6)
            assert losses[1] < losses[0]  # the step was taken, on all shards
            assert got_gradients.keys() == gradients.keys()
            for name, wanted in gradients.items():
                torch.testing.assert_close(
                    got_gradients[name], wanted, rtol=1e-4, atol=1e-6, msg=f"{name}, {kl}, {tied}"
                )


def check_bfloat16():
    # Weights and activations are bfloat16 inside, their gradients are reduced in float32.
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for tied in (False, True):
        losses, gradients = alone(tied, "forward", steps=1)
        got_losses, got_gradients, _ = sharded(tied, "forward", steps=1, policy=policy)
        torch.testing.assert_close(got_losses, losses, rtol=0.02, atol=0)
        for name, wanted in gradients.items():
            assert got_gradients[name].dtype == torch.float32
            error = (got_gradients[name] - wanted).norm() / wanted.norm()
            assert error < 0.03, f"{name}: relative error {error:.3f}"


def check_no_grad():
    _, _, model = sharded(False, "forward", steps=1)
    ids, teacher = list(batches())[dist.get_rank()]
    with torch.no_grad():
        before = model(ids, teacher)
        again = model(ids, teacher)
    assert not before.loss.requires_grad
    assert torch.equal(before.per_token, again.per_token)


def main(rendezvous: str, ranks: int, rank: int):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    check_float32()
    check_bfloat16()
    check_no_grad()
    dist.barrier()  # a rank that leaves early closes connections that others still use
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

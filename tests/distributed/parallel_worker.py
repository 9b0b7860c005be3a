"""The worker program of test_parallel.py: one optimizer step under a mesh against one process, case after case.

Every rank also takes the step alone, on the whole batch, with the same modules unsharded; what is compared is the
loss, the gradient norm, every gradient by name and every updated weight, gathered.

Run as: parallel_worker.py RENDEZVOUS WORLD RANK
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fastkd import attention, grad_norm, parallel
from fastkd.batch import Prompt, Rollout, idle, pack
from fastkd.kernels import TopK, vocab_topk
from fastkd.losses import Divergence, FusedLoss, FusedTopK, PackedModel

sys.path.insert(0, str(Path(__file__).parent))
from worker_inputs import DEVICE, join

V, K, VALID = 101, 7, 97
MESHES = {  # of so many ranks: (tp, dp, cp)
    1: [(1, 1, 1)],
    2: [(2, 1, 1), (1, 2, 1), (1, 1, 2)],
    4: [(2, 2, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)],
    8: [(4, 2, 1), (8, 1, 1), (2, 2, 2)],
}
CLIP = 0.02
EXACT = 1e-5
"""Relative error of float32 results: |a - b| / |b|, in the 2-norm of each tensor."""


@dataclass(frozen=True)
class Case:
    """A model, and how it is sharded."""

    kind: str = "Qwen3"
    tied: bool = True
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    packed: bool = True
    """False: one sequence per micro-batch."""

    def __str__(self):
        return f"{self.kind} tied={self.tied} packed={self.packed} {self.config} {self.options}"


SEQUENCE = {"sequence_parallel": True}
BIASED = {"attention_bias": True, "mlp_bias": True}
# On every mesh. 2 key/value heads are fewer than 4 or 8 ranks; 101 rows divide by none of them.
EVERYWHERE = [
    Case(),
    Case(tied=False, options=SEQUENCE),
    Case("Llama", tied=False, config=BIASED),
    Case("Llama", tied=True, options=SEQUENCE | {"recompute": True}, packed=False),
    Case(tied=False, config={"attention_bias": True}, options={"recompute": True}),
]
COMPILED = Case("Qwen3", config={"num_hidden_layers": 1}, options={"compile_blocks": "aot_eager", "recompute": True})
# On two ranks only: the other architectures and options.
ON_TWO = [
    Case("Olmo2", tied=False),
    Case("Olmo2", tied=False, options=SEQUENCE),
    Case("Mistral", tied=False, config={"sliding_window": 5}),
    Case("Gemma", config={"pad_token_id": 3}),
    Case("Gemma3", options=SEQUENCE, config={"pad_token_id": 3, "sliding_window": 5, "final_logit_softcapping": None}),
    COMPILED,
    Case("Qwen3", options={"offload": True}),
    Case("Qwen3", tied=False, options={"param_dtype": torch.bfloat16}),
    Case("Qwen3", options={"param_dtype": torch.bfloat16} | SEQUENCE),
]
# What context parallelism could break: windows, recomputation of its collectives, lengths inside compiled code.
WITH_CONTEXT = [
    Case("Mistral", tied=False, config={"sliding_window": 5}),
    Case("Mistral", config={"sliding_window": 5}, options=SEQUENCE, packed=False),
    Case("Gemma3", config={"pad_token_id": 3, "sliding_window": 5, "final_logit_softcapping": None}),
    COMPILED,
    Case("Qwen3", options={"offload": True}),
    Case("Qwen3", tied=False, options={"param_dtype": torch.bfloat16}),
]


def cases(tp: int, dp: int, cp: int) -> list[Case]:
    """What is worth its time on this mesh."""
    ranks = tp * dp * cp
    if ranks == 2:
        extra = ON_TWO if tp == 2 else WITH_CONTEXT if cp == 2 else []
    else:
        extra = WITH_CONTEXT[:2] if cp > 1 else []
    return EVERYWHERE[: 5 if ranks <= 2 or (tp, dp) == (2, 2) else 3 if ranks == 4 else 2] + extra


def build(case: Case, **changes):
    """A random model; norms and biases are random too, so that no gradient is trivially right."""
    import transformers

    kind = case.kind + ("Text" if case.kind == "Gemma3" else "")
    settings = dict(
        vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, tie_word_embeddings=case.tied,
        initializer_range=0.2, pad_token_id=None,
    )  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**{**settings, **case.config, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{case.kind}ForCausalLM")._from_config(config, attn_implementation=attention.NAME)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.train()


def data():
    """Eight rollouts, their teacher rows, and the number of response tokens."""
    rng, make = random.Random(0), torch.Generator().manual_seed(1)
    rollouts, rows = [], []
    head = torch.randn(V, 16, generator=make)
    for index in range(8):
        prompt, response = (tuple(rng.randrange(VALID) for _ in range(rng.randint(1, 9))) for _ in range(2))
        rollouts.append(Rollout(Prompt(index, "", None, "", prompt), 0, response, True, 0))
        rows.append(vocab_topk(torch.randn(len(response), 16, generator=make), head, K, valid_vocab=VALID))
    return rollouts, rows, sum(len(rollout.response) for rollout in rollouts)


def step(root, rollouts, rows, size, total, device="cpu"):
    """Forward and backward over micro-batches of ``size`` sequences; the local loss."""
    loss = 0.0
    for start in range(0, len(rollouts), size):
        part = slice(start, start + size)
        batch = pack(rollouts[part]).to(device)
        teacher = TopK(*(torch.cat(parts).to(device) for parts in zip(*rows[part], strict=True)))
        weights = torch.full((len(batch.labels_A),), 1.0 / total, device=device)
        out = root(batch, FusedLoss(Divergence(), teacher, weights, VALID))
        out.loss.backward()
        loss += out.loss.item()
    # What a rank runs when others have one micro-batch more: it must change nothing.
    teacher = TopK(*(field[:0].to(device) for field in rows[0]))
    nothing = root(idle().to(device), FusedLoss(Divergence(), teacher, torch.zeros(0, device=device), VALID))
    nothing.loss.backward()
    return loss + nothing.loss.item()


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def results(root, rollouts, rows, size, total, clip, device="cpu"):
    """Loss, gradient norm, gradients (before clipping) and updated weights by name."""
    parameters = dict(root.named_parameters())
    # A large eps: Adam divides by the gradient's size, and would make rounding errors of tiny gradients large.
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.01, eps=1e-3)
    loss = step(root, rollouts, rows, size, total, device)
    gradients = {name: whole(p.grad).clone() for name, p in parameters.items()}
    norm = clip(list(parameters.values()), CLIP)
    optimizer.step()
    return loss, norm.cpu(), gradients, {name: whole(p.detach()).clone() for name, p in parameters.items()}


def error(got, wanted):
    return float((got.float() - wanted).norm() / wanted.norm().clamp(min=1e-30))


_ALONE: dict[str, Any] = {}


def alone(case: Case):
    """The results of one process, which do not depend on how the model is sharded."""
    key = f"{case.kind} {case.tied} {case.config}"
    if key not in _ALONE:
        rollouts, rows, total = data()
        clip = torch.nn.utils.clip_grad_norm_
        _ALONE[key] = results(PackedModel(build(case)), rollouts, rows, len(rollouts), total, clip)
    return _ALONE[key]


def check(case: Case, tp: int, dp: int, cp: int) -> float:
    """Largest relative error; raises where it is too large."""
    rollouts, rows, total = data()
    loss, norm, gradients, weights = alone(case)
    assert norm > CLIP, "the clip must do something"

    mesh = parallel.build_mesh(tp, cp, dp, DEVICE.type)
    root = PackedModel(build(case))
    parallel.shard(root, root.causal_lm, mesh, **case.options)
    mine = slice(mesh["dp"].get_local_rank(), None, dp)
    size = 2 if case.packed else 1
    got = results(root, rollouts[mine], rows[mine], size, total, grad_norm.clip_grad_norm, DEVICE)
    got_loss = parallel.sum_over_data(torch.tensor(got[0]), mesh)

    errors = {"loss": abs(got_loss.item() - loss) / abs(loss), "norm": error(got[1], norm)}
    assert got[2].keys() == gradients.keys() and got[3].keys() == weights.keys()
    for name, wanted in gradients.items():
        assert got[2][name].shape == wanted.shape, f"{name}: {got[2][name].shape}"
        errors[f"gradient of {name}"] = error(got[2][name], wanted)
        errors[f"weight {name}"] = error(got[3][name], weights[name])
    limits = dict.fromkeys(errors, EXACT)
    if "param_dtype" in case.options:
        # bfloat16 is as near to float32 as one process in bfloat16 is, within a factor of two.
        own = PackedModel(build(case).to(case.options["param_dtype"]))
        step(own, rollouts, rows, 8, total)
        for name, parameter in own.named_parameters():
            limits[f"gradient of {name}"] = 2 * error(parameter.grad, gradients[name]) + 0.01
            limits[f"weight {name}"] = limits["loss"] = limits["norm"] = 0.02
    wrong = {name: f"{value:.1e}" for name, value in errors.items() if not value <= limits[name]}
    assert not wrong, f"tp={tp} dp={dp} cp={cp} {case}: relative errors {wrong}"
    if case.tied:
        head, embedding = root.causal_lm.get_output_embeddings(), root.causal_lm.get_input_embeddings()
        assert head.weight is embedding.weight
    return max(errors.values())


def check_teacher(tp: int, dp: int, cp: int, **options):
    """Every rank gets the rows of one process; twice, since a frozen model never runs backward."""
    rollouts, _, _ = data()
    batch = pack(rollouts)
    head = FusedTopK(K, valid_vocab=VALID)
    alone = PackedModel(build(Case()).requires_grad_(False))(batch, head)
    root = PackedModel(build(Case()).requires_grad_(False))
    parallel.shard(root, root.causal_lm, parallel.build_mesh(tp, cp, dp, DEVICE.type), **options)
    for _ in range(2):
        got = root(batch.to(DEVICE), head).map(Tensor.cpu)
        assert torch.equal(got.indices, alone.indices)
        for a, b in zip(got[1:], alone[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert all(len(field) == 0 for field in root(idle().to(DEVICE), head))


def check_shards(tp: int, dp: int, cp: int):
    """Each rank holds its share of every matrix, but for replicated k and v; meta tensors stay meta, tied stay tied."""
    for tied in (False, True):
        with torch.device("meta"):
            root = PackedModel(build(Case(tied=tied), num_key_value_heads=8))
        parallel.shard(root, root.causal_lm, parallel.build_mesh(tp, cp, dp, DEVICE.type))
        for name, parameter in root.named_parameters():
            assert parameter.is_meta
            share = parameter.numel() / (tp * dp * cp if parameter.ndim > 1 else dp * cp)
            local = parameter.to_local().numel()
            assert local <= share * 1.2 + 32, f"{name}: {local} of {parameter.numel()}"
        head, embedding = root.causal_lm.get_output_embeddings(), root.causal_lm.get_input_embeddings()
        assert (head.weight is embedding.weight) == tied


def check_mixed_meshes(tp: int, dp: int):
    """The norm counts every element once, whichever mesh holds it and however many copies there are."""
    mesh = parallel.build_mesh(tp, 1, dp, DEVICE.type)["dp", "tp"]
    torch.manual_seed(0)
    layouts = [
        (mesh["tp"], [Shard(0)]), (mesh["tp"], [Replicate()]), (mesh["dp"], [Shard(1)]), (mesh, [Shard(0), Shard(1)]),
        (mesh, [Replicate(), Shard(0)]), (mesh, [Shard(0), Replicate()]),
    ]  # fmt: skip
    parameters, squares = [nn.Parameter(torch.zeros(3, device=DEVICE))], torch.tensor(12.0)
    parameters[0].grad = torch.full((3,), 2.0, device=DEVICE)
    for number, (submesh, placements) in enumerate(layouts):
        value = torch.randn(5 + number, 16)
        squares += value.square().sum()
        sharded = distribute_tensor(value.to(DEVICE), submesh, placements, src_data_rank=None)
        parameters.append(nn.Parameter(torch.zeros_like(sharded)))
        parameters[-1].grad = sharded
    for clip, wanted in ((None, squares.sqrt()), (1.0, squares.sqrt()), (None, torch.tensor(1.0))):
        torch.testing.assert_close(grad_norm.clip_grad_norm(parameters, clip).cpu(), wanted, rtol=1e-5, atol=0)


def main(rendezvous: str, world: int, rank: int):
    join(rendezvous, world, rank)
    torch.set_num_threads(1)
    for tp, dp, cp in MESHES[world]:
        worst = 0.0
        for case in cases(tp, dp, cp):
            value = check(case, tp, dp, cp)
            if "param_dtype" not in case.options:
                worst = max(worst, value)
        check_teacher(tp, dp, cp)
        check_teacher(tp, dp, cp, sequence_parallel=True)
        check_shards(tp, dp, cp)
        if cp == 1:
            check_mixed_meshes(tp, dp)
        if rank == 0:
            print(f"tp={tp} dp={dp} cp={cp}: largest relative error {worst:.1e}", flush=True)
    dist.barrier()  # a rank that leaves early closes connections that others still use
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

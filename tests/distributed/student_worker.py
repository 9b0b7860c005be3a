"""The worker program of test_student_sharded.py: Student and Teacher as torchrun starts them, against one process.

Run as: torchrun --nproc-per-node=R student_worker.py MODELS, where MODELS holds the folders student and teacher.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from worker_inputs import DEVICE, recipe, rollouts

from fastkd import attention, losses, parallel
from fastkd._kernels import ops
from fastkd.batch import Prompt, Rollout, pack
from fastkd.process_group import joined
from fastkd.student import Student
from fastkd.teacher import Teacher

EXACT = 1e-5
SOURCES = ("books", "code", "books")
"""Of a blend, in turns."""
CASES = {
    1: [{}],
    2: [
        {"tensor_parallel_size": 2, "sequence_parallel": True},
        {},
        {"context_parallel_size": 2},
        {"cpu_offload": True},
    ],
    4: [{"tensor_parallel_size": 2}, {"tensor_parallel_size": 2, "context_parallel_size": 2}],
}


def recipe_of(folder: Path, sharding: dict, precision: str, packed: bool, fused: bool = False):
    packing = {"enabled": packed, "train_mb_tokens": 60}
    more = {"precision": precision, "sequence_packing": packing, "train_micro_batch_size": 2}
    return recipe(folder, sharding, kl="reverse", optimizer={"fused": fused}, **more)


def collected(targets):
    """Every rank's teacher rows on every rank."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [None if rows is None else rows.map(torch.Tensor.cpu) for rows in targets])
    return [next((own[i] for own in everyone if own[i] is not None), None) for i in range(len(targets))]  # type: ignore


def weights(student: Student) -> dict[str, torch.Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().cpu().clone()
        for name, p in student.causal_lm.named_parameters()
    }


def error(got, wanted) -> float:
    return float((got.float() - wanted).norm() / wanted.norm().clamp(min=1e-30))


def check(device: torch.device, folder: Path, sharding: dict, precision: str, packed: bool) -> float:
    config = recipe_of(folder, sharding, precision, packed, fused=not packed)
    sequences = rollouts(silent=5, sources=SOURCES)
    alone = Student(recipe_of(folder, {}, "float32", packed), torch.device("cpu"), 97)
    targets = Teacher(recipe_of(folder, {}, "float32", packed), torch.device("cpu"), 97).score(sequences)
    wanted = alone.train(sequences, targets) | alone.divergences(sequences, targets)

    tp, cp = sharding.get("tensor_parallel_size", 1), sharding.get("context_parallel_size", 1)
    mesh = parallel.build_mesh(tp, cp, None, DEVICE.type)
    own = Teacher(config, device, 97, mesh).score(sequences)
    scored = collected(own)
    tolerance = EXACT if precision == "float32" else 0.05
    for mine, theirs in zip(scored, targets, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert precision != "float32" or torch.equal(mine.indices, theirs.indices)
            torch.testing.assert_close(mine.logsumexp, theirs.logsumexp, rtol=tolerance, atol=tolerance)
    student = Student(config, device, 97, mesh)
    got = student.train(sequences, targets) | student.divergences(sequences, targets)
    assert got.keys() == wanted.keys()
    errors = {name: abs(got[name] - value) / max(abs(value), 1e-12) for name, value in wanted.items()}
    before = weights(alone)
    errors |= {name: error(value, before[name]) for name, value in weights(student).items()}
    wrong = {name: f"{value:.1e}" for name, value in errors.items() if not value <= tolerance}
    assert not wrong, f"{sharding} {precision} packed={packed}: relative errors {wrong}"
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, got)
    assert all(one == got for one in everyone), "the ranks report different metrics"
    check_sources(student, sequences[7:], targets[7:], tolerance)
    return max(errors.values())


def check_sources(student: Student, sequences: list[Rollout], targets, tolerance: float) -> None:
    """Of one optimizer step: the loss is the mean of the sources' losses, weighted by tokens."""
    found = student.train(sequences, targets)
    counts = dict.fromkeys(SOURCES, 0)
    for one in sequences:
        counts[one.prompt.source] += len(one.response)
    losses = {name: found[f"blend/loss/{name}"] for name in counts}
    total = sum(counts[name] * loss for name, loss in losses.items()) / sum(counts.values())
    assert abs(total - found["train/loss"]) <= tolerance * total, (found, counts)
    assert abs(losses["books"] - losses["code"]) > 0.01 * total, "the sources must differ"


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operator returned, those inside our own operators included."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastkd":
            with self:  # its body calls operators too
                return getattr(ops, func.name().partition("::")[2])._init_fn(*args, **kwargs or {})
        out = func(*args, **kwargs or {})
        for one in tree_leaves(out):
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return out


def check_no_logits() -> None:
    """No operator of a sharded step returns as many elements as this rank's part of the logits has."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tp, hidden, vocab, k = dist.get_world_size(), 16, 4096, 8
    config = Qwen3Config(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=False,
    )  # fmt: skip
    sequences = [
        Rollout(Prompt(i, "", None, "", (1,)), 0, tuple(range(32)), True, 0) for i in range(8 * hidden * tp // 32)
    ]
    batch = pack(sequences).to(DEVICE)
    tokens = len(batch.tokens_N)
    assert tokens >= 8 * hidden * tp
    logits = tokens * vocab // tp
    root = losses.PackedModel(Qwen3ForCausalLM._from_config(config, attn_implementation=attention.NAME))
    parallel.shard(root, root.causal_lm, parallel.build_mesh(tp, 1, 1, DEVICE.type))
    chunk = {"chunk_bytes": tokens // 8 * (vocab // tp) * 4}
    with (
        mock.patch.object(losses, "topk_kl", partial(losses.topk_kl, **chunk)),
        mock.patch.object(losses, "vocab_topk", partial(losses.vocab_topk, **chunk)),
        Largest() as largest,
    ):
        with torch.no_grad():
            rows = root(batch, losses.FusedTopK(k))
        even = torch.full((tokens,), 1.0 / tokens, device=DEVICE)
        root(batch, losses.FusedLoss(losses.Divergence(), rows, even)).loss.backward()
    assert logits // 8 <= largest.elements < logits // 4, f"{largest.elements} of {logits}"
    with Largest() as largest:  # and the mode sees what it must not find
        torch.randn(tokens, hidden) @ torch.randn(vocab // tp, hidden).t()
    assert largest.elements >= logits


def main(folder: Path) -> None:
    with joined(DEVICE.type) as device:
        torch.set_num_threads(1)
        if dist.get_world_size() == 2:
            check_no_logits()
        for sharding in CASES[dist.get_world_size()]:
            kinds = [("float32", True), ("float32", False), ("bfloat16", True)]
            for precision, packed in kinds[:1] if "cpu_offload" in sharding else kinds:
                worst = check(device, folder, sharding, precision, packed)
                if dist.get_rank() == 0:
                    print(f"{sharding} {precision} packed={packed}: largest relative error {worst:.1e}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""The worker program of test_experts.py: a mixture of experts on a mesh against one process.

First the model alone: loss, gradient norm, every gradient by name and every updated weight of one optimizer step. Then
the workers, from files to files: scales of calibration, metrics, a state that another mesh takes up, and both exports.

Run as: expert_worker.py FOLDER WORLD RANK, where FOLDER holds the model folders student and teacher.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import transformers
from parallel_worker import CLIP, EXACT, VALID, K, V, data, error, results, whole
from safetensors.torch import load_file
from torch.distributed.tensor import Shard
from worker_inputs import DEVICE, join, recipe

from fastkd import attention, experts, grad_norm, parallel, quantization
from fastkd.batch import pack
from fastkd.losses import FusedTopK, PackedModel
from fastkd.student import Student
from fastkd.teacher import Teacher

MESHES = {  # of so many ranks: (tp, dp, cp, ep)
    2: [(1, 2, 1, 2), (2, 1, 1, 2), (2, 1, 1, 1)],
    4: [(2, 2, 1, 4), (2, 2, 1, 2), (2, 1, 2, 4), (1, 4, 1, 2)],
}
CPU = torch.device("cpu")
SEQUENCE = {"sequence_parallel": True}


def build(seed: int = 0, kind: str = "Qwen3Moe", **changes: Any):
    """A random model of a dense block and one with 8 experts."""
    settings = dict(
        vocab_size=V, hidden_size=32, intermediate_size=64, num_experts=8, num_experts_per_tok=3, norm_topk_prob=True,
        num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=False, initializer_range=0.2, pad_token_id=None,
    )  # fmt: skip
    if kind == "Qwen3Moe":
        settings |= dict(moe_intermediate_size=16, head_dim=8, mlp_only_layers=[0])
    config = getattr(transformers, f"{kind}Config")(**{**settings, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")._from_config(config, attn_implementation=attention.NAME)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    experts.adopt(model)
    return model.train()


_ALONE: dict[str, Any] = {}


def alone(changes: dict[str, Any]) -> Any:
    """The results of one process."""
    key = str(changes)
    if key not in _ALONE:
        rollouts, rows, total = data()
        clip = torch.nn.utils.clip_grad_norm_
        _ALONE[key] = results(PackedModel(build(**changes)), rollouts, rows, len(rollouts), total, clip)
    return _ALONE[key]


def check(tp: int, dp: int, cp: int, ep: int, changes: dict[str, Any], **options: Any) -> float:
    """Largest relative error; raises where it is too large."""
    rollouts, rows, total = data()
    loss, norm, gradients, weights = alone(changes)
    assert norm > CLIP, "the clip must do something"
    mesh = parallel.build_mesh(tp, cp, dp, DEVICE.type)
    root = PackedModel(build(**changes))
    parallel.shard(root, root.causal_lm, mesh, expert_parallel=ep, **options)
    for name, module in experts.experts_of(root.causal_lm):
        for own in experts.FUSED:
            held, every = module.get_parameter(own).to_local().numel(), module.get_parameter(own).numel()
            assert held == every // mesh.size(), f"{name}.{own}: {held} of {every}"
    mine = slice(mesh["dp"].get_local_rank(), None, dp)
    got = results(root, rollouts[mine], rows[mine], 2, total, grad_norm.clip_grad_norm, DEVICE)
    got_loss = parallel.sum_over_data(torch.tensor(got[0]), mesh)
    errors = {"loss": abs(got_loss.item() - loss) / abs(loss), "norm": error(got[1], norm)}
    assert got[2].keys() == gradients.keys() and got[3].keys() == weights.keys()
    for name, wanted in gradients.items():
        errors[f"gradient of {name}"] = error(got[2][name], wanted)
        errors[f"weight {name}"] = error(got[3][name], weights[name])
    wrong = {name: f"{value:.1e}" for name, value in errors.items() if not value <= EXACT}
    assert not wrong, f"tp={tp} dp={dp} cp={cp} ep={ep} {changes} {options}: relative errors {wrong}"
    return max(errors.values())


def check_teacher(tp: int, dp: int, cp: int, ep: int) -> None:
    """A frozen model gives every rank the rows of one process, twice."""
    rollouts, _, _ = data()
    batch = pack(rollouts)
    with torch.no_grad():
        wanted = PackedModel(build().eval())(batch, FusedTopK(K))
        root = PackedModel(build().eval().requires_grad_(False))
        parallel.shard(root, root.causal_lm, parallel.build_mesh(tp, cp, dp, DEVICE.type), expert_parallel=ep)
        for _ in range(2):
            got = root(batch.to(DEVICE), FusedTopK(K)).map(torch.Tensor.cpu)
            assert torch.equal(got.indices, wanted.indices)
            torch.testing.assert_close(got.logits, wanted.logits, rtol=1e-5, atol=1e-5)


def check_uneven() -> None:
    """More ranks than a set's experts divide over: FSDP cuts rows then."""
    three = {"num_experts": 6, "num_experts_per_tok": 2}
    check(1, 4, 1, 2, three)
    mesh = parallel.build_mesh(1, 1, 4, DEVICE.type)
    root = PackedModel(build(**three))
    parallel.shard(root, root.causal_lm, mesh, expert_parallel=2)
    _, module = next(experts.experts_of(root.causal_lm))
    assert module.gate_up_proj.placements == (Shard(1), Shard(0))


# ---------------------------------------------------------------- workers


def config(folder: Path, preset: str | None, sharding: dict[str, Any]):
    sizes = {"prompts": 8, "batch": 4, "micro_batch_tokens": 40}
    return recipe(folder, sharding, optimizer={"foreach": True}, quant_cfg=preset, **sizes)


def on(folder: Path, preset: str | None, tp: int, ep: int) -> Student:
    """A student on all ranks."""
    sharding = {"tensor_parallel_size": tp, "expert_parallel_size": ep, "sequence_parallel": True}
    return Student(config(folder, preset, sharding), DEVICE, VALID, parallel.build_mesh(tp, 1, None, DEVICE.type))


def weights(student: Student) -> dict[str, torch.Tensor]:
    return {name: whole(p.detach()).clone() for name, p in student.causal_lm.named_parameters()}


def scales(student: Student) -> dict[str, torch.Tensor]:
    return {name: b.cpu().clone() for name, b in student.causal_lm.named_buffers() if quantization.is_scale(name)}


def check_workers(folder: Path, preset: str | None, tp: int, ep: int, other: tuple[int, int]) -> float:
    """Two steps under (tp, ep), and what is left of them in files; ``other``: (tp, ep) of the resumed run."""
    scratch = folder / f"{preset}_{dist.get_world_size()}"
    sequences = data()[0]
    alone = Student(config(folder, preset, {}), CPU, VALID)
    targets = Teacher(config(folder, None, {}), CPU, VALID).score(sequences)
    student = on(folder, preset, tp, ep)
    same = weights(alone)
    assert all(torch.equal(value, same[name]) for name, value in weights(student).items()), "read differently"
    if student.needs_calibration:
        for one in (alone, student):
            one.calibrate(sequences)
    wanted, got = scales(alone), scales(student)
    assert wanted.keys() == got.keys() and bool(wanted) == (preset is not None)
    assert all(torch.equal(got[name], value) for name, value in wanted.items() if name.endswith("weight_scale_2"))
    errors = {name: error(got[name], value) for name, value in wanted.items()}
    metrics = [one.train(sequences, targets) | one.divergences(sequences, targets) for one in (alone, student)]
    errors |= {name: abs(metrics[1][name] - value) / max(abs(value), 1e-12) for name, value in metrics[0].items()}
    before = weights(alone)
    errors |= {name: error(value, before[name]) for name, value in weights(student).items()}
    wrong = {name: f"{value:.1e}" for name, value in errors.items() if not value <= EXACT}
    assert not wrong, f"tp={tp} ep={ep} {preset}: relative errors {wrong}"

    student.save(scratch / "state", asynchronous=False)
    student.saved(wait=True)
    again = on(folder, preset, *other)
    again.load(scratch / "state")
    alone.load(scratch / "state")
    held = weights(student)
    for one in (again, alone):
        assert all(torch.equal(value, held[name]) for name, value in weights(one).items())
    figures = [one.train(sequences, targets) for one in (student, again, alone)]  # moments and all
    for one in figures[1:]:
        assert all(abs(one[name] - value) <= EXACT * abs(value) for name, value in figures[0].items()), figures

    for name, value in weights(student).items():
        alone.causal_lm.get_parameter(name).data.copy_(value)
    student.export(scratch / "sharded")
    if dist.get_rank() == 0:
        files = load_file(scratch / "sharded" / "model.safetensors")
        expected = export_alone(alone, scratch / "alone")
        assert files.keys() == expected.keys() and any("experts.7.up_proj.weight" in name for name in files)
        assert all(torch.equal(files[name], value) for name, value in expected.items())
    dist.barrier()
    return max(errors.values())


def export_alone(student: Student, path: Path) -> dict[str, torch.Tensor]:
    """What one process writes, while it is no member of a group."""
    with mock.patch.object(dist, "is_initialized", lambda: False):
        student.export(path)
    return load_file(path / "model.safetensors")


def main(folder: Path, world: int, rank: int) -> None:
    join(folder / "rendezvous", world, rank)
    torch.set_num_threads(1)
    for number, (tp, dp, cp, ep) in enumerate(MESHES[world]):
        cases: list[dict[str, Any]] = [{}] if tp == 1 else [{}, SEQUENCE]
        if world == 2 and number == 0:
            cases += [{"recompute": True}, {"offload": True}]
        worst = max(check(tp, dp, cp, ep, {}, **options) for options in cases)
        if number == 0:
            check_teacher(tp, dp, cp, ep)
        if rank == 0:
            print(f"tp={tp} dp={dp} cp={cp} ep={ep}: largest relative error {worst:.1e}", flush=True)
    if world == 4:
        check_uneven()
        worst = check_workers(folder, "default", 2, 4, (1, 2))
    else:
        check(2, 1, 1, 2, {"kind": "Olmoe", "num_hidden_layers": 1})
        # The tracer alone: it must leave experts and their collectives be.
        check(1, 2, 1, 2, {"num_hidden_layers": 1, "mlp_only_layers": []}, compile_blocks="eager")
        worst = check_workers(folder, None, 1, 2, (2, 1))
    if rank == 0:
        print(f"workers on {world} ranks: largest relative error {worst:.1e}", flush=True)
    dist.barrier()  # a rank that leaves early closes connections that others still use
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

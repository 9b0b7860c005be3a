"""The worker program of test_quantization.py: a quantised student on a mesh against one process.

Compared are the scales after calibration, the metrics of two optimizer steps, every updated weight, and the exported
files. Every rank also does it alone.

Run as: quantization_worker.py FOLDER WORLD RANK, where FOLDER holds the model folders student and teacher.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from worker_inputs import DEVICE, join, recipe, rollouts

from fastkd import nvfp4_export, parallel, quantization, weights_export
from fastkd.errors import UserError
from fastkd.student import Student
from fastkd.teacher import Teacher

MESHES = {1: [(1, 1)], 2: [(2, 1), (1, 2)], 4: [(2, 2), (4, 1)]}  # (tp, dp); 2 key/value heads are fewer than tp 4
CPU = torch.device("cpu")
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.05}
"""Relative error of metrics, and of weights in the 2-norm; of bfloat16's scales alone, see ``check``."""


def config(folder: Path, preset: str, precision: str, sharding: dict):
    return recipe(folder, sharding, precision=precision, quant_cfg=preset)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone()


def scales(student: Student) -> dict[str, torch.Tensor]:
    return {name: b.cpu().clone() for name, b in student.causal_lm.named_buffers() if quantization.is_scale(name)}


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-30))


def results(student: Student, sequences, targets) -> dict[str, torch.Tensor]:
    """Figures of a step, those of its divergences, and the weights after it."""
    figures = student.train(sequences, targets) | student.divergences(sequences, targets)
    if quantization.quantizers_of(student.causal_lm).dtype != torch.float32:
        figures.pop("train/top1_agreement")  # counts tokens: one more or less is a few per cent
    updated = {name: whole(p) for name, p in student.causal_lm.named_parameters()}
    return {name: torch.tensor(value) for name, value in figures.items()} | updated


def check(folder: Path, scratch: Path, preset: str, precision: str, tp: int, dp: int, options: dict) -> float:
    """Largest relative error; raises where it is too large.

    In float32 against one process. In bfloat16, where rounding moves values over the edge between two codes in one
    place or another, against one process in float32: at most twice as far from it as one process in bfloat16 is.
    """
    sequences = rollouts()
    alone = Student(config(folder, preset, precision, {}), CPU, 97)
    targets = Teacher(config(folder, preset, "float32", {}), CPU, 97).score(sequences)
    mesh = parallel.build_mesh(tp, 1, dp, DEVICE.type)
    student = Student(config(folder, preset, precision, {"tensor_parallel_size": tp, **options}), DEVICE, 97, mesh)
    tolerance = TOLERANCE[precision]
    for one in (alone, student):
        one.calibrate(sequences)
    wanted, got = scales(alone), scales(student)
    assert wanted.keys() == got.keys() and len(wanted) == 14 * (1 if preset == "weight_only" else 2)
    errors = {name: error(got[name], value) for name, value in wanted.items()}
    assert all(torch.equal(got[name], wanted[name]) for name in wanted if name.endswith("weight_scale_2"))

    limits = dict.fromkeys(errors, tolerance)
    own, mine = (results(one, sequences, targets) for one in (alone, student))
    exact = own
    if precision == "bfloat16":
        best = Student(config(folder, preset, "float32", {}), CPU, 97)
        best.calibrate(sequences)
        exact = results(best, sequences, targets)
    for name, value in mine.items():
        errors[name] = error(value, exact[name])
        limits[name] = tolerance if exact is own else 2 * error(own[name], exact[name]) + 0.02
    updated = {name: mine[name] for name, _ in student.causal_lm.named_parameters()}
    wrong = {name: f"{value:.1e}" for name, value in errors.items() if not value <= limits[name]}
    assert not wrong, f"tp={tp} dp={dp} {preset} {precision} {options}: relative errors {wrong}"

    check_files(student, alone, updated, scratch)
    check_state(student, alone, sequences, targets, scratch, tolerance)
    return max(errors.values())


def check_files(student: Student, alone: Student, updated: dict, scratch: Path) -> None:
    """Packed and folded files of the sharded student are those of one process with its weights and scales."""
    for name, parameter in alone.causal_lm.named_parameters():
        parameter.detach().copy_(updated[name])
    for name, buffer in scales(student).items():
        alone.causal_lm.get_buffer(name).copy_(buffer)
    student.export(scratch / "sharded")
    weights_export.export(student.causal_lm, scratch / "folded", torch.float32)
    files = load_file(scratch / "sharded" / "model.safetensors"), load_file(scratch / "folded" / "model.safetensors")
    layers = {f"{name}.weight": layer for name, layer in quantization.quantized_layers(alone.causal_lm)}
    used = quantization.quantizers_of(alone.causal_lm).dtype
    read = dict(nvfp4_export.dequantized(scratch / "sharded", used))
    for name, parameter in alone.causal_lm.named_parameters():
        if name in layers:
            value = quantization.fold(alone.causal_lm, layers[name], parameter.detach())
            assert torch.equal(read[name].float(), value) and torch.equal(files[1][name], value), name
            assert files[0][name].dtype == torch.uint8
        else:
            assert torch.equal(files[1][name], parameter) and torch.equal(files[0][name], parameter.to(used)), name
    dist.barrier()


def check_state(student: Student, alone: Student, sequences, targets, scratch: Path, tolerance: float) -> None:
    """A state of the mesh goes on in one process, with its scales."""
    student.save(scratch / "state", asynchronous=False)
    student.saved(wait=True)
    again = Student(config(scratch.parent, "default", "float32", {}), CPU, 97)
    if len(scales(student)) == len(scales(again)):
        again.load(scratch / "state")
        got, wanted = (one.divergences(sequences, targets) for one in (again, student))
        bound = tolerance if quantization.quantizers_of(student.causal_lm).dtype == torch.float32 else 0.2
        assert all(abs(got[name] - value) <= bound * abs(value) for name, value in wanted.items()), (got, wanted)
        assert all(torch.equal(scales(again)[name], value) for name, value in scales(student).items())
    dist.barrier()


def check_cut_blocks(folder: Path, tp: int) -> None:
    try:
        mesh = parallel.build_mesh(tp, 1, None, DEVICE.type)
        Student(config(folder, "default", "float32", {"tensor_parallel_size": tp}), DEVICE, 97, mesh)
    except UserError as raised:
        words = str(raised)
        assert "tensor_parallel_size=2" in words and "down_proj" in words and "48 inputs" in words, words
        assert "Use one of 1, or add down_proj to policy.quant_exclude_modules" in words, words
        return
    raise AssertionError("a row-parallel part of 24 inputs was accepted")


def main(folder: Path, world: int, rank: int) -> None:
    join(folder / "rendezvous", world, rank)
    torch.set_num_threads(1)
    for tp, dp in MESHES[world]:
        cases = [("default", "float32", {"sequence_parallel": tp > 1})]
        cases += [("weight_only", "float32", {})] if world == 2 else []
        cases += [("default", "bfloat16", {"activation_checkpointing": True})] if (tp, dp) == (2, 2) else []
        for number, (preset, precision, options) in enumerate(cases):
            scratch = folder / f"tp{tp}_dp{dp}_{number}"
            worst = check(folder, scratch, preset, precision, tp, dp, options)
            if rank == 0:
                print(f"tp={tp} dp={dp} {preset} {precision}: largest relative error {worst:.1e}", flush=True)
    if world == 2:
        check_cut_blocks(folder / "narrow", 2)
    dist.barrier()  # a rank that leaves early closes connections that others still use
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

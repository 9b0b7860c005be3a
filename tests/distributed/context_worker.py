"""The worker program of test_context_sharded.py: a teacher with prompts of its own, on a mesh of real processes.

Run as: torchrun --nproc-per-node=R context_worker.py MODEL, where MODEL is the folder of a model and its tokenizer.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from worker_inputs import DEVICE

from fastkd import parallel
from fastkd.batch import Prompt, Rollout
from fastkd.context_distillation import TeacherPrompts
from fastkd.process_group import joined
from fastkd.recipe import recipe_from
from fastkd.shared_weights import shares_student
from fastkd.student import Student
from fastkd.teacher import Teacher

LONGEST = 70
CASES = {
    2: [{}, {"tensor_parallel_size": 2, "sequence_parallel": True}, {"context_parallel_size": 2}],
    4: [{"tensor_parallel_size": 2}, {"tensor_parallel_size": 2, "context_parallel_size": 2}],
}
SOURCES = ("base_model", "ema", "live")


def recipe(folder: Path, sharding: dict, source: str, packed: bool, adapters: bool):
    lora = {"lora_cfg": {"enabled": True, "dim": 4}} if adapters else {}
    return recipe_from(
        {
            "distillation": {
                "topk_logits_k": 16,
                "num_prompts_per_step": 12,
                "context_distillation": {
                    "enabled": True,
                    "trace_source": "static_dataset",
                    "static_trace": {"answer_column": "worked"},
                    "teacher_prefix_template": "{problem}\nWorked: {trace}",
                    "trace_extractor": {"missing_trace_policy": "drop_sample"},
                    "frozen_teacher_source": source,
                    "ema_decay": 0.5,
                },
            },
            "policy": {
                "model_name": str(folder),
                "precision": "float32",
                "max_total_sequence_length": LONGEST,
                "train_global_batch_size": 12,
                "sequence_packing": {"enabled": packed, "train_mb_tokens": 90},
                "dtensor_cfg": {**sharding, **lora},
                # A large eps: Adam divides by the gradient's size, and would make rounding errors large.
                "optimizer": {"name": "torch.optim.AdamW", "kwargs": {"lr": 1e-2, "eps": 1e-3}},
            },
            "teacher": {"model_name": str(folder)},
            "data": {"train": {"data_path": "unused.jsonl"}},
        }
    ).recipe


def rollouts(tokenizer, seed: int) -> list[Rollout]:
    """Twelve of random lengths; some without a trace, one without a response, one that leaves no room."""
    rng, made = random.Random(seed), []
    for index in range(12):
        problem = "".join(rng.choice("0123456789+ ") for _ in range(rng.randint(1, 12)))
        worked = "".join(rng.choice("0123456789=-") for _ in range(rng.randint(1, 50)))
        length = 0 if index == 3 else LONGEST if index == 7 else rng.randint(1, 20)
        response = tuple(rng.randrange(3, 416) for _ in range(length))
        prompt = tuple(tokenizer(problem, add_special_tokens=False).input_ids)
        columns = () if index % 5 == 4 else (("worked", worked),)
        made.append(Rollout(Prompt(index, problem, None, problem, prompt, columns=columns), 0, response, True, 0))
    return made


def together(scored):
    """Every rank's teacher rows on every rank."""
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [None if rows is None else rows.map(torch.Tensor.cpu) for rows in scored])
    return [next((own[i] for own in everyone if own[i] is not None), None) for i in range(len(scored))]


@torch.no_grad()
def check_scores(folder: Path, sharding: dict, packed: bool) -> None:
    """Against transformers on the teacher's whole sequences, built here from the texts."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    config = recipe(folder, sharding, "base_model", packed, adapters=False)
    teacher = Teacher(config, DEVICE, None, mesh_of(sharding))
    for seed in range(3):
        batch = rollouts(tokenizer, seed)
        found = TeacherPrompts(config.distillation.context_distillation, tokenizer, None, LONGEST)(batch)
        for one, rows in zip(batch, together(teacher.score(found.teacher)), strict=True):
            n = len(one.response)
            if not one.prompt.columns or not 0 < n < LONGEST:
                assert rows is None
                continue
            chat = [{"role": "user", "content": f"{one.prompt.problem}\nWorked: {one.prompt.columns[0][1]}"}]
            prefix = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)[n - LONGEST :]
            logits = reference(torch.tensor([[*prefix, *one.response]]), use_cache=False).logits[
                0, len(prefix) - 1 : -1
            ]
            torch.testing.assert_close(rows.logits, logits.gather(1, rows.indices.long()), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(rows.logsumexp, logits.logsumexp(1), rtol=1e-4, atol=1e-4)


def train(folder: Path, sharding: dict, source: str, adapters: bool, mesh):
    """Metrics of three steps and the weights after them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = recipe(folder, sharding, source, True, adapters)
    device = torch.device("cpu") if mesh is None else DEVICE
    student = Student(config, device, None, mesh)
    shared = student if shares_student(config) else None
    assert (shared is not None) == (adapters or source != "base_model")
    teacher = Teacher(config, device, None, mesh, shared)
    build = TeacherPrompts(config.distillation.context_distillation, tokenizer, None, LONGEST)
    found = []
    for seed in range(3):
        readings = build(rollouts(tokenizer, seed))
        scored = teacher.score(readings.teacher)
        if mesh is not None:
            scored = together(scored)
        found.append(student.train(readings.student, scored) | student.divergences(readings.student, scored))
    nothing = [one for one in rollouts(tokenizer, 0) if not one.prompt.columns]
    readings = build(nothing)  # all dropped: every rank must skip the step alike
    assert set(student.train(readings.student, teacher.score(readings.teacher))) == {"train/lr"}
    weights = {name: p for name, p in student.causal_lm.named_parameters() if p.requires_grad}
    return found, {
        n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().cpu().clone() for n, p in weights.items()
    }


def mesh_of(sharding: dict):
    tp, cp = sharding.get("tensor_parallel_size", 1), sharding.get("context_parallel_size", 1)
    return parallel.build_mesh(tp, cp, None, DEVICE.type)


def check_training(folder: Path, sharding: dict, source: str, adapters: bool) -> float:
    """Three steps on the mesh against three in one process; the largest relative error."""
    got, weights = train(folder, sharding, source, adapters, mesh_of(sharding))
    wanted, alone = train(folder, {}, source, adapters, None)
    errors = {}
    for step, (mine, theirs) in enumerate(zip(got, wanted, strict=True)):
        assert mine.keys() == theirs.keys()
        errors |= {f"{step} {name}": abs(mine[name] - v) / max(abs(v), 1e-3) for name, v in theirs.items()}
    errors |= {
        name: float((w - alone[name]).norm() / alone[name].norm().clamp(min=1e-6)) for name, w in weights.items()
    }
    wrong = {name: f"{value:.1e}" for name, value in errors.items() if not value <= 1e-4}
    assert not wrong, f"{sharding} {source} adapters={adapters}: relative errors {wrong}"
    return max(errors.values())


def main(folder: Path) -> None:
    with joined(DEVICE.type):
        torch.set_num_threads(1)
        for sharding in CASES[dist.get_world_size()]:
            check_scores(folder, sharding, packed=True)
            check_scores(folder, sharding, packed=False)
            for source, adapters in [(one, False) for one in SOURCES] + [("base_model", True), ("ema", True)]:
                worst = check_training(folder, sharding, source, adapters)
                if dist.get_rank() == 0:
                    print(f"{sharding} {source} adapters={adapters}: largest error {worst:.1e}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

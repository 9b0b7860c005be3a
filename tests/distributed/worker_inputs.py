"""What worker programs give to Student and Teacher: a recipe for the folders student and teacher, and sequences."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastkd.batch import Prompt, Rollout
from fastkd.recipe import recipe_from

VALID = 97
"""Ids that are tokens."""
DEVICE = torch.device(os.environ.get("FASTKD_TEST_DEVICE", "cpu"))
"""What is sharded is on devices of this kind, one for each rank; what it is compared with is on the CPU."""


def join(rendezvous: Path | str, world: int, rank: int) -> None:
    """Member of a group that meets at a file, with the backends that ``fastkd.process_group`` takes."""
    on_gpu = DEVICE.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world,
        device_id=torch.device("cuda", torch.cuda.current_device()) if on_gpu else None,
    )


def recipe(
    folder: Path,
    sharding: dict[str, Any],
    *,
    prompts: int = 14,
    batch: int = 7,
    micro_batch_tokens: int = 60,
    kl: str = "forward",
    optimizer: dict[str, Any] | None = None,
    **policy: Any,
):
    """A recipe that trains ``folder``/student on what ``folder``/teacher says.

    Args:
        folder: of the two models.
        sharding: ``policy.dtensor_cfg``.
        prompts: of a step.
        batch: sequences of an optimizer step. Seven: no number of ranks divides it, so some get an empty micro-batch.
        micro_batch_tokens: of a packed micro-batch.
        kl: ``loss_fn.kl_type``.
        optimizer: more arguments of AdamW.
        policy: other keys of ``policy``.
    """
    # A large eps: Adam divides by the gradient's size, and would make rounding errors large.
    adamw = {"lr": 1e-3, "eps": 1e-3, **(optimizer or {})}
    return recipe_from(
        {
            "distillation": {"topk_logits_k": 16, "num_prompts_per_step": prompts},
            "loss_fn": {"kl_type": kl, "outside_topk": "bucket"},
            "policy": {
                "model_name": str(folder / "student"),
                "precision": "float32",
                "max_total_sequence_length": 128,
                "train_global_batch_size": batch,
                "sequence_packing": {"enabled": True, "train_mb_tokens": micro_batch_tokens},
                "dtensor_cfg": sharding,
                "max_grad_norm": 0.05,
                "optimizer": {"name": "torch.optim.AdamW", "kwargs": adamw},
                **policy,
            },
            "teacher": {"model_name": str(folder / "teacher")},
            "data": {"train": {"data_path": "unused.jsonl"}},
        }
    ).recipe


def rollouts(silent: int | None = None, sources: tuple[str | None, ...] = (None,)) -> list[Rollout]:
    """Fourteen of up to 12 + 12 random tokens.

    Args:
        silent: one without a response.
        sources: of a blend, in turns.
    """
    rng, made = random.Random(0), []
    for index in range(14):
        prompt, response = (tuple(rng.randrange(VALID) for _ in range(rng.randint(1, 12))) for _ in range(2))
        read = Prompt(index, "", None, "", prompt, source=sources[index % len(sources)])
        made.append(Rollout(read, 0, () if index == silent else response, True, 0))
    return made

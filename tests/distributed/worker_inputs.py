"""What worker programs give to Student and Teacher: a recipe for the folders student and teacher, and sequences."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from fastkd.batch import Prompt, Rollout
from fastkd.recipe import recipe_from

VALID = 97
"""Ids that are tokens."""


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

"""When teacher and student are one model: asked by the workers, and by plans, which must not load torch."""

from __future__ import annotations

from fastkd.config import Recipe


def shares_student(recipe: Recipe) -> bool:
    """Whether the teacher is the student's own model: its frozen base, its running mean, or itself as it learns."""
    own = recipe.teacher.backend == "fastkd"
    return recipe.distillation.context_distillation.shares_weights or (own and is_base_of(recipe))


def is_base_of(recipe: Recipe) -> bool:
    """Whether the student's frozen base can stand for the teacher: same checkpoint and precision, same sharding."""
    policy, teacher = recipe.policy, recipe.teacher
    keys = (
        "tensor_parallel_size",
        "context_parallel_size",
        "expert_parallel_size",
        "sequence_parallel",
        "cpu_offload",
    )
    return (
        policy.dtensor_cfg.lora_cfg.enabled
        and policy.model_name == teacher.model_name
        and policy.precision == teacher.precision
        and all(getattr(policy.dtensor_cfg, key) == getattr(teacher.dtensor_cfg, key) for key in keys)
    )

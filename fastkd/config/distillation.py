"""``distillation``: the loop (batch, steps, validation, top-k) and its two variants, isolation and
context."""

from __future__ import annotations

from fastkd.config.base import Count, Index, Section, derived, section
from fastkd.config.context import ContextDistillation


class Role(Section):
    """The nodes of one role when roles are isolated."""

    num_nodes: Index = 0
    """Whole nodes given to the role."""
    gpus_per_node: Index = derived("${cluster.gpus_per_node}")
    """GPUs used on each of its nodes; must equal `cluster.gpus_per_node`."""


class Roles(Section):
    """The three roles; their nodes must add up to `cluster.num_nodes`."""

    training: Role = section(Role)
    """Nodes that train the student."""
    generation: Role = section(Role)
    """Nodes that write rollouts."""
    teacher: Role = section(Role)
    """Nodes that score rollouts."""


class ResourceIsolation(Section):
    """Training, generation and teacher on disjoint sets of nodes."""

    enabled: bool = False
    """Give every role its own nodes."""
    teacher_resident_on_gpu: bool = True
    """Keep the teacher's weights on its GPUs between steps."""
    roles: Roles = section(Roles)
    """Who gets how many nodes."""


class Distillation(Section):
    """The loop: how many rollouts per step, how many steps, when to validate, how much of the teacher is
    kept."""

    num_prompts_per_step: Count = 128
    """Prompts sampled per step."""
    num_generations_per_prompt: Count = 1
    """Rollouts of each prompt."""
    max_rollout_turns: Count = 1
    """Turns of a rollout; only 1 exists."""
    max_num_steps: Count = 1000
    """Stop after this many steps."""
    max_num_epochs: Count = 10
    """Stop after this many passes over the training prompts, if that comes first."""
    val_batch_size: Count = 64
    """Validation prompts generated at a time."""
    val_period: Index = 20
    """Validate every this many steps; 0 = never in between."""
    val_at_start: bool = False
    """Validate before the first step (not on resume)."""
    val_at_end: bool = False
    """Validate after the last step."""
    max_val_samples: Count | None = 512
    """Validate on at most this many prompts; null = all."""
    val_track_train_metrics: bool = False
    """Also compute the distillation loss on validation rollouts."""
    val_teacher: bool = False
    """Also grade the teacher's own answers once, at the first validation, as `teacher_accuracy`."""
    topk_logits_k: Count = 64
    """K: teacher logits kept per token."""
    seed: int = 42
    """Seed of sampling, data order and initialisation."""
    max_off_policy_steps: Index = 0
    """0: generation, scoring and training of a step in sequence. 1: the next rollouts are written while
    this step trains."""
    resource_isolation: ResourceIsolation = section(ResourceIsolation)
    """Roles on disjoint nodes."""
    context_distillation: ContextDistillation = section(ContextDistillation)
    """Self-distillation with a privileged prompt."""

    @property
    def batch_size(self) -> int:
        """Rollouts of one step: prompts × generations."""
        return self.num_prompts_per_step * self.num_generations_per_prompt

    @property
    def validates(self) -> bool:
        """Whether any validation is scheduled (a validation set is another matter:
        `Recipe.validation_enabled`)."""
        return self.val_period > 0 or self.val_at_start or self.val_at_end

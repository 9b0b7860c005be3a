"""The typed recipe: one frozen pydantic tree whose attribute docstrings are the reference (docs/recipes.md).

Key names are those of NeMo RL's distillation recipes. Single-field rules live on the fields; rules between
fields live in ``fastkd.checks``; keys of other engines that have no effect here are listed in
``fastkd.config.ignored``.
"""

from __future__ import annotations

from typing import NamedTuple

from fastkd.config.base import Section, section
from fastkd.config.context import ContextDistillation, TraceExtractor
from fastkd.config.data import Data, Dataset, Env, MathEnv
from fastkd.config.distillation import Distillation, ResourceIsolation, Role, Roles
from fastkd.config.generation import Generation, SyncProbe, VLLMConfig
from fastkd.config.logger import Checkpointing, Cluster, Logger
from fastkd.config.lora import LoRA
from fastkd.config.loss import KLType, LossFn, Outside
from fastkd.config.policy import Optimizer, Policy, Scheduler, ScoringTeacher, Teacher, Tokenizer
from fastkd.config.quantization import Quantization

__all__ = [
    "Checkpointing",
    "Cluster",
    "ContextDistillation",
    "Data",
    "Dataset",
    "Distillation",
    "Env",
    "Generation",
    "KLType",
    "LoRA",
    "Logger",
    "LossFn",
    "MathEnv",
    "Optimizer",
    "Outside",
    "Policy",
    "Quantization",
    "Recipe",
    "ResourceIsolation",
    "Role",
    "RoleSizes",
    "Roles",
    "Scheduler",
    "ScoringTeacher",
    "Section",
    "SyncProbe",
    "Teacher",
    "Tokenizer",
    "TraceExtractor",
    "VLLMConfig",
]


class RoleSizes(NamedTuple):
    """Devices of each role; a CPU node counts as one device. Roles that share devices count them each."""

    training: int
    generation: int
    teacher: int


class Recipe(Section):
    """Everything one run depends on."""

    distillation: Distillation = section(Distillation)
    """The loop."""
    loss_fn: LossFn = section(LossFn)
    """The divergence."""
    policy: Policy
    """The student."""
    teacher: ScoringTeacher
    """The teacher; absent keys take the value under `policy`."""
    data: Data
    """Prompts."""
    env: Env = section(Env)
    """Grading."""
    logger: Logger = section(Logger)
    """What is recorded."""
    checkpointing: Checkpointing = section(Checkpointing)
    """What is saved."""
    cluster: Cluster = section(Cluster)
    """The machines."""

    @property
    def validation_enabled(self) -> bool:
        """Whether a validation set exists and some validation is scheduled."""
        if self.data.blend.enabled:
            return self.distillation.validates
        has_set = bool(self.data.validation) or any(one.split_validation_size for one in self.data.train)
        return has_set and self.distillation.validates

    @property
    def role_sizes(self) -> RoleSizes:
        """How many devices train, generate and teach.

        Isolated roles own whole nodes. Otherwise the teacher shares the training devices, and so does
        generation unless `policy.generation.colocated` sets some apart (whole nodes, or GPUs of the only
        node).
        """
        per_node = self.cluster.gpus_per_node or self.cluster.cpu_slots_per_node
        if self.distillation.resource_isolation.enabled:
            roles = self.distillation.resource_isolation.roles
            nodes = (roles.training.num_nodes, roles.generation.num_nodes, roles.teacher.num_nodes)
            return RoleSizes(*(count * per_node for count in nodes))
        everything = self.cluster.num_nodes * per_node
        colocated = self.policy.generation.colocated
        if colocated.enabled:
            return RoleSizes(everything, everything, everything)
        if self.cluster.num_nodes > 1:
            apart = (colocated.resources.num_nodes or 0) * per_node
        else:
            apart = colocated.resources.gpus_per_node or 0
        return RoleSizes(everything - apart, apart, everything - apart)

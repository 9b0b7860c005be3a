"""Who computes what: devices, parallel degrees, micro-batches and lengths of the three roles, from a recipe.

Memory is counted for the longest sequences that the recipe allows; time for the mean lengths that ``rates.yaml``
assumes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from fastkd.config import Policy, Recipe, Teacher
from fastkd.errors import RecipeError, RecipeErrors
from fastkd.plan import shapes
from fastkd.plan.rates import Rates
from fastkd.plan.shapes import Shape
from fastkd.recipe import LoadedRecipe
from fastkd.shared_weights import shares_student

RoleName = Literal["training", "generation", "teacher"]
ROLES: tuple[RoleName, ...] = ("training", "generation", "teacher")
SIZES = {"bfloat16": 2, "float32": 4, "auto": 2}
"""Bytes of a number, by the recipe's precision."""


@dataclass(frozen=True, slots=True)
class Mesh:
    """A role's devices: dp × cp × tp."""

    devices: int
    tp: int = 1
    cp: int = 1
    dp: int = 1
    per_node: int = 1
    ep: int = 1
    """Devices that share one set of the experts."""

    @property
    def shards(self) -> int:
        """Ranks that FSDP shards parameters over."""
        return self.dp * self.cp

    @property
    def alone(self) -> bool:
        """One device: not sharded at all."""
        return self.devices == 1

    def __str__(self) -> str:
        parts = [f"TP{self.tp}", *([f"CP{self.cp}"] if self.cp > 1 else []), f"DP{self.dp}"]
        parts += [f"EP{self.ep}"] if self.ep > 1 else []
        return " ".join(parts)


@dataclass(frozen=True, slots=True)
class Engines:
    """A role's devices: engines of tp × pp."""

    devices: int
    count: int
    tp: int
    pp: int
    per_node: int

    def __str__(self) -> str:
        kind = f"TP{self.tp}" + (f" PP{self.pp}" if self.pp > 1 else "")
        return f"{self.count} engine{'s' * (self.count != 1)} {kind}"


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of one rollout."""

    prompt: float
    response: float
    teacher_prompt: float
    longest: float
    """Longest response of a step."""

    @property
    def student(self) -> float:
        """What the student reads: prompt and response."""
        return self.prompt + self.response

    @property
    def teacher(self) -> float:
        """What the teacher reads."""
        return self.teacher_prompt + self.response


@dataclass(frozen=True, slots=True)
class Layout:
    """Everything the arithmetic needs to know of a recipe."""

    recipe: Recipe
    rates: Rates
    student: Shape
    teacher: Shape
    train: Mesh
    score: Mesh
    """Of a teacher in vLLM: dp is the number of its engines."""
    engines: Engines
    """Of generation."""
    lengths: Lengths

    @property
    def pools(self) -> list[tuple[RoleName, ...]]:
        """Roles that share devices, together."""
        if self.recipe.distillation.resource_isolation.enabled:
            return [("training",), ("generation",), ("teacher",)]
        if self.recipe.policy.generation.colocated.enabled:
            return [("training", "generation", "teacher")]
        return [("training", "teacher"), ("generation",)]

    def devices(self, role: RoleName) -> int:
        """Of one role; shared ones count in each."""
        return getattr(self.recipe.role_sizes, role)

    @property
    def teacher_engines(self) -> Engines | None:
        """Of a teacher in vLLM (``teacher.backend``)."""
        if self.recipe.teacher.backend != "vllm":
            return None
        mesh = self.score
        return Engines(mesh.devices, mesh.dp, mesh.tp, 1, mesh.per_node)

    def form(self, role: RoleName) -> Mesh | Engines:
        """How a role's devices are divided."""
        if role == "generation":
            return self.engines
        return self.train if role == "training" else self.teacher_engines or self.score

    @property
    def all_devices(self) -> int:
        """Of the cluster."""
        return self.recipe.cluster.num_nodes * max(self.recipe.cluster.gpus_per_node, 1)

    @property
    def teacher_shares_weights(self) -> bool:
        """Whether the teacher is the student's own module, and has none."""
        return shares_student(self.recipe)

    @property
    def tokens_per_step(self) -> float:
        """Prompt and response tokens of a step, at mean lengths."""
        return self.recipe.distillation.batch_size * self.lengths.student


def read(loaded: LoadedRecipe, rates: Rates) -> Layout:
    """The layout of a recipe.

    Raises:
        ModelError: the sizes of a model are not known.
        RecipeErrors: a model cannot be split as the recipe asks, or has fewer tokens than are to be kept.
    """
    recipe = loaded.recipe
    student = shapes.find("policy.model_name", loaded.locate(recipe.policy.model_name))
    teacher = shapes.find("teacher.model_name", loaded.locate(recipe.teacher.model_name))
    if errors := list(_misfits(recipe, student, teacher)):
        raise RecipeErrors(errors)
    return arrange(recipe, rates, student, teacher)


def _misfits(recipe: Recipe, student: Shape, teacher: Shape) -> Iterator[RecipeError]:
    """``--check`` finds these where the model's files are at hand; a plan knows the shapes without them."""
    degrees = [
        ("policy.dtensor_cfg", recipe.policy.dtensor_cfg.tensor_parallel_size, student),
        ("teacher.dtensor_cfg", recipe.teacher.dtensor_cfg.tensor_parallel_size, teacher),
    ]
    if recipe.policy.generation.backend == "vllm":
        engine = recipe.policy.generation.vllm_cfg
        degrees.append(("policy.generation.vllm_cfg", engine.tensor_parallel_size, student))
    for where, degree, shape in degrees:
        if not shapes.legal_tensor_degree(shape, degree):
            legal = [str(one) for one in range(1, shape.heads + 1) if shapes.legal_tensor_degree(shape, one)]
            yield RecipeError(
                f"{where}.tensor_parallel_size",
                f"{shape.name} has {shape.heads} attention heads, {shape.kv_heads} key/value heads and intermediate "
                f"size {shape.inner}: it must divide the heads and the intermediate size, and divide the key/value "
                "heads or be a multiple of them",
                f"Use one of {', '.join(legal)}",
                value=degree,
            )
    for where, model, shape, devices in (
        ("policy", recipe.policy, student, recipe.role_sizes.training),
        ("teacher", recipe.teacher, teacher, recipe.role_sizes.teacher),
    ):
        key, ep = f"{where}.dtensor_cfg.expert_parallel_size", model.dtensor_cfg.expert_parallel_size
        if ep > 1 and not shape.experts:
            yield RecipeError(key, f"{shape.name} has no experts", "Use 1", value=ep)
        elif ep > 1 and (shape.experts % ep or devices % ep):
            legal = [str(one) for one in range(1, shape.experts + 1) if not (shape.experts % one or devices % one)]
            rule = f"must divide the {shape.experts} experts of {shape.name} and the {devices} devices that hold it"
            yield RecipeError(key, rule, f"Use one of {', '.join(legal)}", value=ep)
    kept, vocab = recipe.distillation.topk_logits_k, min(student.vocab, teacher.vocab)
    if kept > vocab:
        rule = f"K cannot exceed the smaller vocabulary, {vocab} tokens"
        yield RecipeError("distillation.topk_logits_k", rule, f"Write {vocab} or less", value=kept)


def arrange(recipe: Recipe, rates: Rates, student: Shape, teacher: Shape) -> Layout:
    """``read`` for shapes that are known."""
    sizes, per_node = recipe.role_sizes, max(recipe.cluster.gpus_per_node, 1)
    engine = recipe.policy.generation.vllm_cfg
    vllm = recipe.policy.generation.backend == "vllm"
    tp, pp = (engine.tensor_parallel_size, engine.pipeline_parallel_size) if vllm else (1, 1)
    count = max(sizes.generation // (engine.devices if vllm else 1), 1)
    return Layout(
        recipe,
        rates,
        student,
        teacher,
        _mesh(recipe.policy, sizes.training, per_node),
        _mesh(recipe.teacher, sizes.teacher, per_node),
        Engines(sizes.generation, count, tp, pp, per_node),
        _lengths(recipe, rates),
    )


def _mesh(model: Teacher, devices: int, per_node: int) -> Mesh:
    tp, cp = model.dtensor_cfg.tensor_parallel_size, model.dtensor_cfg.context_parallel_size
    ep = model.dtensor_cfg.expert_parallel_size
    return Mesh(devices, tp, cp, max(devices // (tp * cp), 1), per_node, ep)


def _lengths(recipe: Recipe, rates: Rates) -> Lengths:
    total = recipe.policy.max_total_sequence_length
    prompt = min(rates.assumed["prompt_tokens"], recipe.data.max_input_seq_length, max(total - 1, 1))
    room = min(recipe.policy.generation.max_new_tokens, total - prompt)
    response = max(1.0, room * rates.assumed["response_share"])
    longest = max(response, room * rates.assumed["longest_share"])
    teacher_prompt = float(prompt)
    if recipe.distillation.context_distillation.enabled:
        # The prefix shows a solution besides, about as long as a response; a prefix that is too long is cut.
        teacher_prompt = min(prompt + response, max(recipe.teacher.max_total_sequence_length - response, 1.0))
    return Lengths(float(prompt), response, teacher_prompt, longest)


# ---------------------------------------------------------------- micro-batches


def largest_microbatch(model: Teacher, longest: int, *, training: bool) -> int:
    """Most tokens of one micro-batch, over all context-parallel ranks: a sequence longer than the token budget has a
    micro-batch of its own.

    Args:
        model: ``recipe.policy`` or ``recipe.teacher``.
        longest: tokens of a sequence at most.
        training: the training micro-batch; else the scoring one.
    """
    budget = model.train_mb_tokens if training else model.logprob_mb_tokens
    return max(budget, longest) if budget else sequences_per_microbatch(model, training=training) * longest


def sequences_per_microbatch(model: Teacher, *, training: bool) -> int:
    """Of micro-batches by count."""
    return model.train_micro_batch_size if training and isinstance(model, Policy) else model.logprob_batch_size


def microbatches(model: Teacher, sequences: float, tokens: float, *, training: bool) -> int:
    """How many micro-batches ``sequences`` of mean length ``tokens`` make on one data-parallel rank."""
    budget = model.train_mb_tokens if training else model.logprob_mb_tokens
    if budget is None:
        return max(1, math.ceil(sequences / sequences_per_microbatch(model, training=training)))
    return max(1, math.ceil(sequences / max(1, int(budget // tokens))))

"""``policy`` (the student) and ``teacher``: model, lengths, precision, sharding, batching, optimiser."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, field_validator

from fastkd.config.base import Count, Positive, Section, broken_rule, derived, section
from fastkd.config.generation import Generation
from fastkd.config.lora import LoRA
from fastkd.config.quantization import QuantizationKeys


class Tokenizer(Section):
    """The tokenizer and its chat template."""

    name: str = derived("${..model_name}")
    """Hugging Face id or folder of the tokenizer."""
    chat_template: str | None = None
    """A Jinja chat template, or a file that holds one, in place of the tokenizer's own."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the chat template, e.g. `{enable_thinking: true}`."""


class DTensorConfig(Section):
    """Sharding of a model over its GPUs: tensor × context × data parallel (FSDP2)."""

    enabled: bool = True
    """Kept for old recipes: there is no other backend, false gives a warning."""
    tensor_parallel_size: Count = 1
    """GPUs that split every layer."""
    context_parallel_size: Count = 1
    """GPUs that split every sequence."""
    expert_parallel_size: Count = 1
    """GPUs that share one set of the experts of a mixture-of-experts model, of all GPUs that hold the model."""
    sequence_parallel: bool = False
    """Split norms and residuals along the sequence inside a tensor-parallel group."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    cpu_offload: bool = False
    """Keep weights and optimizer state in host memory."""
    torch_compile: bool = False
    """Compile every block of a sharded model with `torch.compile`."""


class StudentDTensorConfig(DTensorConfig):
    """Sharding of the student, and what of it is trained."""

    lora_cfg: LoRA = section(LoRA)
    """Adapters in place of training all weights."""


class SequencePacking(Section):
    """Micro-batches by token budget, sequences packed by first-fit."""

    enabled: bool = False
    """Fill micro-batches up to a number of tokens instead of taking a number of sequences."""
    train_mb_tokens: Count = derived("${..max_total_sequence_length}")
    """Tokens of a training micro-batch."""
    logprob_mb_tokens: Count = derived("${..max_total_sequence_length}")
    """Tokens of a scoring micro-batch."""
    algorithm: Literal[
        "modified_first_fit_decreasing", "first_fit_decreasing", "first_fit_shuffle", "concatenative"
    ] = "modified_first_fit_decreasing"
    """How sequences are placed into micro-batches."""


class DynamicBatching(Section):
    """Micro-batches by token budget, sequences sorted by length."""

    enabled: bool = False
    """Fill micro-batches up to a number of tokens. Exclusive with `sequence_packing`."""
    train_mb_tokens: Count = derived("${..max_total_sequence_length}")
    """Tokens of a training micro-batch."""
    logprob_mb_tokens: Count = derived("${..max_total_sequence_length}")
    """Tokens of a scoring micro-batch."""


class Optimizer(Section):
    """A torch optimizer by name."""

    name: str = "torch.optim.AdamW"
    """Dotted name of the class in `torch.optim`."""
    kwargs: dict[str, Any] = Field(default_factory=lambda: {"lr": 2e-5})
    """Its keyword arguments; what is not given here keeps torch's default."""

    @field_validator("kwargs")
    @classmethod
    def _sane(cls, value: dict[str, Any]) -> dict[str, Any]:
        # torch accepts several of these silently (lr=0 trains nothing) and refuses the rest only at the first step.
        def number(item: Any) -> bool:
            return isinstance(item, (int, float)) and not isinstance(item, bool) and math.isfinite(item)

        lr: Any = value.get("lr")
        decay, betas = value.get("weight_decay", 0), value.get("betas")
        if not number(lr) or lr <= 0:
            raise broken_rule("must be a number above 0", "Large models take 1e-6 to 2e-5", key="lr", value=lr)
        if not number(decay) or decay < 0:
            raise broken_rule("must be a number of at least 0", "0 is off", key="weight_decay", value=decay)
        pair = isinstance(betas, list) and len(betas) == 2 and all(number(b) and 0 <= b < 1 for b in betas)
        if betas is not None and not pair:
            raise broken_rule("must be two numbers in [0, 1)", "Write [0.9, 0.999]", key="betas", value=betas)
        return value


class Scheduler(Section):
    """One entry of the schedule: a torch scheduler, or the milestones between them."""

    name: str | None = None
    """Dotted name of the class in `torch.optim.lr_scheduler`."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Its keyword arguments; counts are distillation steps."""
    milestones: list[Count] | None = None
    """The steps at which the next scheduler takes over (an entry of its own, without `name`)."""


class Teacher(Section):
    """A model and how it scores."""

    model_name: str = Field(min_length=1)
    """Hugging Face id or folder of the model."""
    tokenizer: Tokenizer = section(Tokenizer)
    """Tokenizer and chat template."""
    logprob_batch_size: Count = 1
    """Sequences of a scoring micro-batch when no token budget is on."""
    max_total_sequence_length: Count = 8192
    """Longest prompt and response together, in tokens."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Number format of the forward and backward passes."""
    dtensor_cfg: DTensorConfig = section(DTensorConfig)
    """Sharding."""
    sequence_packing: SequencePacking = section(SequencePacking)
    """Micro-batches by token budget."""
    dynamic_batching: DynamicBatching = section(DynamicBatching)
    """Micro-batches by token budget, the older form."""

    @property
    def train_mb_tokens(self) -> int | None:
        """Token budget of a training micro-batch; None = `train_micro_batch_size` sequences."""
        budget = self._token_budget
        return budget.train_mb_tokens if budget else None

    @property
    def logprob_mb_tokens(self) -> int | None:
        """Token budget of a scoring micro-batch; None = `logprob_batch_size` sequences."""
        budget = self._token_budget
        return budget.logprob_mb_tokens if budget else None

    @property
    def _token_budget(self) -> SequencePacking | DynamicBatching | None:
        return next((one for one in (self.sequence_packing, self.dynamic_batching) if one.enabled), None)


class ScoringTeacher(Teacher):
    """The teacher. Every key that is absent takes the value of the same key under `policy`, but for `backend`."""

    backend: Literal["fastkd", "vllm"] = "fastkd"
    """Who scores: fastkd's own sharded teacher, or vLLM (slower; for a model that fastkd cannot shard)."""


class Policy(Teacher, QuantizationKeys):
    """The student: what the teacher has, plus training and generation."""

    dtensor_cfg: StudentDTensorConfig = section(StudentDTensorConfig)
    """Sharding."""
    train_global_batch_size: Count = 64
    """Rollouts per optimizer step, over all data-parallel ranks."""
    train_micro_batch_size: Count = 1
    """Sequences of a training micro-batch when no token budget is on."""
    generation_batch_size: Count = 64
    """Prompts generated at a time by `backend: transformers`."""
    max_grad_norm: Positive | None = 1.0
    """Clip the gradient's norm to this; null = never."""
    optimizer: Optimizer = section(Optimizer)
    """The optimizer."""
    scheduler: list[Scheduler] = Field(default_factory=list)
    """Learning-rate schedule, one tick per distillation step; empty = constant."""
    generation: Generation = section(Generation)
    """How rollouts are sampled."""

    @field_validator("scheduler", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [] if value is None else [value] if isinstance(value, dict) else value

    @field_validator("scheduler")
    @classmethod
    def _joined(cls, value: list[Scheduler]) -> list[Scheduler]:
        for position, entry in enumerate(value):
            if (entry.name is None) == (entry.milestones is None):
                rule = "an entry has either name (and kwargs) or milestones"
                raise broken_rule(rule, "Split it into two entries", key=str(position))
        named = [entry for entry in value if entry.name is not None]
        steps = [step for entry in value for step in entry.milestones or []]
        if named and len(steps) != len(named) - 1:
            rule = f"{len(named)} schedulers need {len(named) - 1} milestones, got {steps}"
            raise broken_rule(rule, "Add an entry milestones: [...] with the steps between schedulers")
        if steps != sorted(set(steps)):
            raise broken_rule(f"milestones must rise, got {steps}", "Sort them")
        return value

    @property
    def schedulers(self) -> list[Scheduler]:
        """The schedulers in order, without the milestones entry."""
        return [entry for entry in self.scheduler if entry.name is not None]

    @property
    def milestones(self) -> list[int]:
        """The steps at which the next scheduler takes over: one fewer than `schedulers`."""
        return [step for entry in self.scheduler for step in entry.milestones or []]

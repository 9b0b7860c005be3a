"""One worst-case step of each role, measured beside the plan of the same step.

Training: two micro-batches of the longest sequences, forward, backward, clipping and the optimizer's step, so that
gradients are there while the second one computes; before it, one forward and backward shows what is kept for backward
and what the loss kernel takes. Teacher: its share of a step, at most two micro-batches. Generation: the whole batch,
for a bounded number of tokens. The plan is asked about just these steps (``scoring_recipe``, ``sampling_recipe``).

Which sequences are the longest: where tokens fill a micro-batch, the longest responses after hardly any prompt, so
that nearly every row counts; where their number does, ``max_total_sequence_length`` tokens of which ``max_new_tokens``
count.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkd import grad_norm, parallel
from fastkd.batch import Prompt, Rollout, pack
from fastkd.config import Recipe
from fastkd.config import Teacher as Model
from fastkd.kernels import TopK
from fastkd.losses import FusedLoss
from fastkd.memory_test_meter import Meter, Reading
from fastkd.plan.assemble import Plan
from fastkd.plan.layout import SIZES, Layout, RoleName, sequences_per_microbatch
from fastkd.plan.memory import OUTSIDE, RoleMemory
from fastkd.rollout import Generation, Request
from fastkd.sampling import Sampler
from fastkd.student import Student
from fastkd.teacher import Teacher

TOLERANCE = 0.1
SLACK = 2 << 20
"""Bytes of single operators' temporaries, which no plan counts. What a model holds is exact, and needs none."""
HELD = ("parameters", "gradients", "optimizer", "running mean")


@dataclass(frozen=True, slots=True)
class Line:
    """One figure of a role, in bytes."""

    role: RoleName
    item: str
    planned: float
    measured: float
    judged: bool = True
    """Whether a difference beyond the tolerance is a failure."""

    @property
    def difference(self) -> float:
        """Planned less measured, as a share of what was measured; 0 where both are nothing."""
        if self.measured:
            return self.planned / self.measured - 1
        return float(self.planned > 0)

    @property
    def holds(self) -> bool:
        """Whether the plan was right."""
        allowed = max(TOLERANCE * self.measured, 0 if self.item in HELD else SLACK)
        return not self.judged or abs(self.planned - self.measured) <= allowed


# ---------------------------------------------------------------- the steps that are measured


def longest(recipe: Recipe, model: Model, *, training: bool) -> list[Rollout]:
    """The sequences of one micro-batch, with tokens below 2: every vocabulary has them.

    Args:
        model: ``recipe.policy`` or ``recipe.teacher``.
        training: the training micro-batch; else the scoring one, which has no more sequences than a step.
    """
    budget = model.train_mb_tokens if training else model.logprob_mb_tokens
    most = -(-recipe.distillation.batch_size // _ranks(recipe, model))  # a packed sequence lacks its last token
    fit, new = model.max_total_sequence_length - 1, recipe.policy.generation.max_new_tokens
    if budget is None:
        count = sequences_per_microbatch(model, training=training)
        lengths = [fit] * (count if training else min(count, most))
    else:
        room = max(budget, fit)
        count = max(1, room // min(new, fit)) if training else min(max(1, room // min(new, fit)), most)
        lengths = [min(fit, room // count)] * count
        rest = min(room - sum(lengths), fit)
        if 16 * rest > room and (training or count < most):  # a few tokens beside long sequences would be all padding
            lengths.append(rest)
    rng = random.Random(0)
    return [
        Rollout(Prompt(index, "", None, "", (1,) * (length + 1 - n)), 0, tuple(rng.choices((0, 1), k=n)), True, 0)
        for index, length in enumerate(lengths)
        for n in [min(new, length)]
    ]


def scoring_recipe(recipe: Recipe) -> Recipe:
    """With as many rollouts per step as are scored here: two micro-batches on every rank, or what a step has."""
    loop = recipe.distillation
    scored = min(loop.batch_size, 2 * _ranks(recipe, recipe.teacher) * len(_scored(recipe)))
    return _changed(recipe, "distillation", num_prompts_per_step=scored, num_generations_per_prompt=1)


def sampling_recipe(recipe: Recipe, tokens: int) -> Recipe:
    """With ``tokens`` new tokens at most, after the longest prompts."""
    total, new = recipe.policy.max_total_sequence_length, recipe.policy.generation.max_new_tokens
    prompt = max(1, min(recipe.data.max_input_seq_length, total - 1))
    new = min(new, tokens, total - prompt)
    generation = recipe.policy.generation.model_copy(update={"max_new_tokens": new})
    return _changed(recipe, "policy", generation=generation, max_total_sequence_length=prompt + new)


def _changed(recipe: Recipe, section: str, **update: Any) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=update)})


def _scored(recipe: Recipe) -> list[Rollout]:
    return longest(recipe, recipe.teacher, training=False)


def _ranks(recipe: Recipe, model: Model) -> int:
    """Data-parallel ranks."""
    devices = recipe.role_sizes.training if model is recipe.policy else recipe.role_sizes.teacher
    degrees = model.dtensor_cfg
    return max(1, devices // (degrees.tensor_parallel_size * degrees.context_parallel_size))


# ---------------------------------------------------------------- training


def training(student: Student, layout: Layout) -> list[Line]:
    """Parameters, gradients, optimizer, what a forward keeps, the loss kernel, and the peak of a step.

    Args:
        student: one device's, or one rank's of a mesh; its optimizer has not stepped. Its weights are of no use
            afterwards.
        layout: of its recipe, on a device of its kind.
    """
    recipe, plan = layout.recipe, Plan(layout).memory["training"]
    meter, kept_logits = Meter(student.device), recipe.distillation.topk_logits_k
    batch = longest(recipe, recipe.policy, training=True)
    rollouts = batch * (2 * parallel.data_rank(student.mesh)[1])
    vocab = student.valid_vocab or layout.student.vocab
    targets = [_rows(len(one.response), kept_logits, vocab) for one in rollouts]
    _warm_up(student, kept_logits, vocab)
    ahead = _one_forward(student, rollouts, targets, meter)
    gradients = _bytes(p.grad for p in student.parameters if p.grad is not None)
    student.optimizer.zero_grad(set_to_none=True)
    step = meter.of(lambda: _step(student, rollouts, targets))

    weights = _bytes(student.causal_lm.parameters())
    states = _bytes(x for one in student.optimizer.state.values() for x in one.values() if x.dim())
    means = _bytes(student.mean.means.values()) if student.mean is not None else 0
    rows, between = plan.moments["loss"], plan.moments["optimizer"]
    state = between.get("parameters", 0.0) + between.get("master weights", 0.0)
    # Made inside the loss, and counted with the weights and the activations.
    copies = 0
    if student.autocast_dtype is not None:
        size = SIZES[recipe.policy.precision]
        copies = size * layout.student.hidden * (layout.student.vocab + plan.facts["tokens of a micro-batch"])
    forward = rows["activations"] + rows.get("all-gather", 0.0) + rows.get("quantised weights", 0.0)
    forward += rows["parameters"] - between["parameters"] - copies
    lines = [
        Line("training", "parameters", state, weights),
        Line("training", "gradients", rows["gradients"], gradients),
        Line("training", "optimizer", rows["optimizer"], states),
        Line("training", "kept by a forward", forward, ahead.forward.kept, judged=False),
        Line("training", "loss kernel", rows["loss kernel"] + copies, ahead.loss.peak),
        Line("training", "peak of a step", peak(plan), weights + states + means + step.peak),
    ]
    if means:
        lines.insert(3, Line("training", "running mean", between["running mean"], means))
    return lines


@dataclass(slots=True)
class _Ahead:
    """One forward."""

    forward: Reading
    """Until the head."""
    loss: Reading


def _warm_up(student: Student, kept: int, vocab: int) -> None:
    """Everything that the first step makes: the optimizer's state, scales of quantised activations, workspaces."""
    count = 2 * parallel.data_rank(student.mesh)[1]
    short = [Rollout(Prompt(index, "", None, "", (1,)), 0, (1,) * 8, True, 0) for index in range(count)]
    if student.needs_calibration:
        student.calibrate(short)
    _step(student, short, [_rows(8, kept, vocab)] * count)


def _step(student: Student, rollouts: Sequence[Rollout], targets: Sequence[TopK]) -> None:
    """An optimizer step as ``Student.train`` takes it, whatever the loss is: of a rank on its own it is no number."""
    for loss, *_ in student._forward(rollouts, targets, weight=1e-6, divergence=student.divergence):
        loss.loss.backward()
    grad_norm.clip_grad_norm(student.parameters, student.policy.max_grad_norm)
    student.optimizer.step()
    student.optimizer.zero_grad(set_to_none=True)


def _one_forward(student: Student, rollouts: Sequence[Rollout], targets: Sequence[TopK], meter: Meter) -> _Ahead:
    """Forward and backward of one micro-batch, its loss measured apart."""
    places = student._micro_batches(rollouts)[0]
    batch = pack([rollouts[place] for place in places]).to(student.device)
    teacher = TopK(*(torch.cat(parts).to(student.device) for parts in zip(*(targets[p] for p in places), strict=True)))
    weights_A = torch.full((len(batch.labels_A),), 1e-6, device=student.device)
    fused = FusedLoss(student.divergence, teacher, weights_A, student.valid_vocab)
    found: list[Reading] = []

    def head(*args: Any) -> Any:
        found.append(meter.stop())
        meter.start()
        out = fused(*args)
        found.append(meter.stop())
        return out

    meter.start()
    with student.autocast():
        loss = student.model(batch, head)
    loss.loss.backward()
    return _Ahead(*found)


# ---------------------------------------------------------------- teacher and generation


def scoring(teacher: Teacher, layout: Layout) -> list[Line]:
    """Parameters, unless they are the student's, and the peak while rollouts are scored.

    Args:
        layout: of ``scoring_recipe``.
    """
    recipe, plan = layout.recipe, Plan(layout).memory["teacher"]
    batch = _scored(recipe)
    rollouts = (batch * -(-recipe.distillation.batch_size // len(batch)))[: recipe.distillation.batch_size]
    teacher.score([Rollout(Prompt(0, "", None, "", (1,)), 0, (1,) * 8, True, 0)])  # workspaces
    reading = Meter(teacher.device).of(lambda: teacher.score(rollouts))
    if teacher.shared is not None:
        return [Line("teacher", "peak of scoring", peak(plan), reading.peak)]
    weights = _bytes(teacher.causal_lm.parameters())
    planned = min(rows["parameters"] for rows in plan.moments.values())
    return [
        Line("teacher", "parameters", planned, weights),
        Line("teacher", "peak of scoring", peak(plan), weights + reading.peak),
    ]


def sampling(generation: Generation, layout: Layout, *, own: bool) -> list[Line]:
    """The peak while a batch is sampled by transformers.

    Args:
        generation: of the recipe of ``layout``.
        layout: of ``sampling_recipe``.
        own: it has weights of its own.
    """
    recipe, plan = layout.recipe, Plan(layout).memory["generation"]
    limit, new = recipe.policy.max_total_sequence_length, recipe.policy.generation.max_new_tokens
    count = int(plan.facts["longest sequences held"])
    prompts = [Prompt(index, "", None, "", (1,) * (limit - new)) for index in range(count)]
    generation._stop_ids = generation._stop_ids.new_tensor([-1])  # no token: all of them go on to the end
    generation.stop_strings = None
    generation.max_new_tokens, generation.max_total_tokens = new, limit
    request = Request(Sampler(*recipe.policy.generation.sampling()))
    reading = Meter(generation.device).of(lambda: generation.sample(prompts, request, batch_size=count))
    weights = _bytes(generation.causal_lm.parameters()) if own else 0
    lines = [Line("generation", "peak of sampling", peak(plan), weights + reading.peak)]
    if own:
        lines.insert(0, Line("generation", "parameters", plan.moments["sampling"]["parameters"], weights))
    return lines


# ---------------------------------------------------------------- bytes


def peak(plan: RoleMemory) -> float:
    """A plan's peak, without what no tensor accounts for."""
    return max(sum(size for row, size in rows.items() if row not in OUTSIDE) for rows in plan.moments.values())


def _bytes(tensors: Iterable[Any]) -> int:
    """Of this process's parts; what occurs twice counts once."""
    local: Iterable[Tensor] = (one.to_local() if hasattr(one, "to_local") else one for one in tensors)
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in local}.values())


def _rows(tokens: int, kept: int, vocab: int) -> TopK:
    """[tokens, K] teacher rows of made-up logits."""
    ids = torch.randperm(vocab, generator=torch.Generator().manual_seed(0))[:kept].sort().values.int()
    logits = torch.linspace(3.0, 0.0, kept)
    full = torch.full((tokens,), float(logits.logsumexp(0)) + 1.0)
    return TopK(ids.repeat(tokens, 1), logits.repeat(tokens, 1), full, full - 1.5)

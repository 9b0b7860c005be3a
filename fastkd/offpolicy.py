"""Off-policy distillation: the same loop on texts that exist (``data.blend``), which nobody has to sample.

One step: read the next samples of the blend, let the teacher score them, train. Saving, resuming, stopping and
recording are the runner's. A step in ``iterations_to_skip`` uses up its samples and changes nothing else: neither the
weights nor the schedule, as in Megatron.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastkd import by_source, log, metrics
from fastkd.batch import Rollout
from fastkd.blends.places import run_length
from fastkd.blends.stream import BlendStream, open_blend
from fastkd.config.blend import Blend
from fastkd.context_distillation import Readings
from fastkd.describe import outline
from fastkd.driver import Inputs, RunFolder, settle
from fastkd.log import logger
from fastkd.metrics import Metrics
from fastkd.recipe import LoadedRecipe
from fastkd.roles import Roles, Scored
from fastkd.runner import Runner, drive
from fastkd.stop import Stop

_AGES = ("rollout/staleness_mean", "rollout/staleness_max", "rollout/dropped_stale")


@dataclass(frozen=True, slots=True)
class Texts:
    """What an off-policy run reads."""

    blend: Blend
    train: BlendStream
    validation: Sequence[Rollout]
    """The first samples of the blend's ``valid`` split, the same at every validation."""
    samples: int
    """Samples that the whole run consumes."""


@dataclass(frozen=True)
class OffPolicyInputs(Inputs):
    """The runner's inputs; its prompts are the samples of a blend."""

    steps: int = 0

    @property
    def last_step(self) -> int:
        """The step after which the run is complete."""
        return self.steps


class OffPolicyRunner(Runner):
    """``Runner`` whose batches come from a blend."""

    def __init__(
        self,
        loaded: LoadedRecipe,
        inputs: Inputs,
        folder: RunFolder,
        roles: Roles,
        texts: Texts,
        stop: Stop | None = None,
    ):
        super().__init__(loaded, inputs, folder, roles, stop)
        self.texts = texts
        self.stale_limit = sys.maxsize  # texts do not age, whatever was scored ahead
        with_loss = self.config.val_track_train_metrics
        self.validator = TextValidator(texts.validation, roles, with_loss)  # pyright: ignore[reportAttributeAccessIssue]

    def step(self) -> Metrics:
        """Read and score, train; or pass the samples over."""
        if not self.texts.blend.skips(self.step_number + 1):
            found = super().step()
            return {name: value for name, value in found.items() if name not in _AGES}
        with self.spans.measure("step"):
            batch = self.batches.next(self.step_number + 1)
        self.step_number += 1
        self.consumed_prompts = batch.consumed
        return self._rollout_metrics([]) | {"train/skipped": 1.0}

    def _collect(self, step: int, sampled: Callable[[], None]) -> Scored:
        # ``sampled`` is never called: the next step is read once this one is scored.
        stream = self.texts.train
        if self.texts.blend.skips(step):
            stream.skip()
            return _scored([], [], stream.consumed)
        with self.spans.measure("data"):
            rollouts = stream.next()
        found = by_source.given(stream.names, rollouts)
        with self._phase("scoring", "teacher"):
            return _scored(rollouts, self.roles.score(rollouts), stream.consumed, found)

    def _say(self, found: Metrics) -> None:
        if "train/skipped" in found:
            logger.info(f"step {self.step_number}/{self.last_step} | skipped (data.blend.iterations_to_skip)")
            return
        # Nothing is sampled: the time before scoring is that of reading and tokenising; ahead, a step before told it.
        times = self.spans.peek()
        times["timing/generation"] = times.pop("timing/data", 0.0)
        loss = "jsd" if self.recipe.loss_fn.kl_type == "jsd" else "kl"
        line = metrics.step_line(self.step_number, self.last_step, found | times, loss)
        logger.info(line.replace("| gen ", "| data "))


@dataclass(frozen=True, slots=True)
class TextValidator:
    """The divergence on texts that are not trained on, with the methods of ``fastkd.validate.Validator``."""

    rollouts: Sequence[Rollout]
    roles: Roles
    with_loss: bool
    """Also the recipe's own loss."""

    def run(self, step: int, *, first: bool) -> Metrics:
        """Score and compare; ``first`` makes no difference."""
        with log.bars.phase("validating", len(self.rollouts)):
            batch = _scored(self.rollouts, self.roles.score(self.rollouts), 0)
            found = self.roles.divergences(batch, with_loss=self.with_loss)
        logger.info(f"validation at step {step} | kl {found['kl']:.4f} | {len(self.rollouts)} samples")
        return {f"validation/{name}": value for name, value in found.items()}


def _scored(rollouts: Sequence[Rollout], rows: Sequence[Any], consumed: int, found: Metrics | None = None) -> Scored:
    return Scored(rollouts, Readings(rollouts, rollouts, found or {}), rows, consumed)


def prepare(loaded: LoadedRecipe, blend: Blend) -> tuple[Inputs, Texts]:
    """Check everything that needs a tokenizer or the data, and open the blend.

    Raises:
        UserError: one of its kinds, naming the key at fault.
    """
    pair = settle(loaded)
    recipe, tokenizer = pair.recipe, pair.tokenizer
    policy, teacher = recipe.policy, recipe.teacher
    steps, samples = run_length(recipe, blend)

    def stream(split: str) -> BlendStream | None:
        return open_blend(
            blend,
            tokenizer,
            batch=recipe.distillation.num_prompts_per_step,
            limit=min(policy.max_total_sequence_length, teacher.max_total_sequence_length),
            split=split,
            folders=loaded.folders,
            template_kwargs=policy.tokenizer.chat_template_kwargs,
        )

    train = stream("train")
    assert train is not None  # a blend without a train split is refused when it is read
    validation: list[Rollout] = []
    if recipe.distillation.validates and (held_out := stream("valid")) is not None:
        everything = sum(len(source) for source in held_out.sources)
        validation = held_out.next(min(recipe.distillation.max_val_samples or everything, everything))
    inputs = OffPolicyInputs(
        recipe,
        tokenizer,
        train,  # pyright: ignore[reportArgumentType]
        validation,  # pyright: ignore[reportArgumentType]
        pair.student_vocab,
        pair.teacher_vocab,
        steps=steps,
    )
    return inputs, Texts(blend, train, validation, samples)


def opening(loaded: LoadedRecipe, inputs: Inputs, texts: Texts) -> None:
    """The recipe in outline, ignored keys, the sources with their epochs, and the first sample."""
    for line in outline(loaded):
        logger.info(line)
    for key in loaded.ignored:
        logger.info(f"no effect here: {key}")
    for place, share in enumerate(texts.train.shares(texts.samples)):
        logger.info(f"{'' if place else 'blend':<12}{share}")
        if share.epochs > 1:
            logger.info(f"{'':<12}the documents of {share.path} repeat; data.blend.train_samples sets how often")
    logger.info(
        f"{'loaded':<12}{texts.samples:,} samples in {inputs.last_step} steps, "
        f"{len(texts.validation)} validation samples"
    )
    consumed, example = texts.train.consumed, texts.train.next(1)[0]
    texts.train.consumed = consumed
    shown = texts.train.text(example)
    shown = shown if len(shown) <= 400 else f"{shown[:400]}…"
    logger.info(
        f"{'a sample':<12}{shown!r} ({len(example.prompt.tokens) + len(example.response)} tokens, "
        f"{len(example.response)} of them count)"
    )


def run(loaded: LoadedRecipe, blend: Blend) -> None:
    """Run a recipe on its blend to the end; resumes by itself.

    Raises:
        UserError: the recipe, data or models cannot be used; nothing was written.
        NonFiniteLoss: training diverged; the last good checkpoint is kept.
        WorkerError: a worker failed.
    """
    log.configure()
    inputs, texts = prepare(loaded, blend)

    def build(folder: RunFolder, roles: Roles, stop: Stop) -> Runner:
        return OffPolicyRunner(loaded, inputs, folder, roles, texts, stop)

    more = "Give another logger.log_dir to start anew"
    drive(loaded, inputs, more, lambda: opening(loaded, inputs, texts), build)

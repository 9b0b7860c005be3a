"""The loop: ``Runner.step`` is the whole engine in one sentence; validation, saving and logging are around it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from fastkd import log, metrics
from fastkd.batch import Rollout
from fastkd.checkpoint import Checkpoints, TrainingInfo, Workers
from fastkd.driver import Inputs, RunFolder, prepare
from fastkd.errors import CheckpointError, NonFiniteLoss
from fastkd.log import bars, console, logger
from fastkd.metrics import Metrics, Recorder
from fastkd.plot import plot
from fastkd.pools import LocalPool, local_device
from fastkd.profiling import Spans, memory_gib
from fastkd.recipe import LoadedRecipe
from fastkd.report import closing_table, opening, summarise
from fastkd.rollout import Generation, Request
from fastkd.sampling import Sampler
from fastkd.student import Student
from fastkd.teacher import Teacher, shares_student
from fastkd.validate import Validator


class Runner:
    """One run: its pools, its place in the data, and the cadence of everything around a step."""

    def __init__(self, loaded: LoadedRecipe, inputs: Inputs, folder: RunFolder):
        self.loaded, self.inputs, self.folder = loaded, inputs, folder
        self.recipe = recipe = inputs.recipe
        self.config = recipe.distillation
        self.prompts = inputs.train
        self.device = local_device(recipe.cluster)
        self.spans = Spans()
        self.student = LocalPool("student", Student, recipe, self.device, inputs.student_vocab)
        student = self.student.worker
        shared = student if shares_student(recipe) else None
        self.teacher = LocalPool("teacher", Teacher, recipe, self.device, inputs.teacher_vocab, None, shared)
        teacher = self.teacher.worker
        # In one process the student's own tensors generate: a sync has nothing to move.
        self.generation = LocalPool(
            "generation",
            Generation.embedded,
            recipe,
            student.causal_lm,
            inputs.tokenizer,
            inputs.student_vocab,
            student.autocast_dtype,
        )
        teacher_generation = LocalPool(
            "generation",
            Generation.embedded,
            recipe,
            teacher.causal_lm,
            inputs.tokenizer,
            inputs.teacher_vocab,
            base=True,
        )
        teacher_generation.worker.max_total_tokens = recipe.teacher.max_total_sequence_length
        self.validator = Validator(
            inputs,
            folder.path,
            self.generation,
            self.teacher,
            self.student,
            teacher_generation if self.config.val_teacher else None,
        )
        workers = Workers(
            save=partial(self.student.run, Student.save),
            saved=partial(self.student.run, Student.saved),
            load=partial(self.student.run, Student.load),
        )
        self.checkpoints = Checkpoints(recipe.checkpointing, workers)
        self.step_number = 0
        self.total_tokens = 0
        self.last_step = inputs.last_step

    # --- one step -----------------------------------------------------------------------------------------------

    def step(self) -> Metrics:
        """Sample, score, train, sync."""
        with self.spans.measure("step"):
            prompts = self.prompts.next()
            with self._phase("sampling", "generation"):
                rollouts = self.generation.run(Generation.sample, prompts, self._request())
            readings = self.inputs.readings(rollouts)
            with self._phase("scoring", "teacher"):
                targets = self.teacher.run(Teacher.score, readings.teacher)
            with self._phase("training", "training"):
                trained = self.student.run(Student.train, readings.student, targets)
            with self.spans.measure("sync"):
                self.generation.run(Generation.adopt, self.student.worker.version)
        self.step_number += 1
        return trained | self._rollout_metrics(rollouts) | readings.metrics

    @contextmanager
    def _phase(self, shown: str, span: str) -> Iterator[None]:
        with self.spans.measure(span), bars.phase(shown, self.config.batch_size):
            yield

    def _request(self) -> Request:
        sampler = Sampler(*self.recipe.policy.generation.sampling())
        return Request(sampler, self.config.num_generations_per_prompt, self.config.seed, step=self.step_number + 1)

    def _rollout_metrics(self, rollouts: Sequence[Rollout]) -> Metrics:
        lengths = [len(rollout.response) for rollout in rollouts if rollout.response]
        prompt_tokens = sum(len(rollout.prompt.tokens) for rollout in rollouts if rollout.response)
        self.total_tokens += prompt_tokens + sum(lengths)
        count = max(len(lengths), 1)
        return {
            "rollout/mean_length": sum(lengths) / count,
            "rollout/max_length": float(max(lengths, default=0)),
            "rollout/mean_prompt_length": prompt_tokens / count,
            "rollout/truncation_rate": sum(bool(r.response) and not r.finished for r in rollouts) / count,
            "rollout/masked_samples": float(sum(not rollout.response for rollout in rollouts)),
            "rollout/tokens": float(prompt_tokens + sum(lengths)),
        }

    # --- around the steps ---------------------------------------------------------------------------------------

    def run(self) -> None:
        """All steps that are left, then the summary."""
        resumed = self._resume()
        elapsed_before = resumed.elapsed_seconds if resumed else 0.0
        began = time.monotonic()
        deadline = _seconds(self.recipe.checkpointing.checkpoint_must_save_by)
        recorder = Recorder(
            self.folder.metrics, self.recipe.logger, resumed.step if resumed else None, self.loaded.resolved
        )

        def elapsed() -> float:
            return elapsed_before + time.monotonic() - began

        def record(found: Metrics) -> None:
            recorder.write(self.step_number, found | self.spans.take() | {"timing/elapsed": elapsed()})

        try:
            with bars.run(self.last_step, self.step_number), self.checkpoints.finishing():
                if self.step_number == 0 and self.config.val_at_start and self.inputs.validation:
                    record(self._validate(first=True) | self._memory())
                while self.step_number < self.last_step:
                    found = self._guarded_step()
                    found |= self._memory()
                    found["timing/tokens_per_second"] = found["rollout/tokens"] / self.spans.seconds("step")
                    self._say(found)
                    if self._validation_due():
                        found |= self._validate(first=not self._validated_before())
                    record(found)
                    self.checkpoints.poll()
                    late = deadline is not None and time.monotonic() - began > deadline
                    if self._checkpoint_due() or late:
                        self._save(found, elapsed())
                    bars.stepped()
                    if late and self.step_number < self.last_step:
                        logger.info(
                            f"stopped after step {self.step_number} to keep checkpointing.checkpoint_must_save_by="
                            f"{self.recipe.checkpointing.checkpoint_must_save_by}; the same command resumes"
                        )
                        return
        finally:
            recorder.close()
        self._finish()

    def _guarded_step(self) -> Metrics:
        try:
            return self.step()
        except NonFiniteLoss as error:
            with suppress(CheckpointError):
                self.checkpoints.finish()
            kept = self.checkpoints.steps()
            where = f"the last good checkpoint is {self.checkpoints.path(kept[-1])}" if kept else "no checkpoint yet"
            raise NonFiniteLoss(f"step {self.step_number + 1}: {error} ({where}).") from error

    def _memory(self) -> Metrics:
        # Asked once per line of metrics: on a GPU it is the peak since it was last asked.
        return {"memory/all_gib": memory_gib(self.device)}

    def _say(self, found: Metrics) -> None:
        loss = "jsd" if self.recipe.loss_fn.kl_type == "jsd" else "kl"
        logger.info(metrics.step_line(self.step_number, self.last_step, found | self.spans.peek(), loss))

    def _validate(self, *, first: bool) -> Metrics:
        with self.spans.measure("validation"):
            return self.validator.run(self.step_number, first=first)

    def _validation_due(self) -> bool:
        if not self.inputs.validation:
            return False
        at_end = self.step_number == self.last_step and self.config.val_at_end
        return at_end or (self.config.val_period > 0 and self.step_number % self.config.val_period == 0)

    def _validated_before(self) -> bool:
        return any("validation/accuracy" in line for line in metrics.read(self.folder.metrics))

    # --- checkpoints and the end --------------------------------------------------------------------------------

    def _checkpoint_due(self) -> bool:
        config = self.recipe.checkpointing
        return config.enabled and (self.step_number % config.save_period == 0 or self.step_number == self.last_step)

    def _resume(self) -> TrainingInfo | None:
        """Take up the newest checkpoint, if there is one."""
        if not self.recipe.checkpointing.enabled:
            return None
        info = self.checkpoints.load_newest()
        if info is None:
            return None
        self.generation.run(Generation.adopt, self.student.worker.version)
        self.step_number, self.total_tokens = info.step, info.total_tokens
        self.prompts.consumed = info.consumed_prompts
        logger.info(f"resumed from {self.checkpoints.path(info.step)}")
        return info

    def _save(self, found: Metrics, elapsed: float) -> None:
        with self.spans.measure("checkpoint"):
            info = TrainingInfo(self.step_number, self.prompts.consumed, self.total_tokens, elapsed, found)
            export = self._export if self.recipe.checkpointing.save_consolidated else None
            self.checkpoints.save(info, self.loaded.to_yaml(), export)

    def _export(self, path: Path) -> None:
        self.student.run(Student.export, path)
        self.inputs.tokenizer.save_pretrained(path)

    def _finish(self) -> None:
        lines = metrics.read(self.folder.metrics)
        summary = summarise(lines, self.step_number, self.total_tokens)
        self.folder.replace("export", self._export)
        plot(lines, self.folder.path / "plot.png", summary["teacher_accuracy"])
        self.folder.write_summary(summary)  # last: its presence says that the run is complete
        console.print(closing_table(summary, self.folder.path))


def _seconds(text: str | None) -> float | None:
    """ "DD:HH:MM:SS" in seconds."""
    if text is None:
        return None
    days, hours, minutes, seconds = (int(part) for part in text.split(":"))
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def run(loaded: LoadedRecipe) -> None:
    """Run a recipe to its end on this machine; resumes by itself.

    Raises:
        UserError: the recipe, data or models cannot be used; nothing was written.
        NonFiniteLoss: training diverged; the last good checkpoint is kept.
        WorkerError: a worker failed.
    """
    log.configure()
    inputs = prepare(loaded)
    local_device(inputs.recipe.cluster)  # a missing GPU is a mistake to find before the run folder exists
    folder = RunFolder(inputs.recipe)
    try:
        if folder.completed_steps() >= inputs.last_step:
            logger.info(
                f"this run is complete: {folder.summary}. Raise distillation.max_num_steps to go on, "
                "or give another logger.log_dir to start anew"
            )
            return
        folder.record(loaded)
        opening(loaded, inputs)
        Runner(loaded, inputs, folder).run()
    finally:
        folder.close()

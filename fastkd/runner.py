"""The loop: ``Runner.step`` is the whole engine in one sentence; validation, saving and logging are around it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from fastkd import calibration, log, metrics
from fastkd.ahead import Ahead
from fastkd.batch import Rollout
from fastkd.checkpoint import Checkpoints, TrainingInfo
from fastkd.checks import needs_cluster
from fastkd.driver import Inputs, RunFolder, prepare
from fastkd.errors import CheckpointError, NonFiniteLoss, WorkerError
from fastkd.log import bars, console, logger
from fastkd.metrics import Metrics, Recorder
from fastkd.monitors import Monitor, NoMonitor, monitored
from fastkd.plot import plot
from fastkd.pools import local_device
from fastkd.profiling import Spans
from fastkd.recipe import LoadedRecipe
from fastkd.report import closing_table, opening, role_table, summarise
from fastkd.roles import LocalRoles, Roles, Scored
from fastkd.rollout import Request
from fastkd.sampling import Sampler
from fastkd.stop import Stop, Stopped
from fastkd.timeline import Timeline, Work, busy
from fastkd.validate import Validator


class Runner:
    """One run: its roles, its place in the data, and the cadence of everything around a step."""

    def __init__(self, loaded: LoadedRecipe, inputs: Inputs, folder: RunFolder, roles: Roles, stop: Stop | None = None):
        self.loaded, self.inputs, self.folder, self.roles = loaded, inputs, folder, roles
        self.recipe = recipe = inputs.recipe
        self.config = recipe.distillation
        self.prompts = inputs.train
        self.timeline = Timeline(folder.path / "trace.json")
        self.spans = Spans(lambda name, began, ended: self.timeline.add(Work("driver", 0, name, began, ended)))
        self.stop = stop or Stop()
        self.validator = Validator(inputs, folder.path, roles)
        self.checkpoints = Checkpoints(recipe.checkpointing, roles.workers)
        self.step_number = 0
        self.consumed_prompts = 0
        """Prompts of the steps that were trained; those collected ahead are not among them."""
        self.total_tokens = 0
        self.settled = True
        """Whether the student's weights are those of ``step_number``."""
        self.last_step = inputs.last_step
        steps = -(-self.config.batch_size // recipe.policy.train_global_batch_size)
        self.stale_limit = steps * self.config.max_off_policy_steps
        """In optimizer steps."""
        self.gpus: Monitor = NoMonitor()
        self.batches = Ahead(self._collect, self.config.max_off_policy_steps, self.last_step)

    # --- one step -----------------------------------------------------------------------------------------------

    def step(self) -> Metrics:
        """Sample and score, train, sync."""
        with self.spans.measure("step"):
            with self.stop.at_once():
                batch = self.batches.next(self.step_number + 1)
            ages = batch.drop_stale(self.roles.version, self.stale_limit) if self.config.max_off_policy_steps else {}
            self.settled = False
            with self._phase("training", "training"):
                trained = self.roles.train(batch)
            with self.spans.measure("sync"):
                synced = self.roles.sync()
        self.step_number += 1
        self.consumed_prompts = batch.consumed
        self.settled = True
        return trained | synced | ages | self._rollout_metrics(batch.rollouts) | batch.readings.metrics

    def _collect(self, step: int, sampled: Callable[[], None]) -> Scored:
        prompts = self.prompts.next()
        consumed = self.prompts.consumed

        @contextmanager
        def phase(shown: str, span: str) -> Iterator[None]:
            with self._phase(shown, span):
                yield
            if span == "generation":
                sampled()

        batch = self.roles.collect(prompts, self._request(step), phase)
        batch.consumed = consumed
        return batch

    @contextmanager
    def _phase(self, shown: str, span: str) -> Iterator[None]:
        with self.spans.measure(span), bars.phase(shown, self.config.batch_size):
            yield

    def _request(self, step: int) -> Request:
        sampler = Sampler(*self.recipe.policy.generation.sampling())
        return Request(sampler, self.config.num_generations_per_prompt, self.config.seed, step=step)

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
        """All steps that are left, then the summary. A lost training group goes on from the newest checkpoint."""
        watched = monitored(self.recipe.logger.monitor_gpus, over_ray=needs_cluster(self.recipe))
        with self.stop, closing(self.timeline), watched as self.gpus:
            while True:
                try:
                    done = self._run()
                    break
                except WorkerError as error:
                    self.batches.reset()
                    self.roles.revive(error)
                finally:
                    self.batches.close()
        if done:
            self._finish()

    def _run(self) -> bool:
        """Resume, and take the steps that are left; False when somebody stopped it before."""
        resumed = self._resume()
        self.settled = True
        elapsed_before = resumed.elapsed_seconds if resumed else 0.0
        began = time.monotonic()
        deadline = _seconds(self.recipe.checkpointing.checkpoint_must_save_by)
        recorder = Recorder(
            self.folder.metrics, self.recipe.logger, resumed.step if resumed else None, self.loaded.resolved
        )
        found: Metrics = {}
        saved = self.step_number

        def elapsed() -> float:
            return elapsed_before + time.monotonic() - began

        def record(found: Metrics) -> None:
            recorder.write(self.step_number, found | self.spans.take() | {"timing/elapsed": elapsed()})

        try:
            with bars.run(self.last_step, self.step_number), self.checkpoints.finishing():
                try:
                    if self.step_number == 0 and self.config.val_at_start and self.inputs.validation:
                        record(self._validate(first=True) | self.roles.memory())
                    while self.step_number < self.last_step:
                        found = self._guarded_step()
                        found |= self.roles.memory() | self._busy() | self.roles.queues() | self.gpus.take()
                        found["timing/tokens_per_second"] = found["rollout/tokens"] / self.spans.seconds("step")
                        self._say(found)
                        if self._validation_due():
                            found |= self._validate(first=not self._validated_before())
                        record(found)
                        self.checkpoints.poll()
                        late = deadline is not None and time.monotonic() - began > deadline
                        if self._checkpoint_due() or late:
                            self._save(found, elapsed())
                            saved = self.step_number
                        bars.stepped(role_table(found | self.spans.peek()))
                        if late and self.step_number < self.last_step:
                            key = "checkpointing.checkpoint_must_save_by"
                            logger.info(
                                f"stopped after step {self.step_number} to keep {key}="
                                f"{self.recipe.checkpointing.checkpoint_must_save_by}; the same command resumes"
                            )
                            return False
                        if self.step_number < self.last_step:
                            self.stop.check()
                except Stopped as stopped:
                    if self.recipe.checkpointing.enabled and self.step_number > saved:
                        self._save(found, elapsed())
                    self._say_stopped(stopped)
                    return False
                except WorkerError as error:
                    # What cannot go on without an engine or a teacher need not lose what the student has learnt.
                    if error.role != "training" and self.settled and self.step_number > saved:
                        self._keep(found, elapsed())
                    raise
        finally:
            recorder.close()
        return True

    def _say_stopped(self, stopped: Stopped) -> None:
        kept = self.recipe.checkpointing.enabled
        what = "the same command resumes" if kept else "nothing was kept (checkpointing.enabled=false)"
        logger.info(f"stopped by {stopped} after step {self.step_number}; {what}")

    def _guarded_step(self) -> Metrics:
        try:
            return self.step()
        except NonFiniteLoss as error:
            with suppress(CheckpointError):
                self.checkpoints.finish()
            kept = self.checkpoints.steps()
            where = f"the last good checkpoint is {self.checkpoints.path(kept[-1])}" if kept else "no checkpoint yet"
            raise NonFiniteLoss(f"step {self.step_number + 1}: {error} ({where}).") from error

    def _busy(self) -> Metrics:
        """How much of the step each role worked."""
        shares = busy(self._trace(), self.roles.sizes, self.spans.seconds("step"))
        return {f"timing/busy_{role}": share for role, share in shares.items()}

    def _trace(self) -> list[Work]:
        """What workers did since the last time, into the timeline."""
        done = self.roles.take_work()
        for one in done:
            self.timeline.add(one)
        self.timeline.flush()
        return done

    def _say(self, found: Metrics) -> None:
        loss = "jsd" if self.recipe.loss_fn.kl_type == "jsd" else "kl"
        logger.info(metrics.step_line(self.step_number, self.last_step, found | self.spans.peek(), loss))

    def _validate(self, *, first: bool) -> Metrics:
        with self.spans.measure("validation"), self.stop.at_once():
            found = self.validator.run(self.step_number, first=first)
        self._trace()
        self.roles.queues()  # what waited here is no step's
        return found

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
        info = self.checkpoints.load_newest() if self.recipe.checkpointing.enabled else None
        self.step_number, self.total_tokens = (info.step, info.total_tokens) if info else (0, 0)
        self.prompts.consumed = self.consumed_prompts = info.consumed_prompts if info else 0
        self.roles.sync()
        if info is None and self.recipe.policy.quantization is not None:
            self._calibrate()
        if info is not None:
            logger.info(f"resumed from {self.checkpoints.path(info.step)}")
        return info

    def _calibrate(self) -> None:
        """Fix the scales of a student that is quantised, on the text that the recipe names or on its own."""
        request = replace(self._request(0), generations=1, purpose="calibration")
        rollouts = calibration.sequences(self.inputs, lambda prompts: self.roles.sample(prompts, request))
        self.roles.calibrate(rollouts)
        self.roles.sync()
        tokens = sum(rollout.packed_length for rollout in rollouts)
        preset = self.recipe.policy.quant_cfg
        logger.info(f"quantised to NVFP4 ({preset}), calibrated on {len(rollouts)} sequences, {tokens:,} tokens")

    def _save(self, found: Metrics, elapsed: float) -> None:
        with self.spans.measure("checkpoint"):
            info = TrainingInfo(self.step_number, self.consumed_prompts, self.total_tokens, elapsed, found)
            export = self._export if self.recipe.checkpointing.save_consolidated else None
            self.checkpoints.save(info, self.loaded.to_yaml(), export)

    def _keep(self, found: Metrics, elapsed: float) -> None:
        """Save before the run ends, if that can be done."""
        if self.recipe.checkpointing.enabled:
            with suppress(CheckpointError, WorkerError):
                self._save(found, elapsed)
                self.checkpoints.finish()
                logger.info(f"saved step {self.step_number} before ending; the same command resumes")

    def _export(self, path: Path) -> None:
        self.roles.export(path)
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


@contextmanager
def started(inputs: Inputs) -> Iterator[Roles]:
    """The workers of a recipe: in this process, or on the nodes of a Ray cluster."""
    if not needs_cluster(inputs.recipe):
        roles = _local(inputs)
        try:
            yield roles
        finally:
            roles.close()
        return
    if inputs.recipe.data.blend.enabled:
        from fastkd.offpolicy_roles import TextRoles as Kind
    else:
        from fastkd.ray_roles import RayRoles as Kind
    with Kind.started(inputs) as roles:
        yield roles


def _local(inputs: Inputs) -> Roles:
    if inputs.recipe.policy.generation.backend == "vllm":
        from fastkd.vllm_roles import LocalVllmRoles

        return LocalVllmRoles(inputs)
    return LocalRoles(inputs)


def run(loaded: LoadedRecipe) -> None:
    """Run a recipe to its end; resumes by itself.

    Raises:
        UserError: the recipe, data or models cannot be used; nothing was written.
        NonFiniteLoss: training diverged; the last good checkpoint is kept.
        WorkerError: a worker failed.
    """
    log.configure()
    inputs = prepare(loaded)
    more = "Raise distillation.max_num_steps to go on, or give another logger.log_dir to start anew"
    drive(loaded, inputs, more, lambda: opening(loaded, inputs), partial(Runner, loaded, inputs))


def drive(
    loaded: LoadedRecipe,
    inputs: Inputs,
    more: str,
    introduce: Callable[[], None],
    build: Callable[[RunFolder, Roles, Stop], Runner],
) -> None:
    """Run folder, workers, signals, and the loop in the middle of them.

    Args:
        loaded: the recipe.
        inputs: what ``prepare`` made of it.
        more: what a person does about a run that is complete.
        introduce: logs what the run is about.
        build: makes the loop.
    """
    if not needs_cluster(inputs.recipe):
        local_device(inputs.recipe.cluster)  # a missing GPU is a mistake to find before the run folder exists
    folder = RunFolder(inputs.recipe)
    try:
        if folder.completed_steps() >= inputs.last_step:
            logger.info(f"this run is complete: {folder.summary}. {more}")
            return
        folder.record(loaded)
        introduce()
        with Stop() as stop, ExitStack() as workers:
            try:
                with stop.at_once():
                    roles = workers.enter_context(started(inputs))
            except Stopped as stopped:
                logger.info(f"stopped by {stopped} before the first step")
                return
            build(folder, roles, stop).run()
    finally:
        folder.close()

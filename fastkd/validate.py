"""Validation: graded answers on held-out prompts, and the KL to the teacher on the same prompts with the same noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastkd import grading
from fastkd.batch import Prompt, Rollout
from fastkd.config import Recipe
from fastkd.driver import Inputs
from fastkd.log import bars, console, logger
from fastkd.metrics import Metrics
from fastkd.roles import Roles, Scored
from fastkd.rollout import Request
from fastkd.sampling import Sampler


@dataclass(frozen=True, slots=True)
class Validator:
    """What a validation needs; ``run`` may be called at any step."""

    inputs: Inputs
    folder: Path
    """Run folder: all samples go to ``validation/step_N.jsonl``."""
    roles: Roles

    @property
    def recipe(self) -> Recipe:
        """The recipe of the run."""
        return self.inputs.recipe

    def run(self, step: int, *, first: bool) -> Metrics:
        """Validate the student as it is now; the first time the teacher's own answers are graded too."""
        prompts = self.inputs.validation
        graded = self._answer("validating", self.roles.sample, prompts)
        lengths = [len(one.rollout.response) for one in graded]
        found: Metrics = {
            "validation/accuracy": grading.accuracy(graded),
            "validation/mean_length": sum(lengths) / max(len(lengths), 1),
        }
        rollouts = [one.rollout for one in graded]
        sampling = self.recipe.policy.generation
        if sampling.sampling() != sampling.sampling(validation=True):
            # The KL is an expectation over what training samples, not over the answers that are graded.
            with bars.phase("sampling", len(prompts)):
                rollouts = self.roles.sample(prompts, self._request(grading=False))
        readings = self.inputs.readings(rollouts)
        found |= {f"validation/{name}": value for name, value in readings.metrics.items()}
        read = [rollout.prompt for rollout in readings.teacher if rollout.response]
        line = f"accuracy {found['validation/accuracy']:.3f}"
        if read:  # every sample may have been left out of context distillation
            with bars.phase("scoring", len(read)):
                batch = Scored(rollouts, readings, self.roles.score(readings.teacher))
                divergences = self.roles.divergences(batch, with_loss=self.recipe.distillation.val_track_train_metrics)
            found |= {f"validation/{name}": value for name, value in divergences.items()}
            line += f" | kl {found['validation/kl']:.4f}"
        if first and self.recipe.distillation.val_teacher:
            # With context distillation, the answers of a teacher who reads the trace: what the student may reach.
            asked = read if self.inputs.teacher_prompts else prompts
            answers = self._answer("teacher", self.roles.sample_teacher, asked)
            found["validation/teacher_accuracy"] = grading.accuracy(answers)
            line += f" | teacher accuracy {found['validation/teacher_accuracy']:.3f}"
        logger.info(f"validation at step {step} | {line} | {len(graded)} problems")
        grading.write_samples(self.folder / "validation" / f"step_{step}.jsonl", graded)
        if count := self.recipe.logger.num_val_samples_to_print:
            console.print(grading.sample_table(graded, count, f"samples at step {step}"))
        return found

    def _answer(
        self, shown: str, sample: Callable[..., list[Rollout]], prompts: Sequence[Prompt]
    ) -> list[grading.Graded]:
        with bars.phase(shown, len(prompts)):
            answers = sample(prompts, self._request(grading=True), batch_size=self.recipe.distillation.val_batch_size)
        return grading.grade(answers, self.inputs.tokenizer)

    def _request(self, *, grading: bool) -> Request:
        # step=0 always: every validation of a run meets the same noise, so that figures differ by the weights alone.
        sampler = Sampler(*self.recipe.policy.generation.sampling(validation=grading))
        purpose = "grading" if grading else "validation"
        return Request(sampler, 1, self.recipe.distillation.seed, step=0, purpose=purpose)

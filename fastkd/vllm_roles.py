"""The three roles in one process with a vLLM engine for generation, on the student's device or on the CPU.

The engine has weights of its own: every ``sync`` sends it the student's, and the probe checks them. On a GPU it gives
its memory back while the teacher scores and the student trains; the sync at the end of the step wakes it.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastkd.batch import Prompt, Rollout
from fastkd.driver import Inputs
from fastkd.metrics import Metrics
from fastkd.pools import LocalPool
from fastkd.roles import LocalRoles, Phase, Scored
from fastkd.rollout import Request
from fastkd.verified_sync import VerifiedSync
from fastkd.vllm_generation import VllmGeneration
from fastkd.weight_sync import GLOO, Engines


class LocalVllmRoles(LocalRoles):
    """``LocalRoles`` that samples through vLLM.

    Raises:
        MissingDependency: vLLM is not installed.
    """

    def __init__(self, inputs: Inputs):
        super().__init__(inputs)
        recipe, tokenizer = self.recipe, inputs.tokenizer
        self.engine: LocalPool[VllmGeneration] = LocalPool(
            "generation", VllmGeneration.from_recipe, recipe, tokenizer.eos_token_id, inputs.student_vocab, dummy=True
        )
        text = inputs.train.render([0], inputs.train.problems.rows[:1])[0].tokens
        vocab = inputs.student_vocab or len(tokenizer)
        engines = Engines.local([self.engine.worker])
        student = self.student.worker
        self.pushes = LocalPool("generation", VerifiedSync, recipe, student, engines, GLOO, text, vocab)

    def collect(self, prompts: Sequence[Prompt], request: Request, phase: Phase) -> Scored:
        """Sample, put the engine to sleep where memory is scarce, score."""
        with phase("sampling", "generation"):
            rollouts = self.sample(prompts, request)
        if self.device.type == "cuda":
            self.engine.run(VllmGeneration.sleep)
        readings = self.inputs.readings(rollouts)
        with phase("scoring", "teacher"):
            return Scored(rollouts, readings, self.score(readings.teacher))

    def sample(self, prompts: Sequence[Prompt], request: Request, batch_size: int | None = None) -> list[Rollout]:
        """``VllmGeneration.sample``."""
        return self.engine.run(VllmGeneration.sample, prompts, request, batch_size=batch_size)

    def sync(self) -> Metrics:
        """``VerifiedSync.push``."""
        return self.pushes.run(VerifiedSync.push)

    def close(self) -> None:
        """End the engine and its workers."""
        self.pushes.run(VerifiedSync.close)
        self.engine.run(VllmGeneration.close)

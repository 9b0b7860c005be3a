"""A teacher that scores through vLLM's ``prompt_logprobs``: for models that ``fastkd.teacher`` cannot shard.

vLLM returns log-probabilities, K + 1 Python numbers for every token, prompts included (the first is the token's own).
Two settings keep that bearable: no detokenisation, and flat lists in place of an object per entry. It stays the slower
way: ``fastkd.teacher.Teacher`` keeps tensors, and scores response tokens only.

From log-probabilities to ``TopK``. They are logits less a constant of the row, which no divergence sees, so
``logsumexp`` is 0. Tail mass is 1 − Σ p over the kept ids. What is lost: float32 log-probabilities resolve a tail
only to about 1e-6 (``vocab_topk`` sums it exactly), so it is never taken to be smaller; the raw logits; and which of
equal logits at the K-th place are kept. At a temperature T, vLLM's workers divide the logits before the softmax.

Letters: n response tokens, K kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkd import vllm_setup
from fastkd.batch import Rollout
from fastkd.config import Recipe
from fastkd.errors import UserError
from fastkd.kernels import TopK
from fastkd.log import bars

SMALLEST_TAIL = 2.0**-20
"""Tail masses below this are rounding."""


class VllmTeacher:
    """A frozen model in a vLLM engine; the interface of ``fastkd.teacher.Teacher``.

    Args:
        recipe: ``teacher``, ``distillation.topk_logits_k`` and ``loss_fn.temperature``. The tensor parallel size is
            ``teacher.dtensor_cfg.tensor_parallel_size``.
        valid_vocab: rows of the LM head that are tokens, when it is padded.
        more: keyword arguments of ``EngineArgs`` that go before the recipe's.

    Raises:
        MissingDependency: vLLM is not installed.
        UserError: the teacher's weights are to come from the student.
    """

    def __init__(self, recipe: Recipe, valid_vocab: int | None, **more: Any):
        if recipe.distillation.context_distillation.shares_weights:
            raise UserError(
                "distillation.context_distillation.frozen_teacher_source",
                "a teacher in a vLLM engine keeps its weights",
                "Set it to base_model, or use fastkd's own teacher",
                value=recipe.distillation.context_distillation.frozen_teacher_source,
            )
        self.k, self.temperature, self.valid_vocab = (
            recipe.distillation.topk_logits_k, recipe.loss_fn.temperature, valid_vocab
        )  # fmt: skip
        arguments = vllm_setup.teacher_arguments(recipe) | more
        self.workers = arguments["tensor_parallel_size"]
        self.engine: Any = vllm_setup.start_engine(arguments)
        if valid_vocab is not None:
            self.engine.collective_rpc("limit_vocabulary", args=(valid_vocab,))
        if self.temperature != 1.0:
            self.engine.collective_rpc("divide_logits", args=(self.temperature,))
        vocab = valid_vocab or self.engine.model_config.get_vocab_size()
        self.whole_vocabulary = self.k >= vocab
        self._count = 0

    def score(self, rollouts: Sequence[Rollout]) -> list[TopK | None]:
        """Top-K rows of each rollout, [n, K] for its n response tokens; None for a rollout without a response."""
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        # The row after the last token that is packed comes as that of the one token which vLLM insists to sample.
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=self.k,
            logprobs=self.k,
            detokenize=False,
            flat_logprobs=True,
            ignore_eos=True,
        )
        scored: list[TopK | None] = [None] * len(rollouts)
        waiting: dict[str, int] = {}
        for index, rollout in enumerate(rollouts):
            if rollout.response:
                name, self._count = f"teacher-{self._count}", self._count + 1
                tokens = [*rollout.prompt.tokens, *rollout.response[:-1]]
                self.engine.add_request(name, {"prompt_token_ids": tokens}, params)
                waiting[name] = index
        try:
            while waiting:
                for output in self.engine.step():
                    if output.finished and output.request_id in waiting:
                        index = waiting.pop(output.request_id)
                        scored[index] = self._rows(output, len(rollouts[index].response))
                        bars.advance()
        finally:
            if waiting:  # interrupted: leave nothing behind
                self.engine.abort_request(list(waiting))
        return scored

    def close(self) -> None:
        """Stop the engine and its workers."""
        vllm_setup.stop_engine(self.engine, self.workers)

    def _rows(self, output: Any, n: int) -> TopK:
        prompt, last = output.prompt_logprobs, output.outputs[0].logprobs
        entries = self.k + 1  # a row's own token comes before its K largest
        ids = _last(prompt.token_ids, last.token_ids, n * entries, np.int32).view(n, entries)[:, 1:]
        logprobs = _last(prompt.logprobs, last.logprobs, n * entries, np.float32).view(n, entries)[:, 1:]
        return rows_of(ids, logprobs, self.temperature, whole_vocabulary=self.whole_vocabulary)


def rows_of(ids: Tensor, logprobs: Tensor, temperature: float = 1.0, *, whole_vocabulary: bool = False) -> TopK:
    """A TopK of log-probabilities.

    Args:
        ids: [n, K] int32, in any order.
        logprobs: [n, K] float32 at ``temperature``.
        temperature: T. The logits returned are those of temperature 1, up to a constant of the row.
        whole_vocabulary: K = V: the tail is empty.
    """
    ids, order = ids.sort(1)
    logprobs = logprobs.gather(1, order)
    tail = (1 - logprobs.double().exp().sum(1)).clamp(min=SMALLEST_TAIL).log().float()
    nothing = torch.zeros(len(ids))
    return TopK(
        ids, logprobs * temperature, nothing, torch.full_like(nothing, -torch.inf) if whole_vocabulary else tail
    )


def _last(first: list[Any], second: list[Any], count: int, dtype: Any) -> Tensor:
    """The last ``count`` numbers of two lists, one after the other."""
    start = len(first) + len(second) - count
    return torch.from_numpy(np.fromiter((*first[start:], *second), dtype, count))

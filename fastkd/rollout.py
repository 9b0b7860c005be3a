"""The generation worker: prompts in, sampled responses out, with the student's current weights.

The embedded backend runs the transformers model itself: left-padded batches, a KV cache, and rows that leave the
batch when they finish. In one process it shares its tensors with the student, so there are no weights to move.

Letters: B rows of a batch, P longest prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from fastkd import lora, quantization
from fastkd.batch import Prompt, Rollout
from fastkd.config import Recipe
from fastkd.log import bars
from fastkd.models import head_weight
from fastkd.sampling import Sampler, sample_seed

# Fewer live rows than this share of the batch: drop the finished ones. Copying the cache costs about one decoding
# step, so it pays only when a good part of the batch is done.
_COMPACT_BELOW = 0.75


@dataclass(frozen=True, slots=True)
class Request:
    """What to sample for each prompt."""

    sampler: Sampler
    generations: int = 1
    run_seed: int = 0
    step: int = 0
    purpose: str = "train"
    """Part of the seed, so that training and validation never share noise."""


@dataclass(slots=True)
class Generation:
    """Samples from a causal language model on one device.

    Args:
        causal_lm: the model; the student's own in an embedded run.
        tokenizer: for stop strings.
        max_new_tokens: longest response.
        max_total_tokens: longest prompt + response; a longer one is cut and counts as truncated.
        batch_size: rows decoded together.
        stop_token_ids: ids that end a response; the tokenizer's end-of-sequence token when None.
        stop_strings: texts that end a response, kept in it.
        autocast: compute dtype when it differs from the weights'.
        valid_vocab: rows of the LM head that are tokens, when it is padded; the rest are never sampled.
        base: sample from the frozen base of a model with adapters.
    """

    causal_lm: PreTrainedModel
    tokenizer: object
    max_new_tokens: int
    max_total_tokens: int
    batch_size: int
    stop_token_ids: Sequence[int] | None = None
    stop_strings: Sequence[str] | None = None
    autocast: torch.dtype | None = None
    valid_vocab: int | None = None
    base: bool = False
    weights_version: int = 0
    _stop_ids: Tensor = field(init=False)

    def __post_init__(self) -> None:
        ids = self.stop_token_ids or [self.tokenizer.eos_token_id]  # pyright: ignore[reportAttributeAccessIssue]
        self._stop_ids = torch.tensor(list(ids), device=self.device)

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return head_weight(self.causal_lm).device

    @classmethod
    def embedded(
        cls,
        recipe: Recipe,
        causal_lm: PreTrainedModel,
        tokenizer: object,
        valid_vocab: int | None,
        autocast: torch.dtype | None = None,
        base: bool = False,
        max_total_tokens: int | None = None,
    ) -> Generation:
        """Generation in this process, by the recipe, on a model that lives here.

        ``max_total_tokens``: another limit than the student's.
        """
        settings = recipe.policy.generation
        return cls(
            causal_lm,
            tokenizer,
            settings.max_new_tokens,
            max_total_tokens or recipe.policy.max_total_sequence_length,
            recipe.policy.generation_batch_size,
            settings.stop_token_ids,
            settings.stop_strings,
            autocast,
            valid_vocab,
            base,
        )

    def adopt(self, version: int) -> None:
        """The weights now are those after ``version`` optimizer steps."""
        self.weights_version = version

    def sample(self, prompts: Sequence[Prompt], request: Request, *, batch_size: int | None = None) -> list[Rollout]:
        """``request.generations`` rollouts per prompt, prompt by prompt.

        Masked prompts and prompts that leave no room for a response come back with an empty response.
        """
        wanted = [(prompt, generation) for prompt in prompts for generation in range(request.generations)]
        rollouts: list[Rollout | None] = [None] * len(wanted)
        runnable = []
        for index, (prompt, generation) in enumerate(wanted):
            if prompt.masked or len(prompt.tokens) >= self.max_total_tokens:
                rollouts[index] = Rollout(prompt, generation, (), False, self.weights_version)
            else:
                runnable.append(index)
        # Prompts of like length together: left padding is wasted work.
        runnable.sort(key=lambda index: (len(wanted[index][0].tokens), index))
        was_training = self.causal_lm.training
        self.causal_lm.eval()
        try:
            size = batch_size or self.batch_size
            for start in range(0, len(runnable), size):
                indices = runnable[start : start + size]
                with (
                    lora.disabled(self.causal_lm) if self.base else nullcontext(),
                    quantization.weights_kept(self.causal_lm),
                ):
                    decoded = self._decode([wanted[index] for index in indices], request)
                for index, (response, finished) in zip(indices, decoded, strict=True):
                    prompt, generation = wanted[index]
                    rollouts[index] = Rollout(prompt, generation, response, finished, self.weights_version)
        finally:
            self.causal_lm.train(was_training)
        return rollouts  # pyright: ignore[reportReturnType]

    @torch.inference_mode()
    def _decode(self, wanted: Sequence[tuple[Prompt, int]], request: Request) -> list[tuple[tuple[int, ...], bool]]:
        device = self.device
        prompts = [prompt.tokens for prompt, _ in wanted]
        width = max(map(len, prompts))
        limits = [min(self.max_new_tokens, self.max_total_tokens - len(tokens)) for tokens in prompts]
        seeds_B = torch.tensor(
            [sample_seed(request.run_seed, request.step, p.index, g, request.purpose) for p, g in wanted],
            device=device,
        )
        tokens_BP = torch.zeros(len(wanted), width, dtype=torch.long)
        mask_BP = torch.zeros(len(wanted), width, dtype=torch.bool)
        for row, tokens in enumerate(prompts):
            tokens_BP[row, width - len(tokens) :] = torch.tensor(tokens)
            mask_BP[row, width - len(tokens) :] = True
        inputs, mask = tokens_BP.to(device), mask_BP.to(device)
        positions = (mask.long().cumsum(-1) - 1).clamp_(min=0)
        cache = DynamicCache(config=self.causal_lm.config)

        responses: list[list[int]] = [[] for _ in wanted]
        finished = [False] * len(wanted)
        rows = list(range(len(wanted)))  # which response each row of the batch writes
        for step in range(max(limits)):
            next_B = request.sampler(self._logits(inputs, mask, positions, cache), seeds_B, step)
            stopped = torch.isin(next_B, self._stop_ids).tolist()
            live = []
            for slot, token in enumerate(next_B.tolist()):
                row = rows[slot]
                if finished[row] or len(responses[row]) >= limits[row]:
                    continue  # a finished row that still rides along
                responses[row].append(token)
                finished[row] = stopped[slot] or self._hits_stop_string(responses[row])
                if finished[row] or len(responses[row]) >= limits[row]:
                    bars.advance()
                else:
                    live.append(slot)
            if not live:
                break
            inputs = next_B[:, None]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
            positions = positions[:, -1:] + 1
            if len(live) < _COMPACT_BELOW * len(rows):
                keep = torch.tensor(live, device=device)
                inputs, mask, positions, seeds_B = inputs[keep], mask[keep], positions[keep], seeds_B[keep]
                cache.batch_select_indices(keep)
                rows = [rows[slot] for slot in live]
        return [(tuple(response), done) for response, done in zip(responses, finished, strict=True)]

    def _logits(self, inputs: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """[B, V] logits of the next token; the head runs on the last position only."""
        if inputs.shape[1] == 1 and not any(cache.is_sliding):
            # One query sees all that is not padding: that mask is the padding mask itself, in the four dimensions
            # that transformers takes as they are, instead of building them anew at every step.
            mask = mask[:, None, None, :]
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            out = self.causal_lm.base_model(
                input_ids=inputs, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
            return out.last_hidden_state[:, -1] @ head_weight(self.causal_lm)[: self.valid_vocab].T

    def _hits_stop_string(self, response: list[int]) -> bool:
        if not self.stop_strings:
            return False
        # A stop string spans at most its own length in tokens (each token is at least one character), plus one
        # token that it may begin inside of.
        longest = max(map(len, self.stop_strings)) + 1
        text = self.tokenizer.decode(response[-longest:])  # pyright: ignore[reportAttributeAccessIssue]
        return any(stop in text for stop in self.stop_strings)

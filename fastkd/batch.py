"""What crosses process borders: prompts, rollouts, and packed batches of them.

A batch is never padded. Sequences lie one after another in flat tensors with cumulative lengths, and only
loss-active rows are listed. Of a sequence of P prompt tokens and n response tokens, the last response token
predicts nothing, so it is left out: T = P + n - 1 tokens are packed, and row P-1+j predicts response token j.

Letters: N packed tokens, S sequences, A loss-active rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastkd.host_copies import to_device


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem, rendered through the chat template and tokenised."""

    index: int
    """Row in its dataset: with the run seed, the step and the generation it seeds the sampler."""
    problem: str
    answer: str | None
    text: str
    """What the model reads, special tokens included."""
    tokens: tuple[int, ...]
    masked: bool = False
    """Longer than data.max_input_seq_length: counted, never sampled, weight 0 in the loss."""
    system: str | None = None
    """The system message, when there is one: a teacher with a prompt of its own is given the same."""
    columns: tuple[tuple[str, str | None], ...] = ()
    """Cells of the dataset by column, that only the teacher reads."""
    source: str | None = None
    """Of a blend: the name of the source it was read from. Metrics are also kept by source."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled response to one prompt."""

    prompt: Prompt
    generation: int
    """0 … num_generations_per_prompt - 1."""
    response: tuple[int, ...]
    """Sampled token ids, the end-of-sequence token included when one was sampled."""
    finished: bool
    """Ended by a stop token or stop string; False when cut at the length limit."""
    weights_version: int
    """Optimizer steps that the sampling weights had seen."""

    @property
    def packed_length(self) -> int:
        """Tokens that a packed batch holds of it: prompt + response - 1, or 0 when nothing was sampled."""
        return len(self.prompt.tokens) + len(self.response) - 1 if self.response else 0


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed sequences of one micro-batch."""

    tokens_N: Tensor
    """[N] int64 token ids."""
    positions_N: Tensor
    """[N] int64, restarting at 0 with every sequence."""
    cu_seqlens: Tensor
    """[S + 1] int32 cumulative lengths, 0 first and N last."""
    max_seqlen: int
    active_A: Tensor
    """[A] int64 rows that predict a response token, in order."""
    labels_A: Tensor
    """[A] int64, the response token that each active row predicts."""
    lengths: tuple[int, ...]
    """[S] packed length of each sequence, on the host."""
    responses: tuple[int, ...]
    """[S] active rows of each sequence, on the host."""
    context: Any = None
    """A rank's share of a batch under context parallelism says here of what (``fastkd.context_parallel.Context``)."""

    def take(self, x_A: Tensor) -> Tensor:
        """The entries of this share, of something that has one for every active row of the whole batch."""
        return x_A if self.context is None else self.context.take(x_A)

    def join(self, x_A: Tensor) -> Tensor:
        """The inverse of :meth:`take`, on every rank of the context-parallel group; no gradient then."""
        return x_A if self.context is None else self.context.join(x_A)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        tensors = ("tokens_N", "positions_N", "cu_seqlens", "active_A", "labels_A")
        return replace(self, **{name: to_device(getattr(self, name), device) for name in tensors})


def pack(rollouts: Sequence[Rollout]) -> Batch:
    """Lay rollouts end to end.

    Raises:
        ValueError: a rollout without response tokens (it has no active row; leave it out), or none at all.
    """
    if not rollouts:
        raise ValueError("pack: no rollouts; a micro-batch holds at least one")
    tokens: list[int] = []
    positions: list[int] = []
    active: list[int] = []
    labels: list[int] = []
    cu_seqlens = [0]
    for rollout in rollouts:
        if not rollout.response:
            raise ValueError(f"pack: the rollout of prompt {rollout.prompt.index} has no response tokens; leave it out")
        start, prompt_length, length = len(tokens), len(rollout.prompt.tokens), rollout.packed_length
        tokens += rollout.prompt.tokens
        tokens += rollout.response[:-1]
        positions += range(length)
        active += range(start + prompt_length - 1, start + length)
        labels += rollout.response
        cu_seqlens.append(start + length)
    lengths = tuple(rollout.packed_length for rollout in rollouts)
    return Batch(
        tokens_N=torch.tensor(tokens),
        positions_N=torch.tensor(positions),
        cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32),
        max_seqlen=max(lengths),
        active_A=torch.tensor(active),
        labels_A=torch.tensor(labels),
        lengths=lengths,
        responses=tuple(len(rollout.response) for rollout in rollouts),
    )


def idle() -> Batch:
    """A micro-batch of one token without any active row: what a rank runs while others have work."""
    nothing = torch.zeros(0, dtype=torch.int64)
    one = torch.zeros(1, dtype=torch.int64)
    return Batch(one, one, torch.tensor([0, 1], dtype=torch.int32), 1, nothing, nothing, (1,), (0,))


def pad(batch: Batch, multiple: int) -> Batch:
    """The batch with N a multiple of a number: one more sequence without active rows."""
    missing = -len(batch.tokens_N) % multiple
    if missing == 0:
        return batch
    end = batch.cu_seqlens[-1:]
    return replace(
        batch,
        tokens_N=torch.cat((batch.tokens_N, batch.tokens_N.new_zeros(missing))),
        positions_N=torch.cat((batch.positions_N, torch.arange(missing, device=batch.positions_N.device))),
        cu_seqlens=torch.cat((batch.cu_seqlens, end + missing)),
        max_seqlen=max(batch.max_seqlen, missing),
        lengths=(*batch.lengths, missing),
        responses=(*batch.responses, 0),
    )

"""Sampling without sampler state: Gumbel-max with counter-based noise.

argmax_v (logit_v / T + G_v), with G_v independent standard Gumbel noise, is an exact sample from
softmax(logits / T) (Gumbel 1954; Maddison et al., "A* sampling", NeurIPS 2014). The noise here is a pure function of
(row seed, position, token id), so

* a sample depends on its own seed alone, not on which other prompts share the batch or when they finish
  (bf16 logits do depend on the batch in their last bit, which can flip a near-tie);
* there is nothing to save at a checkpoint, and a resumed run draws the same samples;
* no generator objects, no host synchronisation: a few integer operations on the [B, V] device tensor.

Letters: B rows of a batch, V vocabulary.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

_MASK = 0xFFFFFFFF


def sample_seed(run_seed: int, step: int, prompt: int, generation: int, purpose: str = "train") -> int:
    """63-bit seed of one sample: a hash of everything that identifies it."""
    text = f"{purpose}/{run_seed}/{step}/{prompt}/{generation}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def _mix(x: Tensor) -> Tensor:
    # The 32-bit finaliser of C. Wellons' hash-prospector search (lowest known bias), in int64 arithmetic: the
    # products overflow, but the low 32 bits that the mask keeps are right.
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def gumbel_noise(seeds_B: Tensor, position: int, vocab: int) -> Tensor:
    """[B, V] float32 standard Gumbel noise, a function of (seed, position, token id) only.

    Args:
        seeds_B: [B] int64 row seeds.
        position: index of the response token being sampled.
        vocab: V.
    """
    low, high = seeds_B & _MASK, (seeds_B >> 32) & _MASK
    key_B = _mix(_mix(low ^ _mix(torch.full_like(low, position))) ^ high)
    ids_V = torch.arange(vocab, device=seeds_B.device)
    hashed_BV = _mix(_mix(ids_V ^ key_B[:, None]) ^ high[:, None])
    # u in (0, 1 - 2^-24]: small u makes the winners, where float32 is finest, so the upper tail is not truncated
    # at float32's 1 - u resolution; the clamp keeps u = 1 (a noise of -inf) out.
    uniform_BV = ((hashed_BV.float() + 0.5) * 2.0**-32).clamp_(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform_BV))


@dataclass(frozen=True, slots=True)
class Sampler:
    """How the next token is chosen from logits.

    temperature 0 is greedy. top_k and top_p filter the tempered distribution, in that order, as everywhere else.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None

    def __call__(self, logits_BV: Tensor, seeds_B: Tensor, position: int) -> Tensor:
        """[B] int64 next tokens."""
        logits_BV = logits_BV.float()
        if self.temperature == 0:
            return logits_BV.argmax(-1)
        scores_BV = logits_BV / self.temperature
        ids = torch.empty(0)  # the warpers look at the scores alone
        if self.top_k:
            scores_BV = TopKLogitsWarper(self.top_k)(ids, scores_BV)  # pyright: ignore[reportArgumentType]
        if self.top_p < 1:
            scores_BV = TopPLogitsWarper(self.top_p)(ids, scores_BV)  # pyright: ignore[reportArgumentType]
        return (scores_BV + gumbel_noise(seeds_B, position, scores_BV.shape[1])).argmax(-1)

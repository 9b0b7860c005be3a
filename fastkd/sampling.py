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


def stable_seed(*parts: object) -> int:
    """63-bit seed from whatever identifies a use; the same in every process and version of Python."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def sample_seed(run_seed: int, step: int, prompt: int, generation: int, purpose: str = "train") -> int:
    """Seed of one sample: a hash of everything that identifies it."""
    return stable_seed(purpose, run_seed, step, prompt, generation)


def _mix_(x: Tensor) -> Tensor:
    """A 32-bit hash, in place on int32.

    The finaliser of C. Wellons' hash-prospector search (lowest known bias). Products wrap, as they should; a right
    shift of int32 drags the sign along, so the bits that it brings in are masked away.
    """
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= 0x7FEB352D
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= 0x846CA68B - (1 << 32)
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def gumbel_noise(seeds_B: Tensor, position: int, vocab: int) -> Tensor:
    """[B, V] float32 standard Gumbel noise, a function of (seed, position, token id) only.

    int32 and in place, because at V = 151,936 this is a good part of a decoding step on a CPU.

    Args:
        seeds_B: [B] int64 row seeds.
        position: index of the response token being sampled.
        vocab: V.
    """
    low_B, high_B = seeds_B.view(torch.int32).view(-1, 2).unbind(1)
    key_B = _mix_(_mix_(_mix_(torch.full_like(low_B, position)) ^ low_B) ^ high_B)
    ids_V = torch.arange(vocab, dtype=torch.int32, device=seeds_B.device)
    hashed_BV = _mix_(_mix_(ids_V ^ key_B[:, None]).bitwise_xor_(high_B[:, None]))
    # u in (0, 1 - 2^-24]: small u makes the winners, where float32 is finest, so the upper tail is not truncated
    # at float32's 1 - u resolution; the clamp keeps u = 1 (a noise of -inf) out.
    uniform_BV = hashed_BV.bitwise_and_(0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return uniform_BV.neg_().log1p_().neg_().log_().neg_()


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
        scores_BV = logits_BV if self.temperature == 1 else logits_BV / self.temperature
        ids = torch.empty(0)  # the warpers look at the scores alone
        if self.top_k:
            scores_BV = TopKLogitsWarper(self.top_k)(ids, scores_BV)  # pyright: ignore[reportArgumentType]
        if self.top_p < 1:
            scores_BV = TopPLogitsWarper(self.top_p)(ids, scores_BV)  # pyright: ignore[reportArgumentType]
        return gumbel_noise(seeds_B, position, scores_BV.shape[1]).add_(scores_BV).argmax(-1)

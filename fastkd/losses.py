"""The head modules: where a model's last hidden state meets the fused kernels.

The head's ``forward`` IS the fused loss (student) or the fused top-K (teacher): logits of shape [N, V] never
exist. Both sit inside one root module whose forward takes a packed batch, so that a sharding wrapper around the
root sees every use of every parameter.

Letters: N packed tokens, A loss-active rows, D hidden, V vocabulary, K kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastkd.batch import Batch
from fastkd.kernels import TopK, TopKLoss, topk_kl, vocab_topk
from fastkd.models import head_weight, packed_hidden


@dataclass(frozen=True, slots=True)
class Divergence:
    """Which divergence, as ``fastkd.kernels.topk_kl`` names it."""

    kl: str = "reverse"
    outside: str = "bucket"
    mixed_weight: float = 0.5
    jsd_beta: float = 0.5
    temperature: float = 1.0


class StudentModel(nn.Module):
    """Trunk and fused loss head of the student."""

    def __init__(self, causal_lm: PreTrainedModel, valid_vocab: int | None = None):
        super().__init__()
        self.causal_lm = causal_lm
        self.valid_vocab = valid_vocab

    def forward(self, batch: Batch, teacher: TopK, divergence: Divergence, token_weights_A: Tensor) -> TopKLoss:
        """Σ_n token_weights[n] · divergence_n over the loss-active rows, and per-token figures.

        Args:
            batch: packed sequences with A active rows.
            teacher: A rows, in the order of ``batch.active_A``.
            divergence: the loss.
            token_weights_A: [A] float32, normally 1 / (active tokens of the whole global batch).
        """
        hidden_AD = packed_hidden(self.causal_lm, batch).index_select(0, batch.active_A)
        weight_VD = head_weight(self.causal_lm)
        if torch.is_autocast_enabled(hidden_AD.device.type):
            # The residual stream stays float32 under autocast, and the fused op switches autocast off inside: without
            # this cast its GEMMs would run in float32. Their output is float32 either way.
            dtype = torch.get_autocast_dtype(hidden_AD.device.type)
            hidden_AD, weight_VD = hidden_AD.to(dtype), weight_VD.to(dtype)
        return topk_kl(
            hidden_AD,
            weight_VD,
            teacher,
            kl=divergence.kl,
            outside=divergence.outside,
            mixed_weight=divergence.mixed_weight,
            jsd_beta=divergence.jsd_beta,
            temperature=divergence.temperature,
            token_weights=token_weights_A,
            labels=batch.labels_A,
            valid_vocab=self.valid_vocab,
        )


class TeacherModel(nn.Module):
    """Trunk and fused top-K head of the teacher."""

    def __init__(self, causal_lm: PreTrainedModel, k: int, temperature: float = 1.0, valid_vocab: int | None = None):
        super().__init__()
        self.causal_lm = causal_lm
        self.k, self.temperature, self.valid_vocab = k, temperature, valid_vocab

    @torch.no_grad()
    def forward(self, batch: Batch) -> TopK:
        """The K largest logits of every loss-active row, with the logsumexp of all and of the rest."""
        hidden_AD = packed_hidden(self.causal_lm, batch).index_select(0, batch.active_A)
        return vocab_topk(
            hidden_AD,
            head_weight(self.causal_lm),
            self.k,
            temperature=self.temperature,
            valid_vocab=self.valid_vocab,
        )

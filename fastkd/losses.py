"""The head modules: where a model's last hidden state meets the fused kernels.

The head's ``forward`` IS the fused loss (student) or the fused top-K (teacher): logits of shape [N, V] never
exist. Both run inside one root module, so that sharding sees every use of every parameter, and so that one set of
weights can be student and teacher.

Letters: N packed tokens, A loss-active rows, D hidden, V vocabulary, K kept, S sources of a blend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from fastkd import lora, models, parallel, quantization, weights
from fastkd.batch import Batch
from fastkd.config import LoRA, Quantization, Teacher
from fastkd.kernels import TopK, TopKLoss, topk_kl, vocab_topk
from fastkd.models import packed_hidden
from fastkd.parallel import HeadShard

Out = TypeVar("Out")


@dataclass(frozen=True, slots=True)
class Divergence:
    """Which divergence, as ``fastkd.kernels.topk_kl`` names it."""

    kl: str = "reverse"
    outside: str = "bucket"
    mixed_weight: float = 0.5
    jsd_beta: float = 0.5
    temperature: float = 1.0


class PackedModel(nn.Module):
    """The root module: trunk, then a fused head. Its forward is the only way into the model's weights."""

    def __init__(self, causal_lm: PreTrainedModel):
        super().__init__()
        self.causal_lm = causal_lm

    @classmethod
    def load(
        cls,
        key: str,
        policy: Teacher,
        device: torch.device,
        mesh: DeviceMesh | None,
        dtype: torch.dtype,
        *,
        trained: bool,
        adapters: LoRA | None = None,
        quantized: Quantization | None = None,
        seed: int = 0,
    ) -> PackedModel:
        """The model of a recipe section, on one device or this rank's part of it.

        Args:
            key: "policy" or "teacher", as errors name it.
            policy: that section.
            device: of this process.
            mesh: of this process's group (``parallel.build_mesh``); None: not sharded.
            dtype: of the weights. Sharded, they are gathered and used in the section's precision.
            trained: False gives a frozen model in evaluation mode.
            adapters: train these over a frozen base.
            quantized: layers that will compute in NVFP4, once calibrated.
            seed: of their starting values.

        Raises:
            ModelError: the model's files cannot be used.
            UserError: it cannot be split so.
        """
        name, sharding = policy.model_name, policy.dtensor_cfg
        if mesh is None:
            causal_lm = models.load_causal_lm(f"{key}.model_name", name, dtype=dtype, device=device)
            root = cls(causal_lm.train(trained).requires_grad_(trained))
            if adapters is not None:
                lora.apply(causal_lm, adapters, seed=seed)
            if quantized is not None:
                quantization.apply(causal_lm, quantized, models.DTYPES[policy.precision])
            if trained and sharding.activation_checkpointing:
                parallel.recompute_blocks(causal_lm)
            return root
        causal_lm = models.meta_causal_lm(f"{key}.model_name", name, dtype)
        root = cls(causal_lm.train(trained).requires_grad_(trained))
        if adapters is not None:
            lora.apply(causal_lm, adapters, seed=seed)
        if quantized is not None:
            quantization.apply(causal_lm, quantized, models.DTYPES[policy.precision])
            quantization.check_shards(causal_lm, mesh["tp"].size(), f"{key}.dtensor_cfg.tensor_parallel_size")
        parallel.shard(
            root,
            causal_lm,
            mesh,
            sequence_parallel=sharding.sequence_parallel,
            expert_parallel=sharding.expert_parallel_size,
            recompute=trained and sharding.activation_checkpointing,
            compile_blocks=sharding.torch_compile,
            offload=sharding.cpu_offload,
            param_dtype=models.DTYPES[policy.precision],
            key=f"{key}.dtensor_cfg",
        )
        weights.load(causal_lm, f"{key}.model_name", name, device, offload=sharding.cpu_offload)
        if adapters is not None:
            lora.initialise(causal_lm, seed)
        if quantized is not None:
            quantization.initialise(causal_lm)
        return root

    def forward(self, batch: Batch, head: Callable[[Tensor, HeadShard, Batch], Out]) -> Out:
        """``head(hidden, shard, batch)`` on the trunk's hidden states.

        Args:
            batch: packed sequences.
            head: FusedLoss or FusedTopK.
        """
        batch = parallel.local_batch(self.causal_lm, batch)
        hidden_ND = packed_hidden(self.causal_lm, batch)
        return parallel.through_head(self.causal_lm, hidden_ND, lambda hidden, shard: head(hidden, shard, batch))


@dataclass(frozen=True, slots=True)
class FusedLoss:
    """Σ_n token_weights[n] · divergence_n over the loss-active rows, and per-token figures."""

    divergence: Divergence
    teacher: TopK
    """A rows, in the order of the whole batch's ``active_A``."""
    token_weights_A: Tensor
    """[A] float32, normally 1 / (active tokens of the whole global batch)."""
    valid_vocab: int | None = None

    def __call__(self, hidden_ND: Tensor, shard: HeadShard, batch: Batch) -> TopKLoss:
        """The loss of one micro-batch; under context parallelism, of this rank's rows of it."""
        weight_VD = shard.weight
        if torch.is_autocast_enabled(hidden_ND.device.type):
            # The residual stream stays float32 under autocast, and the fused op switches autocast off inside: without
            # this cast its GEMMs would run in float32. Their output is float32 either way.
            dtype = torch.get_autocast_dtype(hidden_ND.device.type)
            hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
        return topk_kl(
            hidden_ND,
            weight_VD,
            self.teacher.map(batch.take),
            kl=self.divergence.kl,
            outside=self.divergence.outside,
            mixed_weight=self.divergence.mixed_weight,
            jsd_beta=self.divergence.jsd_beta,
            temperature=self.divergence.temperature,
            token_weights=batch.take(self.token_weights_A),
            active=batch.active_A,
            labels=batch.labels_A,
            **shard.options(self.valid_vocab),
        )


@dataclass(frozen=True, slots=True)
class LossBySource:
    """A fused loss, and what the tokens of each source of a blend made of it."""

    loss: FusedLoss
    sources_A: Tensor
    """[A] int64 in [0, S): where the token of each row comes from; anything else: from nowhere that is counted."""
    count: int
    """S."""

    def __call__(self, hidden_ND: Tensor, shard: HeadShard, batch: Batch) -> tuple[TopKLoss, Tensor]:
        """The loss, and [S] float32 sums of the divergences of its rows, without weights."""
        found = self.loss(hidden_ND, shard, batch)
        numbers_S1 = torch.arange(self.count, device=self.sources_A.device)[:, None]
        # A sum over [S, A], not an `index_add_`: that adds in any order on CUDA, and metrics are reproducible.
        own_SA = batch.take(self.sources_A) == numbers_S1
        per_token_A = found.per_token.float().index_select(0, batch.active_A)
        return found, torch.where(own_SA, per_token_A, 0.0).sum(1)


@dataclass(frozen=True, slots=True)
class FusedTopK:
    """The K largest logits of every loss-active row, with the logsumexp of all and of the rest."""

    k: int
    temperature: float = 1.0
    valid_vocab: int | None = None

    def __call__(self, hidden_ND: Tensor, shard: HeadShard, batch: Batch) -> TopK:
        """A rows, in the order of the whole batch's ``active_A``, on all ranks; no gradient."""
        hidden_AD = shard.all_tokens(hidden_ND).index_select(0, batch.active_A)
        rows = vocab_topk(
            hidden_AD,
            shard.weight,
            self.k,
            temperature=self.temperature,
            **shard.options(self.valid_vocab, all_tokens=True),
        )
        return rows.map(batch.join)

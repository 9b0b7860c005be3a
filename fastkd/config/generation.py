"""``policy.generation``: how the student samples its rollouts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from fastkd.config.base import Count, Index, NonNegative, Positive, Section, Share, derived, section

TopP = Annotated[float, Field(gt=0, le=1)]
"""Nucleus mass: in (0, 1], 1 keeps everything."""


class VLLMConfig(Section):
    """Settings of the vLLM engines (`backend: vllm`)."""

    tensor_parallel_size: Count = 1
    """GPUs per engine."""
    pipeline_parallel_size: Count = 1
    """Pipeline stages per engine."""
    gpu_memory_utilization: Share = 0.6
    """Share of a GPU's memory an engine may take."""
    max_model_len: Count = derived("${...max_total_sequence_length}")
    """Longest sequence an engine accepts."""
    enforce_eager: bool = False
    """Run without CUDA graphs."""
    precision: Literal["bfloat16", "float32", "auto"] = derived("${...precision}")
    """Number format of the engine's weights."""
    kv_cache_dtype: str = "auto"
    """Number format of the KV cache."""
    async_engine: bool = False
    """Use vLLM's asynchronous engine."""

    @property
    def devices(self) -> int:
        """GPUs of one engine: tensor × pipeline parallel."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


class SyncProbe(Section):
    """Whether the engines compute with the weights they were sent (`backend: vllm`)."""

    period: Index = 1
    """Compare log-probabilities after every so many weight syncs, and after the first; 0 = never."""
    tolerance: Positive | None = None
    """Mean difference in nat per token beyond which the run stops; null = by the engines' number format."""


class ColocatedResources(Section):
    """GPUs set apart for generation when it is not colocated."""

    gpus_per_node: Count | None = None
    """GPUs of a node that generate (one-node runs)."""
    num_nodes: Count | None = None
    """Whole nodes that generate (multi-node runs)."""


class Colocated(Section):
    """Whether generation shares the training GPUs."""

    enabled: bool = True
    """Generate on the training GPUs, in turn with training."""
    resources: ColocatedResources = section(ColocatedResources)
    """What generation gets when it does not share."""


class Generation(Section):
    """Sampling: backend, lengths, temperature and filters."""

    backend: Literal["vllm", "transformers"] = "transformers"
    """`transformers` needs nothing more installed; `vllm` is for throughput."""
    max_new_tokens: Count = derived("${..max_total_sequence_length}")
    """Longest response; prompt and response together stay within `policy.max_total_sequence_length`."""
    temperature: NonNegative = 1.0
    """Sampling temperature of training rollouts; 0 = greedy."""
    top_p: TopP = 1.0
    """Sample from the smallest set of tokens with this mass."""
    top_k: Index | None = None
    """Sample from this many tokens; null or 0 = all."""
    val_temperature: NonNegative | None = None
    """Temperature at validation; null = `temperature`, 0 = greedy."""
    val_top_p: TopP | None = None
    """`top_p` at validation; null = the training value."""
    val_top_k: Index | None = None
    """`top_k` at validation; null = the training value."""
    stop_token_ids: list[Index] | None = None
    """Token ids that end a response; null = the tokenizer's end-of-sequence token."""
    stop_strings: list[str] | None = None
    """Strings that end a response."""
    vllm_cfg: VLLMConfig = section(VLLMConfig)
    """Settings of the vLLM engines."""
    vllm_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of vLLM's `LLM`."""
    sync_probe: SyncProbe = section(SyncProbe)
    """The check after a weight sync."""
    colocated: Colocated = section(Colocated)
    """Shared or separate GPUs."""

    def sampling(self, *, validation: bool = False) -> tuple[float, float, int]:
        """(temperature, top_p, top_k) in force, for training or validation; top_k 0 = all."""
        temperature, top_p, top_k = self.temperature, self.top_p, self.top_k
        if validation:
            temperature = temperature if self.val_temperature is None else self.val_temperature
            top_p = top_p if self.val_top_p is None else self.val_top_p
            top_k = top_k if self.val_top_k is None else self.val_top_k
        return temperature, top_p, top_k or 0

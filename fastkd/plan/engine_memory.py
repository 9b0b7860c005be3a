"""Memory of the generation role: weights, KV cache, and how many sequences that cache holds.

vLLM takes ``gpu_memory_utilization`` of the device; what weights and the engine's own buffers leave of it is KV cache,
2 · layers · key/value heads · head size · bytes per token, divided over the tensor and pipeline ranks. The embedded
backend (transformers) decodes ``generation_batch_size`` rows with the student's own weights and a cache that grows;
its moments are the pass over the prompts ("prompts") and the last token ("sampling").
"""

from __future__ import annotations

import math

from fastkd.plan import activations
from fastkd.plan.activations import Compute, Split
from fastkd.plan.layout import SIZES, Layout
from fastkd.plan.memory import RoleMemory, compute_of, matrices, outside
from fastkd.plan.rates import GIB
from fastkd.plan.shapes import Shape
from fastkd.plan.split import after_tensor_parallel

KV_SIZES = {"auto": 0, "bfloat16": 2, "float16": 2, "float32": 4, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1, "fp8_inc": 1}
"""Bytes of a cached number by ``kv_cache_dtype``; auto is the engine's precision."""
_VOCAB_ALIGN = 64


def generation(layout: Layout) -> RoleMemory:
    """The generation role on one device; nothing in a run on texts that exist."""
    if layout.recipe.data.blend.enabled:
        facts = ("bytes of a cached token", "longest sequences held", "mean sequences held")
        return RoleMemory("generation", {"none": {}}, facts=dict.fromkeys(facts, 0.0))
    return _vllm(layout) if layout.recipe.policy.generation.backend == "vllm" else _embedded(layout)


def engine_weights(shape: Shape, tp: int, pp: int, size: int) -> float:
    """Bytes of an engine's weights on one device; the pipeline's first and last stage hold embedding and head."""
    rows = math.ceil(shape.vocab / _VOCAB_ALIGN) * _VOCAB_ALIGN
    block = sum(math.prod(after_tensor_parallel(one, shape, tp)) for one in shape.block())
    ends = math.ceil(rows / tp) * shape.hidden * (1 if shape.tied or pp > 1 else 2)
    return size * (math.ceil(shape.layers / pp) * block + ends + shape.hidden)


def kv_bytes(layout: Layout) -> float:
    """Bytes of one cached token on one device."""
    shape, engines = layout.student, layout.engines
    settings = layout.recipe.policy.generation.vllm_cfg
    size = KV_SIZES.get(settings.kv_cache_dtype, 0) or SIZES[settings.precision]
    whole = shape.key_value_bytes(size) / engines.pp
    return whole / min(engines.tp, shape.kv_heads)  # fewer heads than ranks: they are copied


def _vllm(layout: Layout) -> RoleMemory:
    policy, engines, rates = layout.recipe.policy, layout.engines, layout.rates
    settings = policy.generation.vllm_cfg
    weights = engine_weights(layout.student, engines.tp, engines.pp, SIZES[settings.precision])
    reserve = rates.assumed["engine_gib"] * GIB
    budget = settings.gpu_memory_utilization * rates.device.memory
    cache = max(budget - weights - reserve, 0.0)
    per_token = kv_bytes(layout)
    rows = {"parameters": weights, "engine": reserve, "KV cache": cache}
    tokens = cache / per_token
    return RoleMemory(
        "generation",
        {"sampling": rows},
        facts={
            "memory it may take": budget,
            "memory it needs": weights + reserve + per_token * settings.max_model_len,
            "bytes of a cached token": per_token,
            "cached tokens": tokens,
            "longest sequences held": tokens / settings.max_model_len,
            "mean sequences held": tokens / layout.lengths.student,
        },
    )


def _embedded(layout: Layout) -> RoleMemory:
    policy, shape, cpu = layout.recipe.policy, layout.student, layout.rates.device.is_cpu
    loop, e = layout.recipe.distillation, SIZES[policy.precision]
    batch = min(policy.generation_batch_size, loop.batch_size)
    if layout.recipe.validation_enabled:
        batch = max(batch, min(loop.val_batch_size, loop.max_val_samples or loop.val_batch_size))
    weights = copies = 0.0
    compute = Compute(e)
    if layout.train.alone:
        compute = compute_of(policy, layout.train, cpu, masters=not policy.dtensor_cfg.lora_cfg.enabled)
        if compute.autocast:
            copies = float(e * (matrices(shape) + shape.vocab * shape.hidden))  # made anew for every token
    else:  # a sharded student cannot generate: the engines have weights of their own
        weights = engine_weights(shape, 1, 1, e)
    total = policy.max_total_sequence_length
    prompt = max(1, min(layout.recipe.data.max_input_seq_length, total - 1))
    # Keys are rotated in the residual stream's precision; values are as the layer leaves them.
    keys = float(shape.layers * shape.kv_heads * shape.head_dim)
    per_token = keys * (compute.stream + e)
    growing = keys / shape.layers * compute.stream  # a layer's, copied when a token is added
    first = activations.forward_workspace(shape, compute, Split(), prompt=prompt)
    common = {"parameters": weights + copies, "engine": 3.0 * 4 * batch * shape.vocab}
    moments = {
        "prompts": common | {"KV cache": float(batch * prompt * per_token), "activations": batch * prompt * first},
        "sampling": common | {"KV cache": float(batch * total * per_token), "activations": batch * total * growing},
    }
    return RoleMemory(
        "generation",
        outside(moments, layout, "generation"),
        facts={
            "bytes of a cached token": float(per_token),
            "longest sequences held": float(batch),
            "mean sequences held": float(batch),
        },
    )

"""Memory of engines: weights, KV cache, and how many sequences that cache holds.

vLLM takes ``gpu_memory_utilization`` of the device; what weights and the engine's own buffers leave of it is KV cache,
2 · layers · key/value heads · head size · bytes per token, divided over the tensor and pipeline ranks. The embedded
backend (transformers) decodes ``generation_batch_size`` rows with the student's own weights and a cache that grows;
its moments are the pass over the prompts ("prompts") and the last token ("sampling").

A teacher in vLLM (``fastkd.vllm_teacher``) is such an engine too. To answer ``prompt_logprobs`` vLLM makes logits and
their log-softmax, [tokens, vocabulary] in float32 on every rank: of 1,024 tokens at a time, on a CPU of a whole
sequence. It does not know of them when it sizes its cache, so they come on top of its share.
"""

from __future__ import annotations

import math

from fastkd.plan import activations, loss_kernel
from fastkd.plan.activations import Compute, Split
from fastkd.plan.layout import SIZES, Engines, Layout
from fastkd.plan.memory import RoleMemory, compute_of, matrices, outside
from fastkd.plan.rates import GIB
from fastkd.plan.shapes import Shape
from fastkd.plan.split import after_tensor_parallel

KV_SIZES = {"auto": 0, "bfloat16": 2, "float16": 2, "float32": 4, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1, "fp8_inc": 1}
"""Bytes of a cached number by ``kv_cache_dtype``; auto is the engine's precision."""
_VOCAB_ALIGN = 64
_LOGITS_CHUNK = 1024
"""Tokens whose logits vLLM's GPU runner makes at a time (``prompt_logprob.CHUNK_SIZE``)."""


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
    """Bytes of one cached token on one device, of generation."""
    settings = layout.recipe.policy.generation.vllm_cfg
    size = KV_SIZES.get(settings.kv_cache_dtype, 0) or SIZES[settings.precision]
    return _cached_token(layout.student, layout.engines, size)


def _cached_token(shape: Shape, engines: Engines, size: int) -> float:
    whole = shape.key_value_bytes(size) / engines.pp
    return whole / min(engines.tp, shape.kv_heads)  # fewer heads than ranks: they are copied


def _vllm(layout: Layout) -> RoleMemory:
    settings = layout.recipe.policy.generation.vllm_cfg
    weights = engine_weights(layout.student, layout.engines.tp, layout.engines.pp, SIZES[settings.precision])
    rows, facts = _share(layout, weights, kv_bytes(layout), settings.max_model_len, layout.lengths.student)
    return RoleMemory("generation", {"sampling": rows}, facts=facts)


def teacher_engine(layout: Layout, engines: Engines) -> RoleMemory:
    """The scoring role in vLLM. Rows of a step lie in host memory; none of fastkd's own top-K buffers exist."""
    model, shape, kept = layout.recipe.teacher, layout.teacher, layout.recipe.distillation.topk_logits_k
    size, longest = SIZES[model.precision], model.max_total_sequence_length
    weights = engine_weights(shape, engines.tp, 1, size)
    rows, facts = _share(layout, weights, _cached_token(shape, engines, size), longest, layout.lengths.teacher)
    logits = 4.0 * shape.vocab * (longest if layout.rates.device.is_cpu else min(longest, _LOGITS_CHUNK))
    responses = -(-layout.recipe.distillation.batch_size // engines.count)
    responses *= layout.recipe.policy.generation.max_new_tokens
    return RoleMemory(
        "teacher",
        {"scoring": rows | {"prompt logits": 2 * logits}},
        float(loss_kernel.teacher_rows(responses, kept)) / engines.tp,
        facts | {"payload per token": float(loss_kernel.payload_bytes(kept))},
    )


def _share(
    layout: Layout, weights: float, per_token: float, longest: int, mean: float
) -> tuple[dict[str, float], dict[str, float]]:
    """(rows, facts) of what vLLM takes for itself: ``gpu_memory_utilization`` of the device."""
    reserve = layout.rates.assumed["engine_gib"] * GIB
    budget = layout.recipe.policy.generation.vllm_cfg.gpu_memory_utilization * layout.rates.device.memory
    cache = max(budget - weights - reserve, 0.0)
    tokens = cache / per_token
    facts = {
        "memory it may take": budget,
        "memory it needs": weights + reserve + per_token * longest,
        "bytes of a cached token": per_token,
        "cached tokens": tokens,
        "longest sequences held": tokens / longest,
        "mean sequences held": tokens / mean,
    }
    return {"parameters": weights, "engine": reserve, "KV cache": cache}, facts


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

"""Time of a step, role by role: floating-point operations, bytes moved, and the rates of the table.

Training and scoring are bound by matrix products: 2 operations per weight and token forward, 4 backward, 2 more for
recomputed blocks; attention 4 · H · d per pair of tokens, of which causality leaves half. The fused loss is three
passes over the head for tokens that count, the fused top-K one. Tensor-parallel all-reduces wait; FSDP's gathers and
reductions run beside the compute and cost what exceeds it. Experts on several ranks: each of a block's all-to-alls
waits, and takes top-k rows of every token to the experts and back.

A teacher in vLLM is a prefill, with the head in float32 (``vllm_setup``) over all tokens, and Python's work on K + 1
numbers for each.

Decoding is bound by memory: every step reads the weights and the cache of the sequences that run. A step of the run
needs as many decoding steps as its longest response has tokens, and more where the cache does not hold all sequences.

Letters: H query heads, d head size, D hidden, V vocabulary, K kept, B rollouts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fastkd.plan import loss_kernel
from fastkd.plan.engine_memory import engine_weights, kv_bytes
from fastkd.plan.layout import SIZES, Engines, Layout, Mesh, RoleName, microbatches
from fastkd.plan.memory import RoleMemory, optimizer_states
from fastkd.plan.shapes import Shape
from fastkd.plan.split import Held, held


@dataclass(frozen=True, slots=True)
class RoleTime:
    """One step of one role, on each of its devices."""

    role: RoleName
    flops: float
    """Floating-point operations per device."""
    parts: dict[str, float] = field(default_factory=dict)
    """Seconds by cause; they add up."""
    moved: dict[str, float] = field(default_factory=dict)
    """Bytes per device by way: "tensor parallel", "context parallel", "expert parallel", "sharding", "payload",
    "memory", "host"."""
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Of the step."""
        return sum(self.parts.values())

    @property
    def bytes_moved(self) -> float:
        """Over links and network."""
        return sum(amount for name, amount in self.moved.items() if name not in ("memory", "host"))


def forward_flops(shape: Shape, length: float) -> float:
    """Operations per token of the blocks, in sequences of so many tokens (without the head)."""
    return shape.layers * (2 * shape.active_block_parameters + attention_flops(shape, length))


def attention_flops(shape: Shape, length: float) -> float:
    """Operations per token and block of causal attention: scores and values over length / 2 tokens."""
    return 2.0 * shape.heads * shape.head_dim * length


def training(layout: Layout) -> RoleTime:
    """The student: forward, backward, the fused loss and the optimizer."""
    recipe, shape, mesh, rates = layout.recipe, layout.student, layout.train, layout.rates
    policy, rollouts = recipe.policy, recipe.distillation.batch_size
    length = max(layout.lengths.student - 1, 1.0)
    recompute = policy.dtensor_cfg.activation_checkpointing
    lora = policy.dtensor_cfg.lora_cfg
    # A frozen base has no weight gradients; the trunk's attention has backward all the same.
    passes = (2.0 if lora.enabled else 3.0) + recompute
    trunk = passes * forward_flops(shape, length) * length
    head = (2 if lora.enabled else 3) * 2.0 * shape.vocab * shape.hidden * layout.lengths.response
    per_rank = rollouts / mesh.dp
    flops = per_rank * (trunk + head) / (mesh.tp * mesh.cp)
    compute = flops / rates.speed("training", policy.precision)

    updates = max(recipe.distillation.batch_size // policy.train_global_batch_size, 1)
    batches = updates * microbatches(policy, per_rank / updates, length, training=True)
    size = SIZES[policy.precision]
    tokens = per_rank * length / mesh.cp
    own = held(shape, mesh, lora if lora.enabled else None)
    moved = {
        "tensor parallel": (4 + 2 * recompute) * _all_reduce(shape, mesh, tokens, size),
        "context parallel": (2 + recompute) * _keys_gathered(shape, mesh, tokens, size),
        "expert parallel": (4 + 2 * recompute) * _rows_exchanged(shape, mesh, tokens, size),
        "sharding": batches * _sharding(own, size, reduce=True),
    }
    states = optimizer_states(policy.optimizer.name, policy.optimizer.kwargs)
    traffic = updates * 4.0 * own.trained * (3 + 2 * states)  # read and write; gradients twice, for their norm
    parts = {"compute": compute} | _communication(moved, mesh, layout, compute)
    if policy.dtensor_cfg.cpu_offload and not mesh.alone:
        moved["host"] = batches * 4.0 * 3 * own.trained
        parts["host transfers"] = max(moved["host"] / rates.speed("host") - compute, 0.0)
        parts["optimizer"] = traffic / (rates.assumed["host_gb_per_s"] * 1e9)
    else:
        parts["optimizer"] = traffic / rates.speed("memory")
    moved["memory"] = traffic
    facts = {"micro-batches": float(batches), "optimizer steps": float(updates)}
    return RoleTime("training", flops, parts, moved, facts)


def scoring(layout: Layout) -> RoleTime:
    """The teacher: forward and the fused top-K, and its rows on the wire."""
    if layout.teacher_engines is not None:
        return _scoring_engines(layout, layout.teacher_engines)
    recipe, shape, mesh, rates = layout.recipe, layout.teacher, layout.score, layout.rates
    model = recipe.teacher
    length = max(layout.lengths.teacher - 1, 1.0)
    per_rank = math.ceil(recipe.distillation.batch_size / mesh.dp)  # the rank that has most
    head = 2.0 * shape.vocab * shape.hidden * layout.lengths.response
    flops = per_rank * (forward_flops(shape, length) * length + head) / (mesh.tp * mesh.cp)
    compute = flops / rates.speed("scoring", model.precision)
    batches = microbatches(model, per_rank, length, training=False)
    size = SIZES[model.precision]
    tokens = per_rank * length / mesh.cp
    own = held(shape, mesh, trained=False)
    moved = {
        "tensor parallel": 2 * _all_reduce(shape, mesh, tokens, size),
        "context parallel": _keys_gathered(shape, mesh, tokens, size),
        "expert parallel": 2 * _rows_exchanged(shape, mesh, tokens, size),
        "sharding": batches * _sharding(own, size, reduce=False),
    }
    parts = {"compute": compute} | _communication(moved, mesh, layout, compute)
    if model.dtensor_cfg.cpu_offload and not mesh.alone:
        moved["host"] = batches * float(size) * own.frozen
        parts["host transfers"] = max(moved["host"] / rates.speed("host") - compute, 0.0)
    _add_payload(layout, per_rank, parts, moved)
    facts = {"micro-batches": float(batches), "payload of a step": _payload(layout)}
    return RoleTime("teacher", flops, parts, moved, facts)


def _scoring_engines(layout: Layout, engines: Engines) -> RoleTime:
    """A teacher in vLLM."""
    recipe, shape, rates = layout.recipe, layout.teacher, layout.rates
    length = max(layout.lengths.teacher - 1, 1.0)
    sequences = math.ceil(recipe.distillation.batch_size / engines.count)
    tokens, kept = sequences * length, recipe.distillation.topk_logits_k
    trunk, head = (
        tokens * forward_flops(shape, length) / engines.tp,
        tokens * 2.0 * shape.vocab * shape.hidden / engines.tp,
    )
    wide, size = Mesh(engines.devices, engines.tp), SIZES[recipe.teacher.precision]
    logits = tokens * 4.0 * shape.vocab * (engines.tp - 1) / engines.tp  # gathered
    moved = {"tensor parallel": 2 * _all_reduce(shape, wide, tokens, size) + logits}
    parts = {
        "prefill": trunk / rates.speed("prefill", recipe.teacher.precision) + head / rates.speed("prefill", "float32"),
        "tensor parallel": moved["tensor parallel"] / rates.group_speed(engines.tp, engines.per_node),
        "log-probabilities": tokens * (kept + 1) * rates.assumed["prompt_logprob_us"] / 1e6,
    }
    _add_payload(layout, sequences, parts, moved)
    return RoleTime("teacher", trunk + head, parts, moved, {"payload of a step": _payload(layout)})


def _add_payload(layout: Layout, sequences: float, parts: dict[str, float], moved: dict[str, float]) -> None:
    """Rows of so many sequences, on their way to the student."""
    if layout.all_devices > 1:
        per_token = loss_kernel.payload_bytes(layout.recipe.distillation.topk_logits_k)
        moved["payload"] = sequences * layout.lengths.response * per_token
        parts["payload"] = moved["payload"] / layout.rates.speed("network")


def sampling(layout: Layout, memory: RoleMemory, *, sequences: int | None = None) -> RoleTime:
    """The engines.

    Args:
        memory: of the generation role: how many sequences its cache holds.
        sequences: rollouts to sample; those of a step when None.
    """
    recipe, shape, engines, rates = layout.recipe, layout.student, layout.engines, layout.rates
    if recipe.data.blend.enabled:
        return RoleTime("generation", 0.0, {"prefill": 0.0}, {"memory": 0.0}, {})
    settings, lengths = recipe.policy.generation, layout.lengths
    vllm = settings.backend == "vllm"
    precision = recipe.policy.precision
    size = SIZES[settings.vllm_cfg.precision if vllm else precision]
    total = recipe.distillation.batch_size if sequences is None else sequences
    share = math.ceil(total / engines.count)
    room = max(1.0, min(share, memory.facts["mean sequences held"]))
    # All sequences at once end with the longest; fewer at a time are refilled, and the longest ends last.
    steps = max(lengths.longest, share * lengths.response / room + (lengths.longest - lengths.response))
    running = share * lengths.response / steps
    context = lengths.prompt + lengths.response / 2
    weights = engine_weights(shape, engines.tp, engines.pp, size)
    read = weights + running * context * kv_bytes(layout)
    per_token = forward_flops(shape, context) + 2.0 * shape.vocab * shape.hidden
    flops_step = running * per_token / (engines.tp * engines.pp)
    speed = rates.speed("prefill", "float32" if size == 4 else "bfloat16")
    overhead = rates.assumed["decode_step_ms"]["cpu" if rates.device.is_cpu else settings.backend] / 1e3
    reduce = 0.0
    if engines.tp > 1:
        bytes_step = 2 * shape.layers * 2 * (engines.tp - 1) / engines.tp * running * shape.hidden * size
        link = rates.group_speed(engines.tp, engines.per_node)
        reduce = 2 * shape.layers * rates.assumed["all_reduce_us"] / 1e6 + bytes_step / link
    prefill = share * lengths.prompt * forward_flops(shape, lengths.prompt) / (engines.tp * engines.pp)
    decode = max(read / rates.speed("memory"), flops_step / speed)
    parts = {
        "prefill": prefill / speed,
        "decoding": steps * decode,
        "launches": steps * overhead,
        "tensor parallel": steps * reduce,
    }
    moved = {"memory": steps * read}
    facts = {"decoding steps": steps, "sequences running": running, "sequences at once": room}
    return RoleTime("generation", prefill + steps * flops_step, parts, moved, facts)


def _payload(layout: Layout) -> float:
    """Bytes of teacher rows of a step."""
    loop = layout.recipe.distillation
    return loop.batch_size * layout.lengths.response * loss_kernel.payload_bytes(loop.topk_logits_k)


def sync_seconds(layout: Layout) -> tuple[float, float]:
    """(seconds, bytes) of the weights on their way to the engines: gathered on the first training rank and sent."""
    if layout.recipe.data.blend.enabled:
        return 0.0, 0.0
    if layout.train.alone and layout.engines.devices == 1 and layout.recipe.policy.generation.backend != "vllm":
        return 0.0, 0.0  # one process: the same tensors
    size = float(SIZES[layout.recipe.policy.generation.vllm_cfg.precision]) * layout.student.parameters
    rates = layout.rates
    apart = len(layout.pools) > 1 and layout.recipe.cluster.num_nodes > 1
    way = rates.speed("network") if apart else rates.speed("link")
    gather = 0.0
    if layout.train.devices > 1:
        gather = size / rates.group_speed(layout.train.devices, layout.train.per_node)
    return gather + size / way, size


# ---------------------------------------------------------------- bytes over links


def _all_reduce(shape: Shape, mesh: Mesh, tokens: float, size: int) -> float:
    """Bytes per rank of one all-reduce of the residual stream in every block."""
    return shape.layers * 2 * (mesh.tp - 1) / mesh.tp * tokens * shape.hidden * size


def _keys_gathered(shape: Shape, mesh: Mesh, tokens: float, size: int) -> float:
    """Bytes per rank of gathering keys and values over cp in every block."""
    heads = max(shape.kv_heads // mesh.tp, 1)
    return shape.layers * (mesh.cp - 1) * tokens * 2 * heads * shape.head_dim * size


def _rows_exchanged(shape: Shape, mesh: Mesh, tokens: float, size: int) -> float:
    """Bytes per rank that one all-to-all of every block sends: top-k rows of every token, of which as many stay as go
    to each other rank. Tensor-parallel ranks send those of a part of the tokens each."""
    rows = tokens / mesh.tp * shape.experts_per_token
    return shape.layers * (mesh.ep - 1) / mesh.ep * rows * shape.hidden * size


def _sharding(own: Held, size: int, *, reduce: bool) -> float:
    """Bytes per rank and micro-batch that FSDP gathers, and reduces in float32: what a rank does not hold itself."""
    total = 0.0
    for unit in own.units:
        times = 1 if unit.persistent or not reduce else 2
        total += unit.count * size * times * (unit.gathered - unit.trained - unit.frozen)
        total += unit.count * 4 * (unit.gathered_trained - unit.trained) if reduce else 0
    return total


def _communication(moved: dict[str, float], mesh: Mesh, layout: Layout, compute: float) -> dict[str, float]:
    """Seconds that communication adds to the compute."""
    rates = layout.rates
    waits = moved["tensor parallel"] / rates.group_speed(mesh.tp, mesh.per_node)
    waits_context = moved["context parallel"] / rates.group_speed(mesh.cp, mesh.per_node, spread=mesh.tp)
    beside = moved["sharding"] / rates.group_speed(mesh.shards, mesh.per_node, spread=mesh.tp)
    return {
        "tensor parallel": waits,
        "context parallel": waits_context,
        "expert parallel": rates.exchange_seconds(moved["expert parallel"], mesh.ep, mesh.per_node),
        "sharding": max(beside - compute, 0.0),
    }

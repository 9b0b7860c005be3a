"""Memory of fastkd's own teacher: frozen weights, a forward without gradients, the fused top-K, and the rows of a step.

Letters: N tokens of a micro-batch on this rank, A rows that count.
"""

from __future__ import annotations

from fastkd.plan import activations, loss_kernel
from fastkd.plan.activations import Split
from fastkd.plan.engine_memory import teacher_engine
from fastkd.plan.layout import SIZES, Layout, largest_microbatch
from fastkd.plan.memory import RoleMemory, compute_of, matrices, most_active, outside
from fastkd.plan.split import head_rows, held


def teacher(layout: Layout) -> RoleMemory:
    """The scoring role, in an engine where the recipe says so."""
    if layout.teacher_engines is not None:
        return teacher_engine(layout, layout.teacher_engines)
    model, shape, mesh, cpu = layout.recipe.teacher, layout.teacher, layout.score, layout.rates.device.is_cpu
    loop, size, shared = layout.recipe.distillation, SIZES[model.precision], layout.teacher_shares_weights
    compute = compute_of(model, mesh, cpu, masters=shared and not layout.recipe.policy.dtensor_cfg.lora_cfg.enabled)
    split = Split(mesh.tp, model.dtensor_cfg.sequence_parallel and mesh.tp > 1)
    own = held(shape, mesh, trained=False)
    # A step has so many rollouts on this rank, and no micro-batch more than they have tokens.
    rollouts = -(-loop.batch_size // mesh.dp)
    responses = rollouts * layout.recipe.policy.generation.max_new_tokens
    tokens = largest_microbatch(model, model.max_total_sequence_length, training=False) / mesh.cp
    tokens = min(tokens, rollouts * model.max_total_sequence_length / mesh.cp)
    active = int(min(most_active(layout, tokens), responses))
    state = {"parameters": 0.0 if shared else float(size * own.frozen)}
    # Rows lie on the device until all of this rank's sequences are scored; those of the last micro-batch are results
    # of the top-k.
    common = state | {"teacher rows": float(loss_kernel.teacher_rows(max(responses - active, 0), loop.topk_logits_k))}
    hidden = tokens * compute.stream * shape.hidden
    kernel = loss_kernel.topk_buffers(
        active=active,
        hidden=shape.hidden,
        columns=head_rows(shape, mesh.tp),
        kept=loop.topk_logits_k,
        size=size,
        cpu=cpu,
        tp=mesh.tp,
    )
    moments = {
        "forward": common | {"activations": tokens * activations.forward_workspace(shape, compute, split)},
        "top-k": common | {"activations": hidden, "top-k kernel": float(kernel)},
    }
    if mesh.alone:
        casts = float(size * matrices(shape)) if compute.autocast else 0.0
        for found in moments.values():
            found["parameters"] += casts
    else:
        many, block = (2 if mesh.shards > 1 else 1), own.need("block")
        head = own.named("head")
        moments["forward"]["all-gather"] = float(size * (own.persistent + many * block.gathered))
        moments["top-k"]["all-gather"] = float(
            size * (own.persistent + (many * head.gathered if head else (many - 1) * block.gathered))
        )
    host = 0.0
    if model.dtensor_cfg.cpu_offload and not mesh.alone:
        host = state["parameters"]
        for found in moments.values():
            found["parameters"] = 0.0
    facts = {
        "tokens of a micro-batch": tokens,
        "payload per token": float(loss_kernel.payload_bytes(loop.topk_logits_k)),
        "logits never made": 4.0 * tokens * head_rows(shape, mesh.tp),
    }
    return RoleMemory("teacher", outside(moments, layout, "teacher"), host, facts)

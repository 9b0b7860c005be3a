"""Memory of the training role: sharded state, and what is added at the worst moments of a step.

The moments: the end of forward, where the fused loss holds dW and a chunk of logits ("loss"); the first backward step
of the head ("head") and of the topmost block ("backward"), with all activations still there; the reduction of that
block's gradients ("reduction"); the end of backward, when the embedding's gradient is reduced ("embedding"); the
optimizer step ("optimizer").

Trained weights are float32 and are the master weights: no second copy exists. Sharded, the bfloat16 weights that
compute uses are gathered unit by unit ("all-gather"); on one device autocast makes them ("parameters").

Letters: N tokens of a micro-batch on this rank, A rows that count, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fastkd.plan import activations, loss_kernel, quantized
from fastkd.plan.activations import Compute, Split
from fastkd.plan.layout import SIZES, Layout, Mesh, largest_microbatch
from fastkd.plan.memory import STATE, RoleMemory, compute_of, matrices, most_active, optimizer_states, outside
from fastkd.plan.shapes import Shape
from fastkd.plan.split import Held, head_rows, held


def student(layout: Layout) -> RoleMemory:
    """The training role."""
    policy, shape, mesh, cpu = layout.recipe.policy, layout.student, layout.train, layout.rates.device.is_cpu
    settings = policy.dtensor_cfg
    lora = settings.lora_cfg if settings.lora_cfg.enabled else None
    size = SIZES[policy.precision]
    compute = compute_of(policy, mesh, cpu, masters=lora is None)
    compute = replace(compute, quantized=quantized.inputs(shape, policy.quantization))
    split = Split(mesh.tp, settings.sequence_parallel and mesh.tp > 1)
    own = held(shape, mesh, lora)
    kept = layout.recipe.distillation.topk_logits_k
    tokens = largest_microbatch(policy, policy.max_total_sequence_length, training=True) / mesh.cp
    active = int(most_active(layout, tokens))

    trained = 4.0 * own.trained
    states = optimizer_states(policy.optimizer.name, policy.optimizer.kwargs)
    mean = layout.recipe.distillation.context_distillation
    state = {
        "parameters": float(size * own.frozen) if lora else 0.0,
        "master weights": trained,
        "gradients": trained,
        "optimizer": states * trained,
        "running mean": trained if mean.enabled and mean.frozen_teacher_source == "ema" else 0.0,
    }
    if policy.precision == "float32" and lora is None:
        state |= {"parameters": trained, "master weights": 0.0}

    one_block = activations.block_saved(shape, compute, split)
    ends = activations.ends_saved(shape, compute, split)
    whole = tokens * (shape.layers * one_block + ends)
    lean = tokens * (shape.layers * activations.block_input(shape, compute, split) + ends)
    recompute = settings.activation_checkpointing
    loss = loss_kernel.loss_buffers(
        tokens=int(tokens),
        active=active,
        hidden=shape.hidden,
        columns=head_rows(shape, mesh.tp),
        kept=kept,
        size=size,
        cpu=cpu,
        frozen_head=lora is not None,
    )
    common = state | {"teacher rows": float(loss_kernel.teacher_rows(active, kept))}
    forward = {"activations": lean if recompute else whole, "loss kernel": float(loss.peak)}
    # The final norm is done by then.
    freed = tokens * (ends - activations.rotation_saved(shape, compute))
    workspace = tokens * activations.backward_workspace(shape, compute, split) - freed
    backward = {"activations": (lean + tokens * one_block if recompute else whole) + workspace}
    reduction = {"activations": (lean if recompute else whole - tokens * one_block) - freed}
    after = {"activations": workspace + freed}

    one = size * quantized.weights_of_a_block(shape, mesh, policy.quantization)
    if not compute.autocast:  # there they stand in for its copies, but are not kept when blocks are recomputed
        forward["quantised weights"] = 0.0 if recompute else shape.layers * one
        backward["quantised weights"] = one if recompute else shape.layers * one
        if recompute and cpu:
            backward["quantised weights"] += quantized.emulation(shape, mesh, policy.quantization)
        reduction["quantised weights"] = 0.0 if recompute else (shape.layers - 1) * one

    parts = {"loss": forward, "backward": backward, "reduction": reduction, "embedding": after}
    moments = {name: common | part for name, part in parts.items()}
    _alone(moments, shape, size, compute, recompute) if mesh.alone else _gathered(moments, own, size, mesh, loss)
    if compute.autocast and recompute:
        moments["loss"]["parameters"] -= shape.layers * one
    moments["optimizer"] = state | {
        "optimizer": states * trained + _optimizer_workspace(shape, own, policy.optimizer.kwargs, cpu)
    }
    host = 0.0
    if settings.cpu_offload and not mesh.alone:
        host = sum(state.values())
        for rows in moments.values():
            rows.update(dict.fromkeys(STATE, 0.0))
        del moments["optimizer"]  # it runs on the host
    facts = {
        "activations kept": whole,
        "activations recomputed": lean + tokens * one_block,
        "tokens of a micro-batch": tokens,
        "bytes per parameter": (2 * trained + states * trained) / max(own.trained, 1),
        "logits never made": 4.0 * tokens * head_rows(shape, mesh.tp),
    }
    return RoleMemory("training", outside(moments, layout, "training"), host, facts)


# ---------------------------------------------------------------- parts of the student's moments


def _gathered(
    moments: dict[str, dict[str, float]], own: Held, size: int, mesh: Mesh, loss: loss_kernel.LossBuffers
) -> None:
    """What FSDP gathers and reduces at each moment. Gathering copies into the parameters from a buffer, and the next
    unit is gathered while this one computes: two units at a time. Reducing a unit holds its gradients and a float32
    copy."""
    many, block = (2 if mesh.shards > 1 else 1), own.need("block")
    head, ends = own.named("head"), own.named("ends")
    reduce = 4 + size

    def put(moment: str, gathered: float, flying: float) -> None:
        moments[moment] |= {"all-gather": gathered, "gradients in flight": flying}

    always = size * own.persistent
    tied_gradient = size * (ends.gathered_trained if ends else 0)  # dW waits for the embedding's
    put("loss", always + size * (many * head.gathered if head else (many - 1) * block.gathered), 0.0)
    put("backward", always + size * many * block.gathered, tied_gradient)
    put("reduction", always + size * many * block.gathered, tied_gradient + reduce * block.gathered_trained)
    if head:
        moments["head"] = moments["loss"] | {"loss kernel": float(loss.grad_hidden)}
        put("head", always + size * (head.gathered + (many - 1) * block.gathered), reduce * head.gathered_trained)
    last = ends or own.need("embedding")
    put("embedding", always + size * last.gathered, tied_gradient + reduce * last.gathered_trained)


def _alone(moments: dict[str, dict[str, float]], shape: Shape, size: int, compute: Compute, recompute: bool) -> None:
    """One device: bfloat16 copies of the weights under autocast, float32 gradients of the largest weights."""
    head = shape.vocab * shape.hidden
    copies = matrices(shape) * size if compute.autocast else 0
    per_block = copies / shape.layers
    moments["loss"]["parameters"] += copies + (size * head if compute.autocast else 0)
    for moment in ("backward", "reduction"):
        moments[moment]["parameters"] += per_block if recompute else copies
    largest = max(one.numel for one in shape.block())
    # The head's gradient waits for the embedding's when the two are one parameter.
    moments["backward"]["gradients in flight"] = 4.0 * (head if shape.tied else 0)
    moments["reduction"]["gradients in flight"] = 4.0 * (largest + (head if shape.tied else 0))
    moments["embedding"]["gradients in flight"] = 4.0 * head * (2 if shape.tied else 1)


def _optimizer_workspace(shape: Shape, own: Held, options: Mapping[str, object], cpu: bool) -> float:
    """On a GPU torch updates all parameters at once and holds a root of all second moments (``foreach``); ``fused``
    holds nothing, and a CPU updates one parameter after another."""
    if options.get("fused"):
        return 0.0
    if not cpu and options.get("foreach", True) is not False:
        return 4.0 * own.trained
    return 8.0 * max(shape.vocab * shape.hidden, *(one.numel for one in shape.block()))

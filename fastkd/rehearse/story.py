"""What a rehearsal tells: stages with time and memory, what was exercised, what was smaller, what took no part."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fastkd.recipe import LoadedRecipe
from fastkd.rehearse import sizes
from fastkd.rehearse.shrink import STEPS_BEFORE, Small
from fastkd.rehearse.stages import Seen

_NEVER = (
    "speed, and what fits a GPU's memory (--plan predicts both)",
    "the cluster itself: drivers, network, file systems, Slurm, other users",
)


def tell(loaded: LoadedRecipe, small: Small, seen: Seen, *, done: bool) -> RenderableType:
    """All of it; after a failure, what there is up to there."""
    parts: list[RenderableType] = [_stages(loaded, seen)]
    if done:
        parts.append(_list("Exercised, as on the cluster:", exercised(loaded, small, seen)))
    parts += [_scaled(small), _list("Not exercised:", [*small.left_out, *_NEVER])]
    verdict = f"The rehearsal of {loaded.path} passed."
    if not done or seen.problems:
        verdict = f"The rehearsal of {loaded.path} FAILED{':' if seen.problems else ' at the stage above.'}"
    return Group(Text(), *(Group(part, Text()) for part in parts), _list(verdict, seen.problems))


def _list(title: str, lines: Sequence[str]) -> Text:
    """Text, in which brackets are no markup."""
    return Text("\n  ".join([title, *lines]))


def _stages(loaded: LoadedRecipe, seen: Seen) -> Table:
    table = Table(title=f"rehearsal of {loaded.path.stem}", title_justify="left", box=None, pad_edge=False)
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    table.add_column("peak GiB", justify="right")
    for stage in seen.stages:
        table.add_row(
            stage.name + (" FAILED" if stage.failed else ""),
            f"{stage.seconds:.1f}",
            f"{stage.gib:.2f}" if stage.gib else "-",
        )
    total = sum(stage.seconds for stage in seen.stages)
    table.add_row("all", f"{total:.1f}", f"{seen.memory.gib:.2f}" if seen.memory.gib else "not measured")
    table.caption = "peak GiB: proportional set sizes of all processes, summed every 2 s" if seen.memory.gib else None
    table.caption_justify = "left"
    return table


def _scaled(small: Small) -> Table:
    table = Table(title="smaller than in the recipe", title_justify="left", box=None, pad_edge=False)
    for name in ("", "in the recipe", "here"):
        table.add_column(name)
    for row in small.scaled:
        table.add_row(*map(Text, row))
    return table


def exercised(loaded: LoadedRecipe, small: Small, seen: Seen) -> list[str]:
    """What took part at its true extent, by what was seen."""
    recipe, tree = loaded.recipe, small.tree
    loop, policy = recipe.distillation, recipe.policy
    lines = []
    for role, nodes in seen.nodes.items():
        places = list(dict.fromkeys(nodes))
        spread = ""
        if role in seen.degrees:
            data, context, tensor = seen.degrees[role]
            spread = f", data × context × tensor parallel {data} × {context} × {tensor}"
        elif role == "generation":
            spread = f" ({'vLLM' if small.vllm else 'transformers'} engines, all of which sampled)"
            if not set(range(len(nodes))) <= seen.engines:
                spread = f" (engines, {len(seen.engines)} of which sampled)"
        lines.append(f"{role}: {len(nodes)} worker(s) on {len(places)} node(s) ({', '.join(places)}){spread}")
    if not seen.nodes:
        lines.append("one process, as the recipe asks")
    if loop.resource_isolation.enabled:
        lines.append("isolation: no node serves two roles")
    updates = loop.batch_size // policy.train_global_batch_size
    done = tree["distillation"]["num_prompts_per_step"] * tree["distillation"]["num_generations_per_prompt"]
    done //= tree["policy"]["train_global_batch_size"]
    ranks = sizes.data_parallel(recipe)
    lines.append(
        f"step: sampled, scored, trained ({done} of {updates} optimizer step(s), {ranks} data-parallel rank(s)), synced"
    )
    packing = "sequences packed" if policy.sequence_packing.enabled else "micro-batches of sequences"
    if policy.dynamic_batching.enabled:
        packing = "micro-batches by tokens"
    parts = [packing, f"precision {policy.precision}", f"loss {recipe.loss_fn.kl_type}"]
    parts += ["activation checkpointing"] * policy.dtensor_cfg.activation_checkpointing
    parts += ["sequence parallel"] * policy.dtensor_cfg.sequence_parallel
    parts += ["CPU offload"] * policy.dtensor_cfg.cpu_offload
    parts += ["LoRA"] * policy.dtensor_cfg.lora_cfg.enabled
    parts += [f"NVFP4 ({policy.quant_cfg})"] * bool(policy.quantization)
    parts += [f"{loop.max_off_policy_steps} step off policy"] * bool(loop.max_off_policy_steps)
    lines.append(", ".join(parts))
    context = loop.context_distillation
    if context.enabled:
        lines.append(f"context distillation: the teacher reads a prefix of its own ({context.trace_source} trace)")
    if recipe.validation_enabled:
        lines.append(f"validation: {seen.validated} time(s)")
    kind = "vLLM's probe of every sync" if small.vllm else "their version and values, after every sync"
    lines.append(f"weight sync to every engine, seen in {kind}")
    lines.append(
        f"checkpoint of step {STEPS_BEFORE}{' in the background' if recipe.checkpointing.is_async else ''}; a new run "
        "with new processes went on from it, with its optimizer state and the next prompts; export"
    )
    return lines

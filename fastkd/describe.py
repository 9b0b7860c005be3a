"""A recipe in a dozen lines, for ``--check`` and for the start of a run. Imports neither torch nor transformers."""

from __future__ import annotations

from fastkd.checks import CheckReport
from fastkd.recipe import LoadedRecipe


def outline(loaded: LoadedRecipe) -> list[str]:
    """What a recipe amounts to, a line each: models, loss, batch arithmetic, lengths, validation, devices."""
    recipe = loaded.recipe
    loop, policy, loss = recipe.distillation, recipe.policy, recipe.loss_fn
    temperature, top_p, top_k = policy.generation.sampling()
    details = {
        "mixed": f"mixed KL, {loss.mixed_kl_weight:g} forward",
        "jsd": f"Jensen-Shannon divergence, beta {loss.jsd_beta:g}",
    }
    divergence = details.get(loss.kl_type, f"{loss.kl_type} KL")
    updates = loop.batch_size // policy.train_global_batch_size
    budget = (
        f"{policy.train_mb_tokens} tokens" if policy.train_mb_tokens else f"{policy.train_micro_batch_size} rollouts"
    )
    step = f"{loop.num_prompts_per_step} prompts × {loop.num_generations_per_prompt} = {loop.batch_size} rollouts"
    texts = [
        (
            "length",
            f"prompt ≤ {recipe.data.max_input_seq_length}, response ≤ {policy.generation.max_new_tokens}, "
            f"together ≤ {policy.max_total_sequence_length} tokens",
        ),
        (
            "sampling",
            f"{policy.generation.backend}, temperature {temperature:g}, top_p {top_p:g}, top_k {top_k or 'all'}",
        ),
    ]
    if recipe.data.blend.enabled:
        step, texts = f"{loop.num_prompts_per_step} texts that exist", _blend(loaded)
    sizes = recipe.role_sizes
    generation = "" if recipe.data.blend.enabled else f"generation={sizes.generation}, "
    kind = "GPUs" if recipe.cluster.device == "cuda" else "CPU workers"
    rows = [
        ("recipe", str(loaded.path)),
        ("student", f"{policy.model_name}, {policy.precision}"),
        (
            "teacher",
            f"{recipe.teacher.model_name}, {recipe.teacher.precision}, top {loop.topk_logits_k} logits per token",
        ),
        *_quantised(loaded),
        *_context(loaded),
        ("loss", f"{divergence}; outside the top-k: {loss.outside}; temperature {loss.temperature:g}"),
        ("step", step),
        ("", f"{updates} optimizer step(s) of {policy.train_global_batch_size}, micro-batches of {budget}"),
        *texts,
        ("stop", f"after {loop.max_num_steps} steps or {loop.max_num_epochs} epochs"),
        ("validation", _validation(loaded)),
        (
            "devices",
            f"{recipe.cluster.num_nodes} node(s): train={sizes.training}, {generation}"
            f"teacher={sizes.teacher} {kind}; {_sharding(loaded)}",
        ),
        ("run folder", recipe.logger.log_dir),
        (
            "checkpoints",
            f"every {recipe.checkpointing.save_period} steps in {recipe.checkpointing.checkpoint_dir}"
            if recipe.checkpointing.enabled
            else "none",
        ),
    ]
    return [f"{name:<12}{text}" for name, text in rows]


def summary(loaded: LoadedRecipe, report: CheckReport) -> str:
    """The outline, the keys without effect, and the warnings."""
    lines = outline(loaded)
    if loaded.ignored:
        lines += ["", "No effect here:", *(f"  {key}" for key in loaded.ignored)]
    if report.warnings:
        lines += ["", "Warnings:", *(f"  {text}" for text in report.warnings)]
    return "\n".join([*lines, "", "The recipe is valid."])


def _validation(loaded: LoadedRecipe) -> str:
    recipe, loop = loaded.recipe, loaded.recipe.distillation
    if not recipe.validation_enabled:
        return "none"
    when = [f"every {loop.val_period} steps"] if loop.val_period else []
    when += ["at the start"] * loop.val_at_start + ["at the end"] * loop.val_at_end
    if recipe.data.blend.enabled:
        return f"{', '.join(when)}; {loop.max_val_samples or 'all'} texts of the blend's valid split"
    temperature, _, _ = recipe.policy.generation.sampling(validation=True)
    how = "greedy" if temperature == 0 else f"temperature {temperature:g}"
    return f"{', '.join(when)}; {loop.max_val_samples or 'all'} samples, {how}"


def _blend(loaded: LoadedRecipe) -> list[tuple[str, str]]:
    blend, policy = loaded.recipe.data.blend, loaded.recipe.policy
    amount = f", {blend.train_samples:,} samples" if blend.train_samples else ""
    counted = "all tokens count" if blend.train_on == "all" else "the last answer counts"
    over = {"truncate": "cut", "drop": "left out", "split": "made several samples of"}[blend.overlong]
    return [
        ("texts", f"blend {blend.name or blend.path}{amount}; {counted}; nothing is sampled"),
        ("length", f"≤ {policy.max_total_sequence_length} tokens; longer texts are {over}"),
    ]


def _quantised(loaded: LoadedRecipe) -> list[tuple[str, str]]:
    policy = loaded.recipe.policy
    config = policy.quantization
    if config is None:
        return []
    what = "weights and inputs (W4A4)" if config.activations else "weights (W4A16)"
    but = f", except {', '.join(config.exclude_modules)}" if config.exclude_modules else ""
    words = f"the student computes with NVFP4 {what}, preset {config.preset}{but}"
    if config.activations:
        source = policy.quant_calib_data
        if source is None:
            source = "texts of the blend" if loaded.recipe.data.blend.enabled else "the student's own responses"
        words += f"; calibrated on {policy.quant_calib_size} sequences of {source}"
    return [("quantised", words)]


def _context(loaded: LoadedRecipe) -> list[tuple[str, str]]:
    context = loaded.recipe.distillation.context_distillation
    if not context.enabled:
        return []
    source = "the response" if context.trace_source == "dynamic" else f"column {context.static_trace.answer_column}"
    weights = {"base_model": "frozen", "ema": f"their running mean, decay {context.ema_decay:g}", "live": "as they are"}
    return [
        (
            "context",
            f"the teacher reads a trace from {source}, prefix + response ≤ "
            f"{loaded.recipe.teacher.max_total_sequence_length} tokens; "
            f"the student's weights, {weights[context.frozen_teacher_source]}",
        )
    ]


def _sharding(loaded: LoadedRecipe) -> str:
    parts = []
    for name, model in (("student", loaded.recipe.policy), ("teacher", loaded.recipe.teacher)):
        sizes = loaded.recipe.role_sizes
        devices = sizes.training if name == "student" else sizes.teacher
        tensor, context = model.dtensor_cfg.tensor_parallel_size, model.dtensor_cfg.context_parallel_size
        experts = f" EP{model.dtensor_cfg.expert_parallel_size}" * (model.dtensor_cfg.expert_parallel_size > 1)
        parts.append(f"{name} TP{tensor} CP{context} DP{devices // (tensor * context)}{experts}")
    return ", ".join(parts)

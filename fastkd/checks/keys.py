"""Rules between keys: loss, lengths, batch arithmetic, validation."""

from __future__ import annotations

from collections.abc import Iterator

from fastkd.checks.finding import Finding, models_of
from fastkd.errors import RecipeError
from fastkd.recipe import LoadedRecipe


def loss(loaded: LoadedRecipe) -> Iterator[Finding]:
    loss, generation = loaded.recipe.loss_fn, loaded.recipe.policy.generation
    if loss.kl_type == "jsd" and loss.outside not in ("bucket", "renormalize"):
        yield RecipeError(
            "loss_fn.outside_topk",
            "kl_type jsd needs both distributions over the same cells: bucket or renormalize",
            "Write loss_fn.outside_topk=bucket",
            value=loss.outside,
        )
    if generation.temperature not in (0, 1) and loss.temperature == 1:
        yield (
            f"policy.generation.temperature={generation.temperature:g} applies to sampling only. NeMo RL also divides "
            f"the logits in the loss by it: for that, set loss_fn.temperature={generation.temperature:g}."
        )


def lengths(loaded: LoadedRecipe) -> Iterator[Finding]:
    recipe = loaded.recipe
    total = recipe.policy.max_total_sequence_length
    if recipe.data.max_input_seq_length > total:
        yield RecipeError(
            "data.max_input_seq_length",
            f"a prompt must fit into policy.max_total_sequence_length={total}",
            f"Write data.max_input_seq_length={total} or less",
            value=recipe.data.max_input_seq_length,
        )
    # With context distillation the teacher reads another prompt, and prefixes that are too long are cut.
    own_prompt = recipe.distillation.context_distillation.enabled
    if recipe.teacher.max_total_sequence_length < total and not own_prompt:
        yield RecipeError(
            "teacher.max_total_sequence_length",
            f"the teacher must be able to score whole rollouts, up to policy.max_total_sequence_length={total}",
            f"Write teacher.max_total_sequence_length={total}",
            value=recipe.teacher.max_total_sequence_length,
        )
    engine = recipe.policy.generation.vllm_cfg.max_model_len
    if recipe.policy.generation.backend == "vllm" and engine < total:
        yield RecipeError(
            "policy.generation.vllm_cfg.max_model_len",
            f"engines must accept policy.max_total_sequence_length={total}",
            f"Write policy.generation.vllm_cfg.max_model_len={total}",
            value=engine,
        )


def batching(loaded: LoadedRecipe) -> Iterator[Finding]:
    for name, model in models_of(loaded.recipe):
        if model.sequence_packing.enabled and model.dynamic_batching.enabled:
            yield RecipeError(
                f"{name}.dynamic_batching.enabled",
                f"{name}.sequence_packing is on too, and the two are exclusive",
                f"Write {name}.dynamic_batching.enabled=false",
                value=True,
            )
        if not model.dtensor_cfg.enabled:
            yield (
                f"{name}.dtensor_cfg.enabled=false has no effect: there is no other backend, and the sizes in "
                f"{name}.dtensor_cfg apply."
            )


def steps(loaded: LoadedRecipe) -> Iterator[Finding]:
    """Rollouts per step, optimizer step, data-parallel ranks."""
    recipe = loaded.recipe
    batch, per_update = recipe.distillation.batch_size, recipe.policy.train_global_batch_size
    if batch % per_update:
        yield RecipeError(
            "policy.train_global_batch_size",
            f"a step's {batch} rollouts (distillation.num_prompts_per_step={recipe.distillation.num_prompts_per_step} "
            f"× num_generations_per_prompt={recipe.distillation.num_generations_per_prompt}) must be a multiple of it",
            f"Write policy.train_global_batch_size={_divisor(batch, per_update)}",
            value=per_update,
        )
    if recipe.distillation.max_rollout_turns > 1:
        yield RecipeError(
            "distillation.max_rollout_turns",
            "only single-turn rollouts exist",
            "Write distillation.max_rollout_turns=1",
            value=recipe.distillation.max_rollout_turns,
        )


def validation(loaded: LoadedRecipe) -> Iterator[Finding]:
    recipe, loop = loaded.recipe, loaded.recipe.distillation
    if not recipe.validation_enabled:
        if loop.validates:
            yield (
                "Nothing will be validated: give data.validation, or data.train.split_validation_size, "
                "or switch validation off with distillation.val_period=0."
            )
        return
    if (
        loop.max_val_samples
        and loop.max_val_samples % loop.val_batch_size
        and loop.max_val_samples > loop.val_batch_size
    ):
        yield (
            f"distillation.max_val_samples={loop.max_val_samples} is not a multiple of "
            f"val_batch_size={loop.val_batch_size}: the last validation batch is smaller."
        )
    if recipe.data.blend.enabled:
        return
    held_out = [one.split_validation_size for one in recipe.data.train]
    counted = all(size == 0 or size >= 1 for size in held_out)  # a share is only known once the data is read
    if not recipe.data.validation and counted and sum(held_out) < (loop.max_val_samples or 0):
        yield (
            f"data.train.split_validation_size={sum(held_out):g} is below "
            f"distillation.max_val_samples={loop.max_val_samples}: validation runs on fewer samples than asked for."
        )


def checkpoints(loaded: LoadedRecipe) -> Iterator[Finding]:
    """Checkpoints that are kept by a metric need one."""
    recipe, saving = loaded.recipe, loaded.recipe.checkpointing
    if not saving.enabled:
        if saving.checkpoint_must_save_by:
            yield RecipeError(
                "checkpointing.checkpoint_must_save_by",
                "nothing is saved with checkpointing.enabled=false",
                "Write checkpointing.enabled=true, or leave the time out",
                value=saving.checkpoint_must_save_by,
            )
        return
    if saving.keep_top_k is None or not (saving.metric_name or "").startswith("val:"):
        return
    period = recipe.distillation.val_period
    if recipe.validation_enabled and period and saving.save_period % period:
        yield (
            f"checkpointing.save_period={saving.save_period} is no multiple of distillation.val_period={period}: "
            f"checkpoints without a validation have no {saving.metric_name} to be kept by."
        )


def _divisor(batch: int, near: int) -> int:
    """The divisor of a batch closest to what was asked for."""
    return min((one for one in range(1, batch + 1) if batch % one == 0), key=lambda one: abs(one - near))

"""Rules of context distillation: one turn, one model on both sides, a template with its places, room for a prefix."""

from __future__ import annotations

from collections.abc import Iterator

from fastkd import prefix_template
from fastkd.checks.finding import Finding
from fastkd.errors import RecipeError
from fastkd.recipe import LoadedRecipe

_WHERE = "distillation.context_distillation"


def context(loaded: LoadedRecipe) -> Iterator[Finding]:
    """Everything but the values that the tree itself allows (mode, alignment, problem_source)."""
    recipe, context = loaded.recipe, loaded.recipe.distillation.context_distillation
    if not context.enabled:
        return
    if recipe.policy.model_name != recipe.teacher.model_name:
        yield RecipeError(
            "teacher.model_name",
            f"{_WHERE}.mode=self_frozen requires it to equal policy.model_name={recipe.policy.model_name!r}",
            "Write teacher.model_name=${policy.model_name}",
            value=recipe.teacher.model_name,
        )
    yield from _template(loaded)
    yield from _trace(loaded)
    yield from _room(loaded)
    if context.shares_weights:
        yield from _moving_teacher(loaded)


def _template(loaded: LoadedRecipe) -> Iterator[RecipeError]:
    context = loaded.recipe.distillation.context_distillation
    key, value = f"{_WHERE}.teacher_prefix_template", context.teacher_prefix_template
    try:
        places = prefix_template.places(prefix_template.read(value, loaded.locate))
    except (OSError, UnicodeDecodeError) as error:
        rule = f"names no file that can be read ({error}), and without braces it is no text to fill"
        yield RecipeError(
            key, rule, "Write {problem} and {trace} in the text, or name a file that has them", value=value
        )
        return
    except ValueError as error:
        remedy = "Write {problem}, {trace} and {column} alone, and double every other brace: \\boxed{{}}"
        yield RecipeError(key, f"cannot be filled ({error})", remedy, value=value)
        return
    missing = [f"{{{name}}}" for name in (prefix_template.PROBLEM, prefix_template.TRACE) if name not in places]
    columns = set(places) - {prefix_template.PROBLEM, prefix_template.TRACE}
    if columns and prefix_template.PROBLEM in places:
        return  # a column stands in for the trace
    if missing:
        yield RecipeError(
            key, f"lacks {' and '.join(missing)}", "Both {problem} and {trace} must appear in the text", value=value
        )


def _trace(loaded: LoadedRecipe) -> Iterator[RecipeError]:
    context = loaded.recipe.distillation.context_distillation
    extractor = context.trace_extractor
    if context.trace_source == "static_dataset" and not context.static_trace.answer_column:
        yield RecipeError(
            f"{_WHERE}.static_trace.answer_column",
            "trace_source static_dataset reads the trace from this column",
            "Name the dataset column that holds the worked answer",
            value=context.static_trace.answer_column,
        )
    if (extractor.type == "regex") != bool(extractor.pattern):
        yield RecipeError(
            f"{_WHERE}.trace_extractor.pattern",
            "goes with trace_extractor.type=regex, and that with it",
            "Write both, or neither",
            value=extractor.pattern,
        )


def _room(loaded: LoadedRecipe) -> Iterator[Finding]:
    recipe = loaded.recipe
    longest, response = recipe.teacher.max_total_sequence_length, recipe.policy.generation.max_new_tokens
    if longest < 2:
        yield RecipeError(
            "teacher.max_total_sequence_length",
            "must hold a token of the prefix and one of the response",
            "Write at least 2",
            value=longest,
        )
    elif longest <= response:
        yield (
            f"teacher.max_total_sequence_length={longest} leaves no room for a prefix beside a response of "
            f"policy.generation.max_new_tokens={response}: samples with responses of {longest} tokens and more are "
            "dropped."
        )


def _moving_teacher(loaded: LoadedRecipe) -> Iterator[RecipeError]:
    """The teacher is the student's own module: same ranks, same layout, nothing of its own to grade."""
    recipe = loaded.recipe
    source = f"{_WHERE}.frozen_teacher_source={recipe.distillation.context_distillation.frozen_teacher_source}"
    if recipe.distillation.resource_isolation.enabled:
        yield RecipeError(
            "distillation.resource_isolation.enabled",
            f"{source} scores with the student's weights, so on the training devices",
            "Write distillation.resource_isolation.enabled=false, or frozen_teacher_source=base_model",
            value=True,
        )
    if recipe.distillation.val_teacher:
        yield RecipeError(
            "distillation.val_teacher",
            f"{source} has weights that move: there is no teacher to grade once",
            "Write distillation.val_teacher=false",
            value=True,
        )
    if recipe.policy.precision != recipe.teacher.precision:
        yield RecipeError(
            "teacher.precision",
            f"{source} computes as the student does, policy.precision={recipe.policy.precision}",
            "Write teacher.precision=${policy.precision}",
            value=recipe.teacher.precision,
        )
    for key in ("tensor_parallel_size", "context_parallel_size", "expert_parallel_size"):
        mine, its = getattr(recipe.policy.dtensor_cfg, key), getattr(recipe.teacher.dtensor_cfg, key)
        if mine != its:
            yield RecipeError(
                f"teacher.dtensor_cfg.{key}",
                f"{source} is sharded as the student is, policy.dtensor_cfg.{key}={mine}",
                f"Write teacher.dtensor_cfg.{key}={mine}",
                value=its,
            )

"""Fail-fast checks of a loaded recipe: rules between keys, and files on disk, without loading a model.

Model facts (vocabulary, heads) are read from ``config.json`` and ``tokenizer.json`` when the model is a local folder
or in the Hugging Face cache; nothing is downloaded, and neither torch nor transformers is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastkd.checks import (
    allocation,
    blends,
    context,
    devices,
    engines,
    files,
    keys,
    local,
    models,
    quantized,
    torch_names,
)
from fastkd.checks.finding import Finding
from fastkd.checks.local import local_run_problems, needs_cluster
from fastkd.checks.rest import other_errors
from fastkd.errors import RecipeError, RecipeErrors
from fastkd.recipe import LoadedRecipe, load_recipe, without_mistakes

__all__ = ["CheckReport", "check", "load_and_check", "local_run_problems", "needs_cluster"]

_RULES: tuple[Callable[[LoadedRecipe], Iterator[Finding]], ...] = (
    keys.loss,
    keys.lengths,
    keys.batching,
    keys.steps,
    keys.validation,
    keys.checkpoints,
    torch_names.optimizer,
    context.context,
    devices.roles,
    engines.sampling,
    engines.scoring,
    allocation.slurm,
    allocation.ray,
    files.datasets,
    files.outputs,
    lambda loaded: blends.blend(loaded, loaded.recipe.data.blend),
    files.sinks,
    models.model_facts,
    quantized.quantized,
    local.idle,
)


@dataclass(frozen=True)
class CheckReport:
    """What is wrong with a recipe, and what is doubtful."""

    errors: list[RecipeError]
    warnings: list[str]


def check(loaded: LoadedRecipe) -> CheckReport:
    """Every rule on a recipe; nothing is written and nothing raised."""
    findings = [finding for rule in _RULES for finding in rule(loaded)]
    return CheckReport(
        [one for one in findings if isinstance(one, RecipeError)],
        [one for one in findings if isinstance(one, str)],
    )


def load_and_check(path: str | Path, overrides: Sequence[str] = ()) -> tuple[LoadedRecipe, CheckReport]:
    """Load a recipe and apply every rule.

    Raises:
        RecipeErrors: every problem at once, of single keys and between keys.
    """
    try:
        loaded = load_recipe(path, overrides)
    except RecipeErrors as error:
        known = {one.key for one in error.errors}
        rest = without_mistakes(path, overrides, error.errors)
        found = other_errors(_RULES, *rest) if rest else ()
        raise RecipeErrors([*error.errors, *(one for one in found if one.key not in known)]) from None
    report = check(loaded)
    if report.errors:
        raise RecipeErrors(report.errors)
    return loaded, report

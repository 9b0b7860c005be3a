"""Fail-fast checks of a loaded recipe: rules between keys, and files on disk, without loading a model.

Model facts (vocabulary, heads) are read from ``config.json`` and ``tokenizer.json`` when the model is a local folder
or in the Hugging Face cache; nothing is downloaded, and neither torch nor transformers is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fastkd.checks import context, devices, files, keys, local, models
from fastkd.checks.finding import Finding
from fastkd.checks.local import local_run_problems
from fastkd.errors import RecipeError
from fastkd.recipe import LoadedRecipe

__all__ = ["CheckReport", "check", "local_run_problems"]

_RULES: tuple[Callable[[LoadedRecipe], Iterator[Finding]], ...] = (
    keys.loss,
    keys.lengths,
    keys.batching,
    keys.steps,
    keys.validation,
    context.context,
    devices.roles,
    devices.allocation,
    files.datasets,
    files.outputs,
    models.model_facts,
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

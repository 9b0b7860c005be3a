"""Rules about ``data.blend``: its file and sources are there, and the other keys fit a run on texts that exist."""

from __future__ import annotations

from collections.abc import Iterator

from fastkd.blends.blend_file import read_blend
from fastkd.blends.places import find_blend, find_source, run_length
from fastkd.checks.finding import Finding
from fastkd.config.blend import Blend
from fastkd.errors import DataError, RecipeError
from fastkd.recipe import LoadedRecipe


def blend(loaded: LoadedRecipe, config: Blend) -> Iterator[Finding]:
    """``config``: data.blend; no rule applies while it is off."""
    if not config.enabled:
        return
    try:
        run_length(loaded.recipe, config)
    except RecipeError as error:
        yield error
    try:
        path, _ = find_blend(config, loaded.folders)
        splits = read_blend(path).splits
    except DataError as error:
        if error.key == "data.blend.folder":  # a name is of a file that is brought here; the run itself needs it
            yield f"{error.key}={config.folder!r}: {error.rule}. The recipe can be checked, not run."
        else:
            yield _as_recipe_error(error)
        return
    for entry in splits["train"] + splits["valid"]:
        try:
            if entry.weight != 0:
                find_source(entry.path, [path.parent, *loaded.folders])
        except DataError as error:
            yield _as_recipe_error(error)
    if not splits["valid"] and loaded.recipe.distillation.validates:
        yield f"{path} has no valid split: nothing will be validated."


def _as_recipe_error(error: DataError) -> RecipeError:
    return RecipeError(error.key, error.rule, error.remedy, value=error.value)

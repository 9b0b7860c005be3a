"""What a rule yields: a RecipeError for what cannot run, plain text for what deserves a warning."""

from __future__ import annotations

from fastkd.config import Recipe, Teacher
from fastkd.errors import RecipeError

Finding = RecipeError | str


def models_of(recipe: Recipe) -> tuple[tuple[str, Teacher], ...]:
    """Both models with the section that describes them."""
    return ("policy", recipe.policy), ("teacher", recipe.teacher)

"""What every section of a recipe shares: strict, frozen, no unknown keys, documented by attribute docstrings.

A default may be an OmegaConf interpolation (``derived("${..max_total_sequence_length}")``): the loader lays
the defaults under the user's keys *before* interpolations are resolved, so a derived default follows
whatever the user wrote. Build recipes with ``fastkd.recipe.load_recipe`` or ``recipe_from``; constructing a
section directly skips that step and a derived default then fails its type check.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """One mapping of a recipe. Strict: ``"5"`` is not a number, ``true`` is not 1, but 1 is a valid float."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


Count = Annotated[int, Field(gt=0)]
"""A whole number of at least 1."""
Index = Annotated[int, Field(ge=0)]
"""A whole number of at least 0."""
Positive = Annotated[float, Field(gt=0)]
"""A number above 0."""
NonNegative = Annotated[float, Field(ge=0)]
"""A number of at least 0."""
Share = Annotated[float, Field(ge=0, le=1)]
"""A number in [0, 1]."""
Fraction = Annotated[float, Field(gt=0, lt=1)]
"""A number in (0, 1)."""

S = TypeVar("S", bound=Section)


def section(kind: type[S]) -> S:
    """A sub-section that is present with its defaults when the user does not write it."""
    return Field(default_factory=kind)


def derived(interpolation: str) -> Any:
    """A default that is an interpolation of other keys, e.g. ``derived("${cluster.gpus_per_node}")``."""
    return Field(default=interpolation)


def broken_rule(rule: str, remedy: str, *, key: str = "", **value: Any) -> PydanticCustomError:
    """What a validator of the tree raises: ``broken_rule("must be above 0", "Write 1e-5", key="lr",
    value=lr)``.

    `key` names the culprit below the field; without `value` the message shows none.
    """
    return PydanticCustomError("recipe_rule", "broken rule", {"rule": rule, "remedy": remedy, "key": key, **value})


def section_of(annotation: Any) -> type[Section] | None:
    """The Section class a field holds directly, else None."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def items_of(annotation: Any) -> type[Section] | None:
    """The Section class of a list's items (``list[Dataset]``), else None."""
    return section_of(get_args(annotation)[0]) if get_origin(annotation) is list else None


def default_tree(kind: type[Section]) -> dict[str, Any]:
    """The defaults of a section as a plain nested mapping; required keys are absent, interpolations
    unresolved."""
    tree: dict[str, Any] = {}
    for name, field in kind.model_fields.items():
        inner = section_of(field.annotation)
        if inner is not None:
            tree[name] = default_tree(inner)
        elif not field.is_required():
            tree[name] = field.get_default(call_default_factory=True)
    return tree

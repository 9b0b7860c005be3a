"""``policy.dtensor_cfg.lora_cfg``: adapters that the student trains in place of its weights."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from fastkd.config.base import Count, Positive, Section, broken_rule


class LoRA(Section):
    """Low-rank adapters: every chosen layer computes W x + (alpha / dim) · B A x, and only A and B are trained."""

    enabled: bool = False
    """Train adapters; all weights of the model stay frozen."""
    target_modules: list[str] = Field(default_factory=list)
    """Linear layers that get one, by name (`q_proj`), end of name (`self_attn.q_proj`) or pattern (`*.layers.0.*`);
    empty = every linear layer but the LM head."""
    exclude_modules: list[str] = Field(default_factory=list)
    """Layers taken out of that choice, named likewise."""
    match_all_linear: bool = False
    """Says that `target_modules` is meant to be empty."""
    dim: Count = 8
    """Rank of every adapter."""
    alpha: Positive = 32.0
    """The adapter's output is multiplied by alpha / dim."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of values dropped in training."""
    dropout_position: Literal["pre", "post"] = "pre"
    """Drop values of the adapter's input (pre), or of its output (post)."""
    lora_A_init: Literal["uniform", "xavier"] = "uniform"
    """A at the start: `uniform` in ±1/√inputs, as PEFT, or `xavier` normal. B starts at zero."""

    @field_validator("match_all_linear")
    @classmethod
    def _says_what_is_chosen(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("target_modules"):
            rule = f"target_modules={info.data['target_modules']} chooses some layers, and this all of them"
            raise broken_rule(rule, "Leave one of the two out", value=value)
        return value

"""``policy.quant_*``: the student as it will be served, in NVFP4. Key names are those of NeMo RL."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from pydantic import Field, field_validator

from fastkd.config.base import Count, Section, broken_rule

Preset = Literal["default", "weight_only", "mlp_only", "experts_only"]
PRESETS: tuple[str, ...] = get_args(Preset)
# ModelOpt's names of the same choices, as its scripts and NeMo RL's recipes write them.
MODELOPT = {
    "NVFP4_DEFAULT_CFG": "default",
    "W4A16_NVFP4_CFG": "weight_only",
    "NVFP4_MLP_ONLY_CFG": "mlp_only",
    "NVFP4_EXPERTS_ONLY_CFG": "experts_only",
}


class Quantization(NamedTuple):
    """Which layers are quantised, and whether their inputs are too."""

    preset: str = "default"
    exclude_modules: tuple[str, ...] = ()

    @property
    def activations(self) -> bool:
        """W4A4; False is W4A16: weights alone."""
        return self.preset != "weight_only"


class QuantizationKeys(Section):
    """The keys; part of ``policy``."""

    quant_cfg: str | None = None
    """Train the student with fake-quantised NVFP4 weights and activations: `default` (W4A4, all linear layers in the
    blocks), `weight_only` (W4A16, the same layers), `mlp_only`, `experts_only` (W4A4), or ModelOpt's name of one of
    these (`NVFP4_DEFAULT_CFG`); null = off. Never quantised: LM head, embeddings, norms, routers."""
    quant_exclude_modules: list[str] = Field(default_factory=list)
    """Layers that stay in `precision`, by name (`o_proj`), end of name (`self_attn.o_proj`) or pattern
    (`*.layers.0.*`)."""
    quant_calib_data: str | None = None
    """Text that activations' scales are calibrated on: a file (jsonl, parquet), a folder or a Hugging Face id; null =
    the student's own responses to training prompts, sampled before it is quantised."""
    quant_calib_size: Count = 512
    """Sequences of that text."""
    quant_sequence_length: Count = 2048
    """Longest of them, in tokens; never above `max_total_sequence_length`."""

    @field_validator("quant_cfg")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is None:
            return None
        preset = MODELOPT.get(value, value)
        if preset not in PRESETS:
            raise broken_rule("must be " + ", ".join([*PRESETS, *MODELOPT]) + " or null", "Use one", value=value)
        return preset

    @property
    def quantization(self) -> Quantization | None:
        """What is quantised; None: nothing."""
        if self.quant_cfg is None:
            return None
        return Quantization(self.quant_cfg, tuple(self.quant_exclude_modules))

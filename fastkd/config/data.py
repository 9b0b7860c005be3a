"""``data`` and ``env``: prompts to train and validate on, and how answers are graded."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from fastkd.config.base import Count, Section, broken_rule, derived, section
from fastkd.config.blend import Blend


class Dataset(Section):
    """One dataset. Every key that is absent takes the value of the same key under `data.default`."""

    dataset_name: str | None = None
    """A known dataset (`OpenThoughts-114k`, `DeepScaler`, `AIME2024`, …); `ResponseDataset` means
    `data_path`."""
    data_path: str | None = None
    """JSONL, Parquet or CSV file, folder, or Hugging Face id."""
    subset: str | None = None
    """Configuration name of a Hugging Face dataset."""
    split: str | None = None
    """Split to read; null = that of a known dataset, else `train`."""
    filter_column: str | None = None
    """Keep only rows whose value in this column equals `filter_value`."""
    filter_value: str | int | float | bool | None = None
    """The value to keep."""
    split_validation_size: Annotated[int | float, Field(ge=0)] = 0
    """Rows of the training set held out for validation; below 1, their share."""
    seed: int = 42
    """Seed of the hold-out split."""
    input_key: str | None = None
    """Column of the problem; null = that of a known dataset, else `input`."""
    output_key: str | None = None
    """Column of the reference answer; null = that of a known dataset, else `output`."""
    processor: str | None = None
    """Name of the row processor; null = the one of the dataset or environment."""
    prompt_file: str | None = None
    """Text file around the problem; `{}` marks where the problem goes."""
    system_prompt_file: str | None = None
    """Text file of the system message."""
    env_name: str = "math"
    """Which environment under `env` grades the answers."""
    repeat: Count = 1
    """Use every row this often (several samples per validation problem)."""


class Data(Section):
    """What is read, in which order, and how long a prompt may be."""

    max_input_seq_length: Count = derived("${policy.max_total_sequence_length}")
    """Longest prompt in tokens; longer ones are masked and counted."""
    shuffle: bool = True
    """Shuffle the training prompts in every epoch."""
    train: list[Dataset] = Field(default_factory=list)
    """A dataset or a list of datasets. Required unless `blend` is given."""
    blend: Blend = section(Blend)
    """Train off-policy, on texts that exist, in place of the student's own samples."""
    validation: list[Dataset] = Field(default_factory=list)
    """A dataset, a list, or null: validate on `split_validation_size` rows of the training set."""
    default: Dataset = section(Dataset)
    """Values for every dataset that does not set them itself."""

    @field_validator("train", "validation", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [] if value is None else [value] if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _something(self) -> Data:
        if not self.train and not self.blend.enabled:
            raise broken_rule("is required", "Write data.train: {data_path: ...}, or data.blend", key="train")
        return self


class MathEnv(Section):
    """Grading of mathematical answers."""

    num_workers: Count = 8
    """Grading processes on a cluster. In an embedded run the driver grades, in milliseconds per answer."""


class Env(Section):
    """Environments that grade answers."""

    math: MathEnv = section(MathEnv)
    """Boxed answers and plain numbers, compared with math-verify."""

"""Datasets known by name: where they live and which columns to read. Without torch, so that checks may ask."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Source:
    """A dataset known by name."""

    path: str
    """Hugging Face id."""
    input_key: str
    output_key: str
    subset: str | None = None
    split: str = "train"


NAMED = {
    "OpenThoughts-114k": Source("open-thoughts/OpenThoughts-114k", "problem", "ground_truth_solution", "metadata"),
    "DeepScaler": Source("agentica-org/DeepScaleR-Preview-Dataset", "problem", "answer"),
    "AIME2024": Source("HuggingFaceH4/aime_2024", "problem", "answer"),
    "AIME2025": Source("opencompass/AIME2025", "question", "answer", "AIME2025-I", "test"),
}

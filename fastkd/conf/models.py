"""From the checkpoints of a Megatron run to Hugging Face models, and the shapes that must agree.

A Megatron checkpoint says its model in its name (Qwen3-8B-NVFP4-TP8-MLM); the same model in Hugging Face format is what
fastkd starts from. It quantises by itself, so the student starts from the weights that are not quantised yet.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_MARKS = re.compile(r"[-_](NVFP4|FP8|BF16|MLM|mcore|megatron|(TP|PP|EP|CP|ETP)\d+)(?=[-_]|$)", re.IGNORECASE)
_MEGATRON = re.compile(r"[-_](MLM|mcore|megatron|(TP|PP|EP)\d+)(?=[-_]|$)", re.IGNORECASE)
_ORGANISATIONS = {"Qwen": "Qwen", "Llama": "meta-llama", "OLMo": "allenai", "Mistral": "mistralai"}


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a model's shape other settings depend on."""

    heads: int
    kv_heads: int
    head_dim: int
    experts: int = 0
    layers: int | None = None
    hidden: int | None = None


_KNOWN = {
    "Qwen3-0.6B": Shape(16, 8, 128, 0, 28, 1024),
    "Qwen3-1.7B": Shape(16, 8, 128, 0, 28, 2048),
    "Qwen3-4B": Shape(32, 8, 128, 0, 36, 2560),
    "Qwen3-8B": Shape(32, 8, 128, 0, 36, 4096),
    "Qwen3-14B": Shape(40, 8, 128, 0, 40, 5120),
    "Qwen3-32B": Shape(64, 8, 128, 0, 64, 5120),
    "Qwen3-30B-A3B": Shape(32, 4, 128, 128, 48, 2048),
    "Qwen3-235B-A22B": Shape(64, 4, 128, 128, 94, 4096),
}


def bare_name(checkpoint: str) -> str:
    """The model of a checkpoint: its folder's name without number format, sharding and "MLM"."""
    return _MARKS.sub("", Path(checkpoint.rstrip("/")).name)


def is_megatron(checkpoint: str) -> bool:
    """Whether a checkpoint is one of Megatron: by its files where it is there, else by its name."""
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        if (path / "config.json").is_file():
            return False
        marks = ("latest_checkpointed_iteration.txt", "common.pt", "metadata.json")
        return any((path / name).exists() for name in marks) or any(path.glob("iter_*"))
    return _MEGATRON.search(path.name) is not None


def is_quantised(checkpoint: str) -> bool:
    """Whether a Hugging Face folder holds weights that are quantised already."""
    path = Path(checkpoint).expanduser()
    if (path / "hf_quant_config.json").is_file():
        return True
    return "quantization_config" in _config(path)


def hugging_face(name: str, models_root: str | None) -> str:
    """The Hugging Face model of this name: a folder under MODELS_ROOT if it is there, else its id on the hub."""
    if models_root:
        folder = Path(models_root).expanduser() / name
        if (folder / "config.json").is_file():
            return str(folder)
    if "/" in name:
        return name
    organisation = next((one for start, one in _ORGANISATIONS.items() if name.startswith(start)), None)
    return f"{organisation}/{name}" if organisation else name


def shape_of(model: str) -> Shape | None:
    """The shape of a model: from its config.json where it is a folder, else of the Qwen3 that its name begins with."""
    config = _config(Path(model).expanduser())
    if config:
        heads = config.get("num_attention_heads", 0)
        return Shape(
            heads,
            config.get("num_key_value_heads", heads),
            config.get("head_dim") or config.get("hidden_size", 0) // max(heads, 1),
            config.get("num_experts") or config.get("num_local_experts") or config.get("n_routed_experts") or 0,
            config.get("num_hidden_layers"),
            config.get("hidden_size"),
        )
    name = model.rsplit("/", 1)[-1]
    matches = [known for known in _KNOWN if name == known or name.startswith(f"{known}-")]
    return _KNOWN[max(matches, key=len)] if matches else None


def _config(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}


def mismatches(settings: dict[str, Any], model: str) -> list[str]:
    """What Megatron's settings of a model say otherwise than the model: one sentence each.

    Args:
        settings: num_query_groups, kv_channels, num_attention_heads, …; others are not looked at.
        model: the Hugging Face model.
    """
    shape = shape_of(model)
    if shape is None:
        return []
    expected = {
        "num_query_groups": (shape.kv_heads, "key/value heads (GQA)"),
        "kv_channels": (shape.head_dim, "as its head dimension"),
        "num_attention_heads": (shape.heads, "attention heads"),
        "num_layers": (shape.layers, "layers"),
        "hidden_size": (shape.hidden, "as its hidden size"),
        "num_experts": (shape.experts or None, "experts"),
        "num_moe_experts": (shape.experts or None, "experts"),
    }
    found = []
    for name, (right, what) in expected.items():
        given = settings.get(name, settings.get(name.replace("_", "-")))
        if given is not None and right is not None and str(given) != str(right):
            found.append(f"{name} is {given}, and {model} has {right} {what}")
    return found


def read_yaml(path: str) -> dict[str, Any] | None:
    """A YAML mapping; None when there is no such file. ValueError: it is something else."""
    file = Path(path).expanduser()
    if not file.is_file():
        return None
    try:
        found = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"not YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(found, dict):
        raise ValueError(f"holds a {type(found).__name__}, not a mapping")
    return found


def flags(arguments: str) -> dict[str, str]:
    """``--num-query-groups 4 --bf16`` as {"num_query_groups": "4", "bf16": ""}."""
    found: dict[str, str] = {}
    name = None
    for word in arguments.split():
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = value
        elif name and not found[name]:
            found[name] = word
    return found

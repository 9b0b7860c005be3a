"""What a model's files say without loading it: sizes from ``config.json``, ids and tokens from ``tokenizer.json``.

A model that is not on this machine has its published sizes, where they are known.

For checks that must answer at once (importing transformers alone takes seconds) and offline.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from fastkd.errors import RecipeError

_DATA_SUFFIXES = {".jsonl", ".json", ".parquet", ".csv", ".txt", ".arrow"}


@dataclass(frozen=True)
class ModelFiles:
    """Sizes of a model; None where its config does not say."""

    folder: Path | None
    """None: it is not on this machine, and its sizes are the published ones."""
    vocab_size: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    max_positions: int | None = None
    inner: int | None = None
    """Width of the MLP, of one expert's where there are experts."""
    experts: int | None = None
    """0 of a dense model."""

    def tokens_of(self, tokenizer: str) -> dict[int, str] | None:
        """{id: token} of the tokenizer of this name, or None when there is no tokenizer.json to read."""
        folder = find_folder(tokenizer) or self.folder
        path = folder / "tokenizer.json" if folder else None
        return _read_tokens(path.resolve()) if path and path.is_file() else None

    def missing_weights(self) -> list[str]:
        """Files of weights that the folder's index names and that are not there."""
        index = self.folder / "model.safetensors.index.json" if self.folder else None
        if index is None or not index.is_file():
            return []
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, LookupError, TypeError, AttributeError, OSError):
            return [index.name]
        return sorted(name for name in named if not (index.parent / name).is_file())

    def has_weights(self) -> bool:
        """Whether there are weights, or they can be downloaded."""
        return self.folder is None or any(any(self.folder.glob(kind)) for kind in ("*.safetensors", "*.bin"))


def looks_local(name: str) -> bool:
    """Whether a name can only be a path: a Hugging Face id has at most one slash and no file suffix of
    ours."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in _DATA_SUFFIXES


def find_folder(name: str) -> Path | None:
    """The folder of a model: the path itself, or the newest snapshot of an id in the Hugging Face cache."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if looks_local(name):
        return None
    repository = _hub_cache() / f"models--{name.replace('/', '--')}"
    snapshots = [one for one in repository.glob("snapshots/*") if one.is_dir()]
    main = repository / "refs" / "main"
    if main.is_file() and (chosen := repository / "snapshots" / main.read_text().strip()) in snapshots:
        return chosen
    return max(snapshots, key=lambda one: one.stat().st_mtime, default=None)


def read_model(key: str, name: str, needs: str = "config.json") -> ModelFiles | None:
    """Facts about a model; None for an id that is not in the cache, may be downloaded, and has no published sizes.

    Args:
        key: the recipe key that names it, for errors.
        name: folder or Hugging Face id.
        needs: "config.json", or "tokenizer" for a folder that only holds a tokenizer.

    Raises:
        RecipeError: a path that does not exist, a folder that is no model, or an uncached id while offline.
    """
    folder = find_folder(name)
    if folder is None:
        if looks_local(name):
            rule = "is a file, not a folder" if Path(name).expanduser().exists() else "no such folder"
            remedy = "Give a folder that holds config.json, or a Hugging Face id such as Qwen/Qwen3-0.6B"
            raise RecipeError(key, rule, remedy, value=name)
        if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "on", "yes"):
            rule = f"HF_HUB_OFFLINE is set and it is not in the cache {_hub_cache()}"
            raise RecipeError(key, rule, "Download it first, or give a folder", value=name)
        return _published().get(name) if needs == "config.json" else None
    if needs == "tokenizer":
        if not any(folder.glob("tokenizer*")):
            raise RecipeError(key, "the folder holds no tokenizer", "Give a folder with tokenizer.json", value=name)
        return ModelFiles(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(
            key, "the folder holds no config.json", "Give a folder that save_pretrained wrote", value=name
        ) from None
    except (ValueError, OSError) as error:
        raise RecipeError(key, f"its config.json cannot be read ({error})", "Write it anew", value=name) from None
    return _facts(folder, config if isinstance(config, dict) else {})


@cache
def _published() -> dict[str, ModelFiles]:
    """Sizes by Hugging Face id, from the table that plans use."""
    path = Path(__file__).resolve().parent / "plan" / "shapes.yaml"
    entries = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return {name: _facts(None, entry["config"]) for entry in entries for name in entry["names"]}


def _facts(folder: Path | None, config: dict[str, Any]) -> ModelFiles:
    # Models with several towers keep the language model's sizes one level down.
    sizes = {**(config.get("text_config") or {}), **config}

    def whole(name: str) -> int | None:
        value = sizes.get(name)
        return value if isinstance(value, int) and value > 0 else None

    heads = whole("num_attention_heads")
    return ModelFiles(
        folder,
        whole("vocab_size"),
        heads,
        whole("num_key_value_heads") or heads,
        whole("max_position_embeddings"),
        whole("moe_intermediate_size") or whole("intermediate_size"),
        (whole("num_experts") or whole("num_local_experts") or whole("n_routed_experts") or 0) if heads else None,
    )


@cache
def _read_tokens(path: Path) -> dict[int, str] | None:
    """{id: token} of a tokenizer.json. Cached: teacher and student often name one file of many megabytes."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        pairs = (
            vocabulary.items() if isinstance(vocabulary, dict) else ((one[0], i) for i, one in enumerate(vocabulary))
        )
        added = ((one["content"], one["id"]) for one in content.get("added_tokens", []))
        return {index: token for token, index in (*pairs, *added)}
    except (ValueError, LookupError, TypeError, OSError):
        return None


def _hub_cache() -> Path:
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")), "huggingface"
    )
    return Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()

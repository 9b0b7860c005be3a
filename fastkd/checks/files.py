"""Rules about files on disk: datasets, prompts, and the folders a run writes to."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from pathlib import Path

from fastkd.checks.finding import Finding
from fastkd.checks.model_files import looks_local
from fastkd.config import Dataset, Env
from fastkd.errors import RecipeError
from fastkd.recipe import LoadedRecipe


def datasets(loaded: LoadedRecipe) -> Iterator[Finding]:
    data = loaded.recipe.data
    for part, datasets in (("train", data.train), ("validation", data.validation)):
        for position, dataset in enumerate(datasets):
            where = f"data.{part}.{position}" if len(datasets) > 1 else f"data.{part}"
            yield from _dataset(loaded, where, dataset)


def _dataset(loaded: LoadedRecipe, where: str, dataset: Dataset) -> Iterator[Finding]:
    if dataset.data_path is None and dataset.dataset_name in (None, "ResponseDataset"):
        yield RecipeError(
            f"{where}.data_path",
            "names no dataset",
            f"Give {where}.data_path (a .jsonl, .json, .parquet or .csv file, a folder or a Hugging Face id), "
            f"or {where}.dataset_name",
            value=None,
        )
    elif dataset.data_path and looks_local(dataset.data_path) and not _exists(loaded, dataset.data_path):
        yield RecipeError(
            f"{where}.data_path",
            "no such file or folder",
            "Relative paths are looked up from the current folder, then from the recipe's",
            value=dataset.data_path,
        )
    for key, name in (("prompt_file", dataset.prompt_file), ("system_prompt_file", dataset.system_prompt_file)):
        if name is None:
            continue
        path = Path(loaded.locate(name))
        if not path.is_file():
            yield RecipeError(
                f"{where}.{key}",
                "no such file",
                "Relative paths are looked up from the current folder, then from the recipe's",
                value=name,
            )
        elif key == "prompt_file":
            yield from _prompt(f"{where}.{key}", name, path)
    if dataset.env_name not in Env.model_fields:
        close = difflib.get_close_matches(dataset.env_name, list(Env.model_fields), n=1, cutoff=0.4)
        yield RecipeError(
            f"{where}.env_name",
            f"no such environment; there is {', '.join(Env.model_fields)}",
            f"Write {where}.env_name={(close or list(Env.model_fields))[0]}",
            value=dataset.env_name,
        )


def _prompt(key: str, name: str, path: Path) -> Iterator[RecipeError]:
    """The file is used as ``text.format(problem)``: one place for the problem, other braces doubled."""
    mark = "\x00"
    try:
        placed = mark in path.read_text(encoding="utf-8").format(mark)
    except (UnicodeDecodeError, ValueError, LookupError, AttributeError) as error:
        yield RecipeError(
            key,
            f"cannot be filled with a problem ({type(error).__name__}: {error})",
            "Write {} where the problem goes, and double every other brace: \\boxed{{}}",
            value=name,
        )
        return
    if not placed:
        yield RecipeError(key, "has no {} for the problem", "Write {} where the problem goes", value=name)


def outputs(loaded: LoadedRecipe) -> Iterator[Finding]:
    recipe = loaded.recipe
    folders = {"logger.log_dir": recipe.logger.log_dir}
    checkpoints = recipe.checkpointing.checkpoint_dir
    # Below the run folder (the default) it shares that folder's fate: one mistake, one message.
    if recipe.checkpointing.enabled and not Path(checkpoints).is_relative_to(recipe.logger.log_dir):
        folders["checkpointing.checkpoint_dir"] = checkpoints
    for key, name in folders.items():
        path = Path(name).expanduser().absolute()
        existing = next(one for one in (path, *path.parents) if one.exists())
        if not existing.is_dir():
            yield RecipeError(
                key, f"{existing} is a file, so nothing can be written below it", "Choose a folder", value=name
            )
        elif not os.access(existing, os.W_OK | os.X_OK):
            yield RecipeError(key, f"no permission to write in {existing}", "Choose another folder", value=name)


def _exists(loaded: LoadedRecipe, name: str) -> bool:
    return Path(loaded.locate(name)).expanduser().exists()

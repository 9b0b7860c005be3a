"""Rules about files on disk: datasets and their columns, prompts, the folders a run writes to, and other sinks."""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path

from fastkd.checks.finding import Finding
from fastkd.config import Dataset, Env
from fastkd.config.sources import NAMED
from fastkd.errors import RecipeError
from fastkd.model_files import looks_local
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
    elif dataset.data_path is None and dataset.dataset_name not in NAMED and "/" not in (dataset.dataset_name or ""):
        near = difflib.get_close_matches(dataset.dataset_name or "", [*NAMED, "ResponseDataset"], n=1)
        remedy = f"Did you mean {near[0]}?" if near else f"Write one of {', '.join(NAMED)}, or give {where}.data_path"
        yield RecipeError(
            f"{where}.dataset_name", "no dataset is known by this name", remedy, value=dataset.dataset_name
        )
    elif dataset.data_path and looks_local(dataset.data_path) and not _exists(loaded, dataset.data_path):
        yield RecipeError(
            f"{where}.data_path",
            "no such file or folder",
            "Relative paths are looked up from the current folder, then from the recipe's",
            value=dataset.data_path,
        )
    elif dataset.data_path and (columns := _columns(Path(loaded.locate(dataset.data_path)).expanduser())):
        yield from _named_columns(loaded, where, dataset, columns)
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


def _columns(path: Path) -> list[str]:
    """Columns of a .jsonl file, by its first line; empty for anything else (the driver looks again)."""
    if path.suffix != ".jsonl" or not path.is_file():
        return []
    try:
        with path.open(encoding="utf-8") as file:
            first = json.loads(next((line for line in file if line.strip()), "null"))
    except (ValueError, OSError):
        return []
    return list(first) if isinstance(first, dict) else []


def _named_columns(loaded: LoadedRecipe, where: str, dataset: Dataset, columns: list[str]) -> Iterator[RecipeError]:
    wanted = {
        f"{where}.input_key": dataset.input_key or "input",
        f"{where}.output_key": dataset.output_key or "output",
        f"{where}.filter_column": dataset.filter_column,
    }
    context = loaded.recipe.distillation.context_distillation
    if context.enabled and context.trace_source == "static_dataset" and where.startswith("data.train"):
        key = "distillation.context_distillation.static_trace.answer_column"
        wanted[key] = context.static_trace.answer_column
    for key, column in wanted.items():
        if column and column not in columns:
            near = difflib.get_close_matches(column, columns, n=1)
            rule = f"{dataset.data_path} has no such column; it has {', '.join(columns)}"
            yield RecipeError(key, rule, f"Write {key}={(near or columns)[0]}", value=column)


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


def sinks(loaded: LoadedRecipe) -> Iterator[Finding]:
    """Where metrics go besides the run folder; a run stops for a missing package, a check elsewhere need not."""
    logger = loaded.recipe.logger
    for enabled, package in ((logger.wandb_enabled, "wandb"), (logger.tensorboard_enabled, "tensorboard")):
        if enabled and importlib.util.find_spec(package) is None:
            yield f"logger.{package}_enabled=true needs the package {package}, which is not installed here."
    offline = os.environ.get("WANDB_MODE", "").lower() in ("offline", "disabled")
    known = os.environ.get("WANDB_API_KEY") or (Path.home() / ".netrc").is_file()
    if logger.wandb_enabled and not offline and not known:
        yield "logger.wandb_enabled=true needs WANDB_API_KEY, or WANDB_MODE=offline, in the environment of the job."

"""Where a blend and its sources lie, and how long a run on it is. Imports neither torch nor numpy: ``--check`` asks."""

from __future__ import annotations

from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Literal, NamedTuple

from fastkd.blends.named import find_named, unknown_name, variant_of
from fastkd.config import Recipe
from fastkd.config.blend import Blend, Variant
from fastkd.errors import DataError, RecipeError


class Place(NamedTuple):
    """One source on disk."""

    kind: Literal["jsonl", "parquet", "indexed"]
    name: str
    """The path, found; without the ending for a .bin/.idx pair."""
    files: tuple[Path, ...]


def find_blend(config: Blend, folders: Sequence[Path]) -> tuple[Path, Variant]:
    """The blend file that the recipe means, and the variant in force.

    Raises:
        DataError: an unknown name, or no such file.
    """
    named = find_named(config.name) if config.name else None
    if config.path is None:
        if named is None:
            raise unknown_name(config.name or "")
        given = Path(config.folder).expanduser() / named[2]
        key = "data.blend.folder"
    else:
        given = Path(config.path).expanduser()
        key = "data.blend.path"
    path = next((one for folder in (Path(), *folders) if (one := folder / given).is_file()), None)
    if path is None:
        raise DataError(key, f"there is no file {given}", "Check the path, or give data.blend.path", value=str(given))
    return path, config.variant or (named[1] if named else variant_of(path.stem))


def find_source(name: str, folders: Sequence[Path]) -> Place:
    """A source by its path: .jsonl, .parquet (a file, a folder, a pattern), or the prefix of a .bin/.idx pair.

    Args:
        name: as the blend file writes it. Looked up as given, then in each of the folders.
        folders: where relative paths may lie.

    Raises:
        DataError: not there, or of an unknown kind.
    """
    for folder in (Path(), *folders):
        path = folder / Path(name).expanduser()
        stem = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
        pair = tuple(Path(f"{stem}{ending}") for ending in (".idx", ".bin"))
        if any(file.is_file() for file in pair):
            for file in pair:
                if not file.is_file():
                    raise DataError("data.blend", f"{file} is missing", "A source is both files", value=str(stem))
            return Place("indexed", str(stem), pair)
        if path.is_file():
            return _file(path)
        files = tuple(sorted(path.glob("*.parquet")) if path.is_dir() else sorted(map(Path, glob(str(path)))))
        if files and all(file.suffix == ".parquet" for file in files):
            return Place("parquet", str(path), files)
    beside = next((f"{name}{ending}" for ending in (".jsonl", ".parquet") if Path(f"{name}{ending}").is_file()), None)
    raise DataError(
        "data.blend",
        f"there is no source {name}: no file of that name, and no {name}.bin with {name}.idx",
        f"Did you mean {beside}?" if beside else "Check the path, or take the source out of the blend file",
    )


def _file(path: Path) -> Place:
    if path.suffix in (".jsonl", ".json"):
        return Place("jsonl", str(path), (path,))
    if path.suffix == ".parquet":
        return Place("parquet", str(path), (path,))
    raise DataError(
        "data.blend",
        f"{path} is of an unknown kind",
        "Known are .jsonl, .parquet, and the prefix of a .bin/.idx pair; unpack what is compressed",
    )


def run_length(recipe: Recipe, blend: Blend) -> tuple[int, int]:
    """(steps, samples) of a run on a blend.

    Raises:
        RecipeError: fewer samples than one step needs, or keys that make no sense on texts that exist.
    """
    loop = recipe.distillation
    if loop.num_generations_per_prompt != 1:
        raise RecipeError(
            "distillation.num_generations_per_prompt",
            "a blend gives one text per sample",
            "Set it to 1",
            value=loop.num_generations_per_prompt,
        )
    if loop.context_distillation.enabled:
        raise RecipeError(
            "distillation.context_distillation.enabled",
            "the teacher reads the texts of a blend as the student does",
            "Switch it off, or leave data.blend out",
            value=True,
        )
    named = find_named(blend.name) if blend.name else None
    samples = blend.train_samples or (named[0].samples if named else None)
    if samples is None:
        return loop.max_num_steps, loop.max_num_steps * loop.num_prompts_per_step
    steps = min(samples // loop.num_prompts_per_step, loop.max_num_steps)
    if steps == 0:
        raise RecipeError(
            "data.blend.train_samples",
            f"one step takes {loop.num_prompts_per_step} (distillation.num_prompts_per_step)",
            "Train on more, or lower num_prompts_per_step",
            value=samples,
        )
    return steps, steps * loop.num_prompts_per_step

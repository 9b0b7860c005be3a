"""Prompts from datasets, in an order that resumes exactly.

The order of epoch e is a permutation seeded by (data seed, e), so the position in the data is one number: how many
prompts have been consumed. An incomplete last batch of an epoch is dropped, as NeMo RL does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fastkd.batch import Prompt
from fastkd.config import Dataset, Recipe
from fastkd.config.sources import NAMED, Source
from fastkd.errors import DataError, ModelError, RecipeError, reason
from fastkd.log import logger
from fastkd.sampling import stable_seed

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Problems:
    """Rows of one or more datasets, reduced to what a run needs."""

    rows: Sequence[Row]
    """Each with problem, answer, columns (those that only a teacher reads), and the index of its dataset section."""

    def __len__(self) -> int:
        return len(self.rows)


def load_problems(recipe: Recipe) -> tuple[Problems, Problems]:
    """Training and validation problems as the recipe asks.

    Validation comes from data.validation, or from the rows that data.train.split_validation_size sets aside.

    Raises:
        DataError: a dataset is missing, empty, lacks a column, or is smaller than one step's prompts.
    """
    context = recipe.distillation.context_distillation
    train, held_out = _load_sections("data.train", recipe.data.train, context.columns)
    if recipe.data.validation:
        validation, _ = _load_sections("data.validation", recipe.data.validation, context.columns, optional=True)
    else:
        validation = held_out
    need = recipe.distillation.num_prompts_per_step
    if len(train) < need:
        raise DataError(
            "data.train",
            f"holds {len(train)} problems, fewer than distillation.num_prompts_per_step={need}, so no step is complete",
            "Lower num_prompts_per_step or give more data",
        )
    limit = recipe.distillation.max_val_samples
    return Problems(train), Problems(validation[:limit] if limit else validation)


def _load_sections(
    key: str, sections: Sequence[Dataset], columns: Sequence[str] = (), *, optional: bool = False
) -> tuple[list[Row], list[Row]]:
    kept: list[Row] = []
    held_out: list[Row] = []
    for number, section in enumerate(sections):
        name = f"{key}.{number}" if len(sections) > 1 else key
        rows, validation = _load_section(name, section, columns, optional)
        kept += [row | {"section": number} for row in rows]
        held_out += [row | {"section": number} for row in validation]
    return kept, held_out


def _load_section(key: str, section: Dataset, columns: Sequence[str], optional: bool) -> tuple[list[Row], list[Row]]:
    dataset, source = open_dataset(key, section)
    input_key = section.input_key or (source.input_key if source else "input")
    output_key = section.output_key or (source.output_key if source else "output")
    wanted = {"input_key": input_key, "output_key": output_key}
    if section.filter_column:
        wanted["filter_column"] = section.filter_column
    for setting, column in wanted.items():
        if column not in dataset.column_names:
            near = get_close_matches(column, dataset.column_names, n=1)
            raise DataError(
                f"{key}.{setting}",
                f"the dataset has no such column; it has {', '.join(dataset.column_names)}",
                f"Set {key}.{setting}={near[0] if near else dataset.column_names[0]}",
                value=column,
            )
    columns = _present(key, columns, dataset.column_names, optional)
    if section.filter_column:
        column, value = section.filter_column, section.filter_value
        dataset = dataset.filter(lambda cell: cell == value or str(cell) == str(value), input_columns=column)
        if len(dataset) == 0:
            raise DataError(
                f"{key}.filter_value",
                f"no row has {column} equal to it",
                "Check the value, or drop the filter",
                value=value,
            )
    if len(dataset) == 0:
        raise DataError(
            key,
            "the dataset is empty",
            "Give a file with at least one row",
            value=section.data_path or section.dataset_name,
        )
    validation = None
    if section.split_validation_size:
        if isinstance(section.split_validation_size, int) and section.split_validation_size >= len(dataset):
            raise DataError(
                f"{key}.split_validation_size",
                f"the dataset has only {len(dataset)} rows",
                "Set aside fewer rows than it has",
                value=section.split_validation_size,
            )
        parts = dataset.train_test_split(test_size=section.split_validation_size, seed=section.seed)
        dataset, validation = parts["train"], parts["test"]

    def rows(part: Any) -> list[Row]:
        found = zip(part[input_key], part[output_key], *(part[column] for column in columns), strict=True)
        return [
            {
                "problem": str(problem),
                "answer": _text(answer),
                "columns": tuple(zip(columns, map(_text, cells), strict=True)),
            }
            for problem, answer, *cells in found
        ]

    return rows(dataset) * section.repeat, rows(validation) if validation is not None else []


def _text(cell: Any) -> str | None:
    return None if cell is None else str(cell)


def _present(key: str, wanted: Sequence[str], existing: Sequence[str], optional: bool) -> list[str]:
    """Which of the columns that context distillation reads are there; all, unless they are optional."""
    where = "distillation.context_distillation"
    missing = [column for column in wanted if column not in existing]
    if missing and not optional:
        raise DataError(
            where,
            f"{key} has no column {', '.join(map(repr, missing))}, which static_trace.answer_column or "
            f"teacher_prefix_template names; it has {', '.join(existing)}",
            "Name a column that the dataset has, and double braces that are meant literally",
        )
    if missing:
        logger.info(
            f"{key} has no column {', '.join(map(repr, missing))}: {where}.trace_extractor.missing_trace_policy says "
            "what the teacher reads when it validates"
        )
    return [column for column in wanted if column in existing]


def open_dataset(key: str, section: Dataset) -> tuple[Any, Source | None]:
    """The rows of a dataset section, and what is known of it by name. Raises DataError: it cannot be read."""
    import datasets  # here, because it imports pandas and pyarrow: seconds that --check must not pay

    datasets.disable_progress_bars()
    path, source = section.data_path, None
    if path is None:
        name = section.dataset_name
        source = NAMED.get(name or "")
        if source is None and "/" not in (name or ""):
            near = get_close_matches(name or "", [*NAMED, "ResponseDataset"], n=1)
            raise DataError(
                f"{key}.dataset_name",
                "not a dataset known by name, and data_path is not set",
                f"Use {near[0] if near else ', '.join(NAMED)}, or give data_path (jsonl, json, parquet, "
                "a save_to_disk folder, or a Hugging Face id)",
                value=name,
            )
        path = source.path if source else str(name)
    subset = section.subset or (source.subset if source else None)
    split = section.split or (source.split if source else "train")
    file = Path(path).expanduser()
    kinds = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
    try:
        if file.is_file():
            if file.suffix not in kinds:
                raise DataError(
                    f"{key}.data_path",
                    f"unknown file type; known are {', '.join(kinds)}",
                    "Convert it to .jsonl or .parquet",
                    value=path,
                )
            if file.stat().st_size == 0:
                raise DataError(
                    f"{key}.data_path", "the file is empty", "Give a file with at least one row", value=path
                )
            return datasets.load_dataset(kinds[file.suffix], data_files=str(file), split="train"), source
        if (file / "state.json").is_file() or (file / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(file))
            return (loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded), source
        if not file.exists() and (path.startswith((".", "/", "~")) or file.suffix in kinds):
            raise DataError(f"{key}.data_path", "no such file or folder", "Check the path", value=path)
        return datasets.load_dataset(path, subset, split=split), source
    except DataError:
        raise
    except Exception as error:  # datasets raises a dozen kinds, OSError to its own; all mean that it cannot be read
        raise DataError(
            key,
            f"cannot read the dataset ({type(error).__name__}: {reason(error)})",
            "Give a local file, or a dataset that is cached or reachable",
            value=path,
        ) from error


class Renderer:
    """Turns a problem into the tokens the model reads: prompt file, system prompt, chat template.

    Args:
        key: "data.train" or "data.validation", for errors.
        sections: the dataset sections whose prompt files apply.
        tokenizer: the student's.
        chat_template_kwargs: passed to the template (``enable_thinking`` and the like).
        max_tokens: data.max_input_seq_length; longer prompts are masked.
    """

    def __init__(
        self,
        key: str,
        sections: Sequence[Dataset],
        tokenizer: Any,
        chat_template_kwargs: dict[str, Any] | None,
        max_tokens: int,
    ):
        self.key, self.tokenizer, self.max_tokens = key, tokenizer, max_tokens
        self.sections = sections
        self.template_kwargs = chat_template_kwargs or {}
        if not tokenizer.chat_template:
            raise ModelError(
                "policy.tokenizer.chat_template",
                "the tokenizer has no chat template, so a prompt cannot be rendered",
                "Give a template (text or a file) or a tokenizer that has one",
            )

    def __call__(self, indices: Sequence[int], rows: Sequence[Row]) -> list[Prompt]:
        """The prompts of these rows; tokenised together, which is several times as fast as one by one."""
        texts = [
            self.tokenizer.apply_chat_template(
                self._messages(row), tokenize=False, add_generation_prompt=True, **self.template_kwargs
            )
            for row in rows
        ]
        encoded = self.tokenizer(texts, add_special_tokens=False).input_ids
        return [
            Prompt(
                index,
                row["problem"],
                row["answer"],
                text,
                tuple(tokens),
                masked=len(tokens) > self.max_tokens,
                system=self._system(row),
                columns=row.get("columns", ()),
            )
            for index, row, text, tokens in zip(indices, rows, texts, encoded, strict=True)
        ]

    def _messages(self, row: Row) -> list[dict[str, str]]:
        section = self.sections[row.get("section", 0)]
        messages = [{"role": "user", "content": self._user_text(section, row["problem"])}]
        if (system := self._system(row)) is not None:
            messages.insert(0, {"role": "system", "content": system})
        return messages

    def _system(self, row: Row) -> str | None:
        file = self.sections[row.get("section", 0)].system_prompt_file
        return _read(file).strip() if file else None

    def _user_text(self, section: Dataset, problem: str) -> str:
        if not section.prompt_file:
            return problem
        try:
            return _read(section.prompt_file).format(problem)
        except (IndexError, KeyError, ValueError) as error:
            raise RecipeError(
                f"{self.key}.prompt_file",
                f"its text is not a template with one {{}} ({error})",
                "Write {} once where the problem goes and double every other brace, as in \\boxed{{}}",
                value=section.prompt_file,
            ) from error


@lru_cache(maxsize=32)
def _read(path: str) -> str:
    return Path(path).read_text()


class PromptStream:
    """Training prompts, step by step; ``consumed`` is its whole state."""

    def __init__(
        self,
        problems: Problems,
        render: Callable[[Sequence[int], Sequence[Row]], list[Prompt]],
        batch: int,
        *,
        shuffle: bool,
        seed: int,
    ):
        self.problems, self.render, self.batch, self.shuffle, self.seed = (
            problems,
            render,
            batch,
            shuffle,
            seed,
        )
        self.batches_per_epoch = len(problems) // batch
        self.consumed = 0
        self._order: tuple[int, list[int]] = (-1, [])

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return self.consumed // (self.batches_per_epoch * self.batch)

    def next(self) -> list[Prompt]:
        """The next step's prompts."""
        epoch, offset = divmod(self.consumed, self.batches_per_epoch * self.batch)
        if self._order[0] != epoch:
            self._order = (epoch, self._permutation(epoch))
        rows = self._order[1][offset : offset + self.batch]
        self.consumed += self.batch
        return self.render(rows, [self.problems.rows[row] for row in rows])

    def _permutation(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(len(self.problems)))
        generator = torch.Generator().manual_seed(stable_seed("order", self.seed, epoch))
        return torch.randperm(len(self.problems), generator=generator).tolist()

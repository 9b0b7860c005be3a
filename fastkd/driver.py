"""What the driver settles before any worker starts: tokenizers, vocabularies, data, and a writable run folder.

Everything here can fail because of what the user gave, so it all happens before a model is loaded, and the run
folder is made last: a mistake leaves nothing behind.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastkd import metrics, models, optim, prefix_template
from fastkd.batch import Prompt, Rollout
from fastkd.config import Dataset, Recipe
from fastkd.context_distillation import Readings, TeacherPrompts
from fastkd.data import PromptStream, Renderer, load_problems
from fastkd.environment import environment
from fastkd.errors import DataError, RecipeError
from fastkd.files import write_json
from fastkd.log import logger
from fastkd.recipe import LoadedRecipe


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the workers and the loop are built from."""

    recipe: Recipe
    """With paths resolved."""
    tokenizer: Any
    train: PromptStream
    validation: list[Prompt]
    student_vocab: int | None
    """Real rows of the student's LM head when it is padded (``valid_vocab``), else None."""
    teacher_vocab: int | None
    teacher_prompts: TeacherPrompts | None = None
    """What the teacher reads, when it is not what the student reads (context distillation)."""

    def readings(self, rollouts: Sequence[Rollout]) -> Readings:
        """A batch as the student and as the teacher read it."""
        return self.teacher_prompts(rollouts) if self.teacher_prompts else Readings(rollouts, rollouts, {})

    @property
    def last_step(self) -> int:
        """The step after which the run is complete: the step or the epoch limit, whichever comes first."""
        loop = self.recipe.distillation
        return min(loop.max_num_steps, loop.max_num_epochs * self.train.batches_per_epoch)


@dataclass(frozen=True, slots=True)
class Pair:
    """Student and teacher as far as they are settled without weights."""

    recipe: Recipe
    """With paths made absolute."""
    tokenizer: Any
    teacher_tokenizer: Any
    student_vocab: int | None
    """``Inputs.student_vocab``."""
    teacher_vocab: int | None


def settle(loaded: LoadedRecipe) -> Pair:
    """Tokenizers and vocabularies of a recipe, checked against one another, and what else needs no data.

    Raises:
        UserError: one of its kinds, naming the key at fault.
    """
    recipe = locate(loaded)
    metrics.require_sinks(recipe.logger)
    optim.check(recipe.policy)
    policy, teacher = recipe.policy, recipe.teacher
    student_config = models.load_config("policy.model_name", policy.model_name)
    teacher_config = models.load_config("teacher.model_name", teacher.model_name)
    tokenizer = models.load_tokenizer("policy.tokenizer.name", policy.tokenizer.name, policy.tokenizer.chat_template)
    teacher_tokenizer = models.load_tokenizer(
        "teacher.tokenizer.name", teacher.tokenizer.name, teacher.tokenizer.chat_template
    )
    models.check_vocabularies(tokenizer, teacher_tokenizer, policy.tokenizer.name, teacher.tokenizer.name)
    vocab = min(len(tokenizer), student_config.vocab_size, teacher_config.vocab_size)
    if len(tokenizer) > vocab:
        raise RecipeError(
            "policy.model_name",
            f"the tokenizer has {len(tokenizer)} ids, but the smaller of the two LM heads has {vocab} rows",
            "Use models whose vocabulary covers the tokenizer",
            value=policy.model_name,
        )
    k = recipe.distillation.topk_logits_k
    if k > vocab:
        raise RecipeError(
            "distillation.topk_logits_k",
            f"the vocabulary has only {vocab} tokens",
            f"Set it to {vocab} or less",
            value=k,
        )
    return Pair(
        recipe,
        tokenizer,
        teacher_tokenizer,
        models.valid_vocab(tokenizer, student_config),
        models.valid_vocab(tokenizer, teacher_config),
    )


def prepare(loaded: LoadedRecipe) -> Inputs:
    """Check everything that needs a tokenizer or a dataset, and build what the loop reads.

    Raises:
        UserError: one of its kinds, naming the key at fault.
    """
    pair = settle(loaded)
    recipe, tokenizer, policy = pair.recipe, pair.tokenizer, pair.recipe.policy
    train_rows, validation_rows = load_problems(recipe)
    render = Renderer(
        "data.train",
        recipe.data.train,
        tokenizer,
        policy.tokenizer.chat_template_kwargs,
        recipe.data.max_input_seq_length,
    )
    stream = PromptStream(
        train_rows,
        render,
        recipe.distillation.num_prompts_per_step,
        shuffle=recipe.data.shuffle,
        seed=recipe.distillation.seed,
    )
    if render([0], train_rows.rows[:1])[0].tokens == ():
        raise DataError("data.train", "the first problem renders to no tokens", "Check the chat template")
    validation: list[Prompt] = []
    if recipe.validation_enabled:
        render_validation = Renderer(
            "data.validation",
            recipe.data.validation or recipe.data.train,
            tokenizer,
            policy.tokenizer.chat_template_kwargs,
            recipe.data.max_input_seq_length,
        )
        validation = render_validation(range(len(validation_rows)), validation_rows.rows)
    return Inputs(
        recipe,
        tokenizer,
        stream,
        validation,
        pair.student_vocab,
        pair.teacher_vocab,
        _teacher_prompts(recipe, pair.teacher_tokenizer),
    )


def _teacher_prompts(recipe: Recipe, tokenizer: Any) -> TeacherPrompts | None:
    context, teacher = recipe.distillation.context_distillation, recipe.teacher
    if not context.enabled:
        return None
    return TeacherPrompts(context, tokenizer, teacher.tokenizer.chat_template_kwargs, teacher.max_total_sequence_length)


def locate(loaded: LoadedRecipe) -> Recipe:
    """The recipe with model, data and prompt paths made absolute where they exist on disk, and the teacher's template
    as text."""
    find = loaded.locate

    def dataset(one: Dataset) -> Dataset:
        files = {name: getattr(one, name) for name in ("data_path", "prompt_file", "system_prompt_file")}
        return one.model_copy(update={name: find(file) for name, file in files.items() if file is not None})

    def model(one: Any) -> Any:
        template = one.tokenizer.chat_template
        tokenizer = one.tokenizer.model_copy(
            update={
                "name": find(one.tokenizer.name),
                # A template has braces; anything else is the name of a file that holds one.
                "chat_template": find(template) if template and "{" not in template else template,
            }
        )
        update = {"model_name": find(one.model_name), "tokenizer": tokenizer}
        if getattr(one, "quant_calib_data", None):
            update["quant_calib_data"] = find(one.quant_calib_data)
        return one.model_copy(update=update)

    recipe = loaded.recipe
    data = recipe.data.model_copy(
        update={
            "train": [dataset(one) for one in recipe.data.train],
            "validation": [dataset(one) for one in recipe.data.validation],
        }
    )
    context = recipe.distillation.context_distillation
    if context.enabled:
        template = prefix_template.read(context.teacher_prefix_template, find)
        context = context.model_copy(update={"teacher_prefix_template": template})
    distillation = recipe.distillation.model_copy(update={"context_distillation": context})
    return recipe.model_copy(
        update={
            "distillation": distillation,
            "policy": model(recipe.policy),
            "teacher": model(recipe.teacher),
            "data": data,
        }
    )


class RunFolder:
    """The folder of one run; holding it locks other runs out.

    Raises:
        RecipeError: it cannot be written, or another process is running in it.
    """

    def __init__(self, recipe: Recipe):
        self.path = Path(recipe.logger.log_dir)
        for key, folder in (
            ("logger.log_dir", self.path),
            ("checkpointing.checkpoint_dir", Path(recipe.checkpointing.checkpoint_dir)),
        ):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                probe = folder / ".writable"
                probe.touch()
                probe.unlink()
            except OSError as error:
                raise RecipeError(
                    key,
                    f"the folder cannot be written ({error.strerror})",
                    f"Give a folder that can: {key}=PATH",
                    value=str(folder),
                ) from error
        self._lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecipeError(
                "logger.log_dir",
                "another run is writing there",
                "Wait for it, or give another folder",
                value=str(self.path),
            ) from None

    @property
    def metrics(self) -> Path:
        """metrics.jsonl."""
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        """summary.json."""
        return self.path / "summary.json"

    def record(self, loaded: LoadedRecipe) -> None:
        """Save the resolved recipe and the environment with the run; say what changed since an earlier start."""
        saved = self.path / "recipe.json"
        if saved.exists():
            changes = _differences(json.loads(saved.read_text()), json.loads(json.dumps(loaded.resolved)))
            for name, (old, new) in changes.items():
                logger.info(f"changed since this run began: {name} {old!r} -> {new!r}")
        write_json(saved, loaded.resolved)
        loaded.dump(self.path / "recipe.yaml")
        write_json(self.path / "environment.json", environment())

    def completed_steps(self) -> int:
        """Steps of the run that the summary says is complete; 0 without one."""
        return json.loads(self.summary.read_text())["steps"] if self.summary.exists() else 0

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json."""
        write_json(self.summary, summary)

    def replace(self, name: str, write: Callable[[Path], None]) -> None:
        """Write a folder under a temporary name, then put it in the place of the old one."""
        final, temporary = self.path / name, self.path / f".{name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        write(temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)

    def close(self) -> None:
        """Let other runs in."""
        self._lock.close()


def _differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        found = {}
        for name in old.keys() | new.keys():
            found |= _differences(old.get(name), new.get(name), f"{prefix}.{name}" if prefix else name)
        return dict(sorted(found.items()))
    return {} if old == new else {prefix: (old, new)}

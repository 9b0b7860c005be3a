"""Rules about the two models, from their files: weights, templates, K ≤ vocabulary, sharding, equal vocabularies."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path

from fastkd.checks.finding import Finding, models_of
from fastkd.config import Teacher
from fastkd.errors import RecipeError
from fastkd.model_files import ModelFiles, find_folder, read_model
from fastkd.recipe import LoadedRecipe


def model_facts(loaded: LoadedRecipe) -> Iterator[Finding]:
    found: dict[str, ModelFiles] = {}
    for name, model in models_of(loaded.recipe):
        try:
            files = read_model(f"{name}.model_name", loaded.locate(model.model_name))
            tokenizer = model.tokenizer.name
            if tokenizer != model.model_name:
                read_model(f"{name}.tokenizer.name", loaded.locate(tokenizer), needs="tokenizer")
        except RecipeError as error:
            yield error
            continue
        if files is None:
            yield from _perhaps_a_path(f"{name}.model_name", model.model_name, loaded.folders)
        else:
            found[name] = files
            yield from _weights(name, model, files)
            yield from _fits(name, model, files)
        yield from _template(loaded, name, model)
    yield from _enough_to_keep(loaded, found)
    if len(found) == 2:
        yield from _same_vocabulary(loaded, found["policy"], found["teacher"])


def _weights(name: str, model: Teacher, files: ModelFiles) -> Iterator[Finding]:
    key = f"{name}.model_name"
    if missing := files.missing_weights():
        shown = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
        rule = f"{len(missing)} of its files are not there: {shown}"
        yield RecipeError(key, rule, "Download it again", value=model.model_name)
    elif not files.has_weights():
        yield f"{key}={model.model_name!r} holds no weights (*.safetensors): it can be checked, not run."


def _template(loaded: LoadedRecipe, name: str, model: Teacher) -> Iterator[RecipeError]:
    """The template is text with braces, a file, or the tokenizer's own."""
    key, template = f"{name}.tokenizer.chat_template", model.tokenizer.chat_template
    if template is not None:
        if "{" not in template and not Path(loaded.locate(template)).is_file():
            yield RecipeError(key, "no such file, and no template either", "Give the file's path", value=template)
        return
    folder = find_folder(loaded.locate(model.tokenizer.name))
    settings = folder / "tokenizer_config.json" if folder else None
    if folder is None or settings is None or not settings.is_file() or any(folder.glob("chat_template*")):
        return
    try:
        has_one = bool(json.loads(settings.read_text(encoding="utf-8")).get("chat_template"))
    except (ValueError, AttributeError, OSError):
        return
    if not has_one:
        rule = f"the tokenizer {model.tokenizer.name} has no chat template, so prompts cannot be rendered"
        yield RecipeError(key, rule, f"Give a file that holds one, or another {name}.tokenizer.name", value=None)


def _perhaps_a_path(key: str, name: str, folders: tuple[Path, ...]) -> Iterator[str]:
    """A misspelt folder looks like a Hugging Face id; say so before the download fails."""
    for folder in (Path.cwd(), *folders):
        beside = (folder / name).parent
        if "/" in name and beside.is_dir():
            names = [one.name for one in beside.iterdir() if one.is_dir()]
            if close := difflib.get_close_matches(Path(name).name, names, n=1):
                yield f"{key}={name!r} is not a folder and is taken for a Hugging Face id. Meant {beside / close[0]}?"
                return


def _enough_to_keep(loaded: LoadedRecipe, found: dict[str, ModelFiles]) -> Iterator[RecipeError]:
    """K ≤ V, where V counts what the tokenizer names: padding rows of the head are no tokens."""
    sizes = {}
    for name, model in models_of(loaded.recipe):
        if files := found.get(name):
            tokens = files.tokens_of(loaded.locate(model.tokenizer.name))
            known = [size for size in (files.vocab_size, len(tokens) if tokens else None) if size]
            if known:
                sizes[name] = min(known)
    k = loaded.recipe.distillation.topk_logits_k
    if sizes and k > min(sizes.values()):
        name = min(sizes, key=lambda one: sizes[one])
        yield RecipeError(
            "distillation.topk_logits_k",
            f"K cannot exceed the vocabulary of {name}.model_name, {sizes[name]} tokens",
            f"Write distillation.topk_logits_k={sizes[name]} or less",
            value=k,
        )


def _fits(name: str, model: Teacher, files: ModelFiles) -> Iterator[Finding]:
    tensor = model.dtensor_cfg.tensor_parallel_size
    key = f"{name}.dtensor_cfg.tensor_parallel_size"
    if files.heads and files.heads % tensor:
        yield RecipeError(
            key, f"must divide the model's {files.heads} attention heads", "Choose a divisor", value=tensor
        )
    elif files.inner and files.inner % tensor:
        rule = f"must divide the model's intermediate size {files.inner}"
        yield RecipeError(key, rule, "Choose a divisor", value=tensor)
    elif files.vocab_size and (tensor - 1) * -(-files.vocab_size // tensor) >= files.vocab_size:
        rule = f"leaves ranks without any of the model's {files.vocab_size} vocabulary rows"
        yield RecipeError(key, rule, "Choose a smaller one", value=tensor)
    elif files.kv_heads and files.kv_heads % tensor and tensor % files.kv_heads:
        rule = f"must divide the model's {files.kv_heads} key-value heads, or be a multiple of them"
        yield RecipeError(key, rule, "Choose a divisor or a multiple", value=tensor)
    experts, ep = files.experts, model.dtensor_cfg.expert_parallel_size
    if ep > 1 and experts is not None and (not experts or experts % ep):
        rule = f"must divide the model's {experts} experts" if experts else "the model has no experts"
        remedy = "Choose a divisor" if experts else "Use 1"
        yield RecipeError(f"{name}.dtensor_cfg.expert_parallel_size", rule, remedy, value=ep)
    if files.max_positions and files.max_positions < model.max_total_sequence_length:
        yield (
            f"{name}.max_total_sequence_length={model.max_total_sequence_length} is longer than the "
            f"{files.max_positions} positions the model was made for."
        )


def _same_vocabulary(loaded: LoadedRecipe, student: ModelFiles, teacher: ModelFiles) -> Iterator[Finding]:
    """Ids must mean the same token on both sides; unused padding rows at the end of one embedding may
    differ."""
    mine = student.tokens_of(loaded.locate(loaded.recipe.policy.tokenizer.name))
    theirs = teacher.tokens_of(loaded.locate(loaded.recipe.teacher.tokenizer.name))
    if mine is None or theirs is None:
        if student.vocab_size != teacher.vocab_size:
            yield (
                f"Vocabulary sizes differ (student {student.vocab_size}, teacher {teacher.vocab_size}); the tokenizers "
                "are compared when the run starts."
            )
        return
    if mine == theirs:
        return
    different = sorted(one for one in mine.keys() | theirs.keys() if mine.get(one) != theirs.get(one))
    first = different[0]
    yield RecipeError(
        "teacher.model_name",
        f"its vocabulary is not the student's: {len(different)} ids differ, first {first}, which is "
        f"{theirs.get(first)!r} for the teacher and {mine.get(first)!r} for the student",
        "Teacher and student must share a tokenizer: choose models of one family",
        value=loaded.recipe.teacher.model_name,
    )

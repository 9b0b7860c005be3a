"""The text that a quantised student's activations are calibrated on.

By default the student's own: full-precision responses to the first training prompts of an on-policy run, the first
samples of a blend otherwise. It is what the quantised student will read, so no range is wasted on anything else. The
recipe may name a data set instead (``policy.quant_calib_data``), as ModelOpt's scripts do with news articles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from fastkd.batch import Prompt, Rollout
from fastkd.config import Dataset, Recipe
from fastkd.data import open_dataset
from fastkd.driver import Inputs
from fastkd.errors import DataError

KEY = "policy.quant_calib_data"
COLUMNS = ("text", "article", "content", "problem", "prompt", "input", "question", "messages")
"""Where texts are looked for, in this order."""
NAMED = {"cnn_dailymail": ("abisee/cnn_dailymail", "3.0.0")}
"""Data sets that ModelOpt's scripts know by another name: path and subset."""


def sequences(inputs: Inputs, sample: Callable[[Sequence[Prompt]], list[Rollout]]) -> list[Rollout]:
    """What to calibrate on, as the recipe says; every token of a sequence is read.

    Args:
        inputs: of the run. Its training data are not used up.
        sample: the student's responses to prompts.

    Raises:
        DataError: ``quant_calib_data`` cannot be read, or holds no text.
    """
    policy = inputs.recipe.policy
    limit = min(policy.quant_sequence_length, policy.max_total_sequence_length)
    found = _texts(inputs.recipe, inputs.tokenizer, limit) if policy.quant_calib_data else _own(inputs, sample)
    cut = (_cut(rollout, limit) for rollout in found)
    kept = [rollout for rollout in cut if rollout.response]
    if not kept:
        rule = "calibration has no sequence of two tokens and more"
        raise DataError(KEY, rule, "Name a file with text", value=policy.quant_calib_data)
    return kept


def _own(inputs: Inputs, sample: Callable[[Sequence[Prompt]], list[Rollout]]) -> list[Rollout]:
    stream: Any = inputs.train  # of prompts, or of the samples of a blend
    wanted = inputs.recipe.policy.quant_calib_size
    wanted = min(wanted, stream.batch * getattr(stream, "batches_per_epoch", wanted))
    before, found = stream.consumed, []
    while len(found) < wanted:
        found += stream.next()
    stream.consumed = before
    found = found[:wanted]
    return sample(found) if isinstance(found[0], Prompt) else found


def _texts(recipe: Recipe, tokenizer: Any, limit: int) -> list[Rollout]:
    policy = recipe.policy
    name = str(policy.quant_calib_data)
    path, subset = NAMED.get(name, (name, None))
    rows, _ = open_dataset(KEY, Dataset(data_path=path, subset=subset))
    column = next((one for one in COLUMNS if one in rows.column_names), None)
    if column is None:
        rule = f"has no column of text ({', '.join(COLUMNS)}); it has {', '.join(rows.column_names)}"
        raise DataError(KEY, rule, "Rename the column that holds it", value=name)
    cells = rows.select(range(min(policy.quant_calib_size, len(rows))))[column]
    texts = [str(cell) for cell in cells]
    if column == "messages":
        kwargs = policy.tokenizer.chat_template_kwargs or {}
        texts = [tokenizer.apply_chat_template(cell, tokenize=False, **kwargs) for cell in cells]
    encoded = tokenizer(texts, truncation=True, max_length=limit).input_ids if texts else []
    return [
        Rollout(Prompt(index, "", None, "", tuple(ids[:1])), 0, tuple(ids[1:]), True, 0)
        for index, ids in enumerate(encoded)
    ]


def _cut(rollout: Rollout, limit: int) -> Rollout:
    """Its first ``limit`` tokens."""
    prompt = rollout.prompt.tokens[: limit - 1]
    return replace(
        rollout,
        prompt=replace(rollout.prompt, tokens=prompt),
        response=rollout.response[: limit - len(prompt)],
    )

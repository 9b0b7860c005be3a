"""What a rehearsal reads in place of a recipe's own files: random models, a tokenizer that fits them, and problems.

The tokenizer is byte-level BPE learnt from the very texts that will be rendered (the recipe's prompt files and
templates among them), so that prompts are short; ids that no text needs fill it up. The models are drawn from a
generator and stored in bfloat16 as published ones are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Tokenizer

from fastkd.config import Dataset
from fastkd.config.sources import NAMED
from fastkd.errors import ModelError, UserError, reason

_LEARNT = 640
"""Tokens learnt from texts, at most; the 256 bytes among them."""
_PAD, _START, _END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


# --- problems ---------------------------------------------------------------------------------------------------------


def columns_of(dataset: Dataset) -> tuple[str, str]:
    """Columns of problem and answer, those of a dataset known by name included."""
    source = NAMED.get(dataset.dataset_name or "")
    return (
        dataset.input_key or (source.input_key if source else "input"),
        dataset.output_key or (source.output_key if source else "output"),
    )


def rows(dataset: Dataset, read_by_teacher: Sequence[str], count: int) -> Iterator[dict[str, Any]]:
    """Sums to solve, in the columns that the recipe names.

    Args:
        dataset: names the columns of problem, answer and filter.
        read_by_teacher: further columns; they hold a worked solution.
        count: rows that the filter keeps; it meets as many others again as a quarter of them.
    """
    problem, answer = columns_of(dataset)
    others = count // 4 if dataset.filter_column and dataset.filter_value is not None else 0
    for number in range(count + others):
        a, b = 10 + number % 83, 10 + number * 7 % 89
        solution = f"She has {a} pens and gets {b} more: {a} + {b} = {a + b}. The answer is \\boxed{{{a + b}}}."
        row: dict[str, Any] = dict.fromkeys(read_by_teacher, solution)
        if dataset.filter_column:
            row[dataset.filter_column] = dataset.filter_value if number >= others else _another(dataset.filter_value)
        row[problem] = f"Problem {number}: Eva has {a} pens and gets {b} more. How many pens does she have now?"
        row.setdefault(answer, str(a + b))
        yield row


def _another(value: Any) -> Any:
    """A value of the same type: a column of a dataset has one."""
    return not value if isinstance(value, bool) else value + "?" if isinstance(value, str) else value + 1


def write_rows(path: Path, found: Iterator[dict[str, Any]]) -> list[str]:
    """A JSONL file; returns the texts in it."""
    made = list(found)
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return [value for row in made for value in row.values() if isinstance(value, str)]


# --- tokenizer and models ---------------------------------------------------------------------------------------------


def tokenizer(texts: Sequence[str], tokens: int) -> Any:
    """A tokenizer of exactly ``tokens`` ids that spells any text and spells these ones short."""
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    # Of Qwen's own form: for its models AutoTokenizer may rebuild Qwen's pre-tokenizer instead of reading ours.
    learner = Qwen2Tokenizer().backend_tokenizer
    trainer = BpeTrainer(
        vocab_size=min(_LEARNT, tokens),
        special_tokens=[_PAD, _START, _END],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator([*texts, "system\n", "user\n", "assistant\n"], trainer)
    learnt = json.loads(learner.to_str())["model"]
    vocab = dict(learnt["vocab"])
    vocab |= {f"<spare_{number}>": number for number in range(len(vocab), tokens)}
    merges: Any = [tuple(pair) for pair in learnt["merges"]]
    made = Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        pad_token=_PAD,
        eos_token=_END,
        additional_special_tokens=[_START],
        model_max_length=1 << 20,
    )
    made.chat_template = _CHAT_TEMPLATE
    if len(made) != tokens:
        raise UserError("--rehearse", f"the tokenizer has {len(made)} ids where {tokens} were wanted", "Report this")
    return made


def write_model(folder: Path, key: str, config: dict[str, Any], tokens: Any, seed: int) -> None:
    """A folder with random weights and the tokenizer.

    Args:
        key: the recipe key whose model it stands for, for errors.
        config: config.json without the tokenizer's ids.
        tokens: the tokenizer.

    Raises:
        ModelError: transformers cannot build such a model.
    """
    ids = {"eos_token_id": tokens.eos_token_id, "pad_token_id": tokens.pad_token_id, "bos_token_id": None}
    fields = {name: value for name, value in config.items() if name != "model_type"}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(config["model_type"], **fields, **ids), dtype=torch.bfloat16
            )
    except Exception as error:  # ValueError, KeyError, TypeError, …: all mean an unusable configuration
        rule = f"a tiny model of its kind cannot be built ({reason(error)})"
        remedy = "Rehearse with a decoder of the Llama kind: Qwen, Llama, OLMo, Mistral"
        raise ModelError(key, rule, remedy, value=config["model_type"]) from error
    transformers.utils.logging.disable_progress_bar()
    made.save_pretrained(folder)
    tokens.save_pretrained(folder)

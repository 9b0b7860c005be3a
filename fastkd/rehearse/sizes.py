"""The arithmetic of a rehearsal: sizes that are as small as can be and divide as the recipe's own do.

Whether a run fails for its topology depends on remainders, not on sizes. So these are kept: attention heads and
key/value heads; the remainder of the MLP's width and of the vocabulary by the tensor-parallel degrees; which embedding
is tied and which head is padded; optimizer steps per step, rollouts per data-parallel rank where they are few; which
sequence limit is the longer one. Only layers, head size, vocabulary rows, lengths and prompts shrink.

Letters: D hidden, d head size, F MLP width, V vocabulary, T tokens that the tokenizer names, K logits kept per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fastkd.config import Recipe
from fastkd.plan.shapes import Shape

LAYERS = 2
RESPONSE = 24
"""Tokens of a response."""
_HEAD_SIZE = {False: 8, True: 32}
"""By whether vLLM runs it: its attention on CPUs knows no smaller one."""
_LEAST_TOKENS, _MOST_ROWS = 768, 16384
_ROWS_PER_RANK = 2
_UPDATES = 2


def above(number: float, step: int) -> int:
    """The smallest multiple of ``step`` that is at least ``number``."""
    return step * math.ceil(number / step)


def small_config(config: dict[str, Any], shape: Shape, vocab: int, degrees: list[int], *, vllm: bool) -> dict[str, Any]:
    """config.json of the tiny model that splits as a model of this shape does.

    Args:
        config: of the model, without its sizes where only those are known.
        shape: its sizes.
        vocab: V of the tiny one.
        degrees: tensor-parallel degrees that it must be split by.
        vllm: whether an engine of vLLM runs it.
    """
    head = min(_HEAD_SIZE[vllm], shape.head_dim)
    by = math.lcm(*degrees)
    scale = head / shape.head_dim
    # A multiple of 16, for NVFP4's blocks; D = heads · d stays so where it is so, which some families take for granted.
    hidden = shape.heads * head if shape.hidden == shape.heads * shape.head_dim else above(shape.hidden * scale, 16)
    found = {
        name: value
        for name, value in config.items()
        if name not in ("architectures", "auto_map", "quantization_config", "text_config", "transformers_version")
        and not name.endswith(("_token_id", "dtype", "_name_or_path"))
    }
    found |= {
        "model_type": shape.model_type,
        "hidden_size": hidden,
        "intermediate_size": by * max(1, round(shape.inner * scale / by)) + shape.inner % by,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": head,
        "vocab_size": vocab,
        "tie_word_embeddings": shape.tied,
        "initializer_range": 0.1,  # 0.02 is for models that are far wider
    }
    if shape.bias:
        found["attention_bias"] = True
    if kinds := config.get("layer_types"):
        # A block of every kind: sliding and full attention.
        chosen = list(dict.fromkeys(kinds))
        found["layer_types"] = chosen = (chosen * LAYERS)[: max(LAYERS, len(chosen))]
        found["num_hidden_layers"] = len(chosen)
    return found


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """How many ids there are."""

    tokens: int
    """T."""
    student: int
    """V of its head."""
    teacher: int
    k: int


def small_vocabulary(recipe: Recipe, student: int, teacher: int, padding: int) -> Vocabulary:
    """T, both V and K, small.

    K is the recipe's, and a tensor-parallel rank holds more than K rows if that leaves V small; else K shrinks.

    Args:
        recipe: K and the degrees.
        student: V.
        teacher: V.
        padding: rows of the smaller head that are no tokens.
    """
    degrees = (
        recipe.policy.dtensor_cfg.tensor_parallel_size,
        recipe.teacher.dtensor_cfg.tensor_parallel_size,
        recipe.policy.generation.vllm_cfg.tensor_parallel_size,
    )
    most, by, least = max(degrees), math.lcm(*degrees), min(student, teacher)
    k = min(recipe.distillation.topk_logits_k, int(_MOST_ROWS / 1.125 / most))
    rows = above(max(1.125 * k * most, _LEAST_TOKENS), by) + least % by
    if least <= rows:  # it is small already
        return Vocabulary(least - padding, student, teacher, min(k, least - padding))
    padding = min(padding, rows // most // 4)
    differ = min(abs(student - teacher), 16 * by)
    return Vocabulary(
        rows - padding, rows + differ * (student > teacher), rows + differ * (teacher > student), min(k, rows - padding)
    )


@dataclass(frozen=True, slots=True)
class Batch:
    """The batch arithmetic of a step."""

    prompts: int
    generations: int
    per_update: int
    """``policy.train_global_batch_size``."""
    validated_at_once: int
    """``distillation.val_batch_size``."""


def engines(recipe: Recipe) -> int:
    """Generation engines."""
    generation = recipe.policy.generation
    wide = generation.vllm_cfg.devices if generation.backend == "vllm" else 1
    return max(1, recipe.role_sizes.generation // wide)


def data_parallel(recipe: Recipe) -> int:
    """Data-parallel ranks of the student."""
    sharding = recipe.policy.dtensor_cfg
    return max(1, recipe.role_sizes.training // (sharding.tensor_parallel_size * sharding.context_parallel_size))


def small_batch(recipe: Recipe) -> Batch:
    """As few prompts as keep every engine and every data-parallel rank at work, and the optimizer steps of a step."""
    loop, policy, ranks = recipe.distillation, recipe.policy, data_parallel(recipe)
    given = policy.train_global_batch_size
    updates = min(max(1, loop.batch_size // given), _UPDATES)
    generations = min(loop.num_generations_per_prompt, 2)
    most = max(1, given // ranks)
    for each in range(min(_ROWS_PER_RANK, most), most + 1):
        prompts, rest = divmod(updates * ranks * each, generations)
        if rest == 0 and prompts >= min(engines(recipe), loop.num_prompts_per_step):
            break
    else:
        prompts, each = updates * ranks * most, most  # what every rank has at the most, one answer of each prompt
        generations = 1
    at_once = loop.val_batch_size
    if at_once % ranks == 0:
        at_once = min(at_once, above(max(engines(recipe), ranks), ranks))
    return Batch(prompts, generations, ranks * each, min(at_once, max(engines(recipe), ranks, 1) * 2))


@dataclass(frozen=True, slots=True)
class Lengths:
    """Limits in tokens."""

    prompt: int
    """``data.max_input_seq_length``."""
    response: int
    """``policy.generation.max_new_tokens``."""
    student: int
    """``policy.max_total_sequence_length``."""
    teacher: int
    """``teacher.max_total_sequence_length``."""


def small_lengths(recipe: Recipe, prompt: int, prefix: int) -> Lengths:
    """Limits that hold what a rehearsal reads, and are to one another as the recipe's are.

    Args:
        prompt: tokens of the longest prompt.
        prefix: of what the teacher reads before the longest response.
    """
    policy, its = recipe.policy, recipe.teacher.max_total_sequence_length
    own = policy.max_total_sequence_length
    room = above(prompt, 8)
    student, teacher = room + RESPONSE, above(prefix, 8) + RESPONSE
    if its == own:
        student = teacher = max(student, teacher)
    else:
        teacher = max(teacher, above(student * its / own, 8))
    asked = policy.generation.max_new_tokens
    return Lengths(room, student if asked >= own else RESPONSE, student, teacher)

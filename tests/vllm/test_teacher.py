"""The teacher on vLLM gives the rows that fastkd's own gives."""

from __future__ import annotations

import pytest
import torch

from fastkd.batch import Prompt, Rollout
from fastkd.errors import UserError
from fastkd.kernels import topk_kl
from fastkd.recipe import recipe_from

K = 16


@pytest.fixture(scope="module")
def build(build_folder):
    def make(temperature: float = 1.0, k: int = K, **distillation):
        tree = {
            "distillation": {"topk_logits_k": k, **distillation},
            "loss_fn": {"temperature": temperature},
            "policy": {
                "model_name": str(build_folder("qwen3")),
                "precision": "float32",
                "max_total_sequence_length": 128,
            },
            "teacher": {"model_name": str(build_folder("llama"))},
            "data": {"train": {"data_path": "unused.jsonl"}},
        }
        return recipe_from(tree).recipe

    return make


@pytest.fixture(scope="module")
def rollouts(tokenizer):
    """One of a single token, one as long as the model takes, and one without a response."""
    torch.manual_seed(0)

    def one(index: int, prompt: int, response: int) -> Rollout:
        ids = torch.randint(len(tokenizer), (prompt + response,)).tolist()
        return Rollout(Prompt(index, "", None, "", tuple(ids[:prompt])), 0, tuple(ids[prompt:]), True, 0)

    return [one(0, 5, 9), one(1, 8, 1), one(2, 3, 0), one(3, 100, 28), one(4, 1, 20)]


@pytest.mark.parametrize(("temperature", "k"), [(1.0, K), (1.7, K), (1.0, 416)], ids=["plain", "tempered", "whole"])
def test_rows_are_those_of_our_own_teacher(temperature, k, build, engines, rollouts, tokenizer):
    from fastkd.teacher import Teacher
    from fastkd.vllm_teacher import VllmTeacher

    recipe, vocab = build(temperature, k), len(tokenizer)
    engines.close()
    theirs = VllmTeacher(recipe, vocab)
    try:
        scored = theirs.score(rollouts)
        assert theirs.score(rollouts[:1])[0].logits.shape == (9, k)
    finally:
        theirs.close()
    expected = Teacher(recipe, torch.device("cpu"), vocab).score(rollouts)
    assert [one is None for one in scored] == [False, False, True, False, False]
    torch.manual_seed(1)
    for found, ours in zip(scored, expected, strict=True):
        if found is None:
            continue
        assert torch.equal(found.indices, ours.indices)
        gaps = found.logits - ours.logits
        torch.testing.assert_close(gaps, gaps[:, :1].expand_as(gaps), atol=2e-5, rtol=0)  # a constant of the row
        torch.testing.assert_close(found.logsumexp - found.tail_logsumexp, ours.logsumexp - ours.tail_logsumexp)
        # What it is for: the same divergence of a student.
        hidden, head = torch.randn(len(ours.indices), 8), torch.randn(vocab, 8)
        for kl in ("forward", "reverse"):
            losses = [topk_kl(hidden, head, rows, kl=kl, temperature=temperature).loss for rows in (found, ours)]
            torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)


def test_a_tail_below_rounding_is_not_taken_for_less():
    from fastkd.vllm_teacher import SMALLEST_TAIL, rows_of

    logits = torch.tensor([[40.0, 1.0, 0.0, -1.0], [1.0, 1.0, 1.0, 1.0]])
    rows = rows_of(torch.tensor([[3, 1], [0, 2]], dtype=torch.int32), logits.log_softmax(1)[:, :2])
    assert rows.indices.tolist() == [[1, 3], [0, 2]]
    torch.testing.assert_close(rows.tail_logsumexp.exp(), torch.tensor([SMALLEST_TAIL, 0.5]))
    torch.testing.assert_close(rows.logits[0].diff(), torch.tensor([39.0]))


def test_a_teacher_that_learns_with_the_student_is_refused(build):
    from fastkd.vllm_teacher import VllmTeacher

    recipe = build(context_distillation={"enabled": True, "frozen_teacher_source": "live"})
    with pytest.raises(UserError, match="keeps its weights"):
        VllmTeacher(recipe, None)

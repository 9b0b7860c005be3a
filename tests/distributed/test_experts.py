"""Mixtures of experts: experts spread over ranks equal one process, and sizes that do not fit are refused.

One launch per number of ranks runs every case (expert_worker.py): importing takes longer than the cases.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from fastkd import expert_parallel
from fastkd.errors import UserError

WORKER = Path(__file__).with_name("expert_worker.py")


@pytest.mark.parametrize("ranks", [2, 4])
def test_experts_on_ranks_equal_one_process(ranks, tmp_path, launch):
    from expert_worker import build

    for seed, name in enumerate(("student", "teacher")):
        model = build(seed=seed)
        model.config._experts_implementation = "eager"
        model.save_pretrained(tmp_path / name)
    launch(WORKER, ranks, tmp_path)


def config(**changes):
    settings = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, hidden_size=32)
    return transformers.Qwen3MoeConfig(**settings | changes)


@pytest.mark.parametrize(
    ("size", "ranks", "legal"), [(3, 6, "1, 2"), (8, 4, "1, 2, 4"), (16, 16, "1, 2, 4, 8"), (0, 8, "1, 2, 4, 8")]
)
def test_a_size_that_does_not_divide(size, ranks, legal):
    with pytest.raises(UserError) as raised:
        expert_parallel.check(config(), ranks, size, "policy.dtensor_cfg.expert_parallel_size")
    text = str(raised.value)
    assert text.startswith(f"policy.dtensor_cfg.expert_parallel_size={size}")
    assert "8 experts" in text and f"{ranks} ranks" in text and f"Use one of {legal}, or" in text


@pytest.mark.parametrize(("size", "ranks"), [(1, 3), (2, 6), (8, 16)])
def test_sizes_that_divide(size, ranks):
    expert_parallel.check(config(), ranks, size, "key")


def test_a_model_without_experts():
    expert_parallel.check(transformers.Qwen3Config(), 8, 1, "key")
    with pytest.raises(UserError, match=r"key=2: the model has no experts.*Use 1"):
        expert_parallel.check(transformers.Qwen3Config(), 8, 2, "key")

"""Sharding: one optimizer step under every mesh equals one process, and wrong degrees are refused.

One launch per number of ranks runs every case (parallel_worker.py): importing takes longer than the cases.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastkd import grad_norm, parallel, tensor_plan
from fastkd.batch import Prompt, Rollout, pack
from fastkd.errors import ModelError, UserError

WORKER = Path(__file__).with_name("parallel_worker.py")


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_a_step_equals_one_process(ranks, tmp_path, launch):
    launch(WORKER, ranks, tmp_path / "rendezvous")


# ---------------------------------------------------------------- wrong degrees


def sizes(heads=8, kv_heads=2, inner=64, vocab=101):
    from transformers import Qwen3Config

    return Qwen3Config(
        num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=inner, vocab_size=vocab,
        hidden_size=32, head_dim=8, num_hidden_layers=1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("degree", "changes", "legal"),
    [
        (3, {}, "1, 2, 4, 8"),
        (16, {}, "1, 2, 4, 8"),
        (0, {}, "1, 2, 4, 8"),
        (8, {"inner": 36}, "1, 2, 4"),
        (4, {"heads": 12, "kv_heads": 6, "inner": 48}, "1, 2, 3, 6, 12"),
        (4, {"vocab": 9}, "1, 2"),  # 3 rows each: nothing is left for the last of 4
    ],
)
def test_a_degree_that_does_not_divide_the_model(degree, changes, legal):
    with pytest.raises(UserError) as raised:
        tensor_plan.check_tensor_parallel(sizes(**changes), degree, "policy.dtensor_cfg.tensor_parallel_size")
    text = str(raised.value)
    assert text.startswith(f"policy.dtensor_cfg.tensor_parallel_size={degree}")
    assert text.endswith(f"Use one of {legal}.")
    assert str(changes.get("inner", 64)) in text and f"{changes.get('heads', 8)} attention heads" in text


@pytest.mark.parametrize("degree", [1, 2, 4, 8])
def test_degrees_that_divide_it(degree):
    tensor_plan.check_tensor_parallel(sizes(), degree, "key")


@pytest.mark.parametrize(
    ("tp", "cp", "dp", "key", "words"),
    [
        (3, 1, None, "tensor_parallel_size=3", ("8 ranks", "1, 2, 4, 8", "multiple of 3")),
        (16, 1, None, "tensor_parallel_size=16", ("8 ranks", "1, 2, 4, 8")),
        (0, 1, None, "tensor_parallel_size=0", ("8 ranks", "1, 2, 4, 8")),
        (2, 1, 2, "data_parallel_size=2", ("is 4, but there are 8 ranks", "Use 4")),
        (2, 3, None, "context_parallel_size=3", ("the 4 ranks that 8 leave", "1, 2, 4", "multiple of 6")),
        (1, 0, None, "context_parallel_size=0", ("1, 2, 4, 8",)),
        (2, 2, 1, "data_parallel_size=1", ("is 4, but there are 8 ranks", "Use 2")),
    ],
)
def test_a_degree_that_does_not_divide_the_ranks(tp, cp, dp, key, words, monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 8)
    with pytest.raises(UserError) as raised:
        parallel.build_mesh(tp, cp, dp, "cpu", key="teacher.dtensor_cfg")
    assert str(raised.value).startswith(f"teacher.dtensor_cfg.{key}")
    assert all(word in str(raised.value) for word in words)


# ---------------------------------------------------------------- plans


def test_an_unknown_plan_string_is_named(tiny_qwen3):
    model = tiny_qwen3()
    model.config.base_model_tp_plan = {"layers.*.self_attn.q_proj": "colwise", "layers.*.mlp.up_proj": "diagonal"}
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj.*'diagonal'.*colwise"):
        tensor_plan.plan_strings(model)


def test_a_model_without_a_plan(tiny_qwen3):
    model = tiny_qwen3()
    model.config.base_model_tp_plan = None
    with pytest.raises(ModelError, match="no tensor-parallel plan for Qwen3ForCausalLM"):
        tensor_plan.plan_strings(model)


def test_a_layer_that_the_plan_leaves_out(tiny_qwen3):
    model = tiny_qwen3()
    model.config.base_model_tp_plan = {"layers.*.self_attn.q_proj": "colwise"}
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.k_proj.*leaves this layer out"):
        tensor_plan.apply_plan(model, SimpleNamespace(size=lambda: 2), sequence_parallel=False)


@pytest.mark.parametrize(
    "name", ["Qwen2", "Qwen3", "Llama", "Olmo2", "Olmo3", "Mistral", "Gemma", "Gemma2", "Gemma3Text"]
)
def test_the_plans_of_this_transformers_version_are_understood(name):
    import transformers

    plan = getattr(transformers, f"{name}Config")().base_model_tp_plan
    assert set(plan.values()) <= set(tensor_plan.STYLES)


# ---------------------------------------------------------------- without a mesh


def test_a_model_that_is_not_sharded(tiny_qwen3):
    model = tiny_qwen3()
    batch = pack([Rollout(Prompt(0, "", None, "", (1, 2)), 0, (3,), True, 0)])
    assert parallel.local_batch(model, batch) is batch
    assert parallel.data_rank(None) == (0, 1)
    hidden = torch.randn(2, 32)
    given, head = parallel.through_head(model, hidden, lambda x, head: (x, head))
    assert given is hidden and head.weight is model.lm_head.weight
    assert head.options(97) == {"valid_vocab": 97}


def test_padding_adds_a_sequence_without_active_rows(tiny_qwen3):
    model = tiny_qwen3()
    mesh = {name: SimpleNamespace(size=lambda size=size: size) for name, size in (("cp", 1), ("tp", 4))}
    model.fastkd_layout = parallel._Layout(mesh, True)  # type: ignore[arg-type]
    batch = pack([Rollout(Prompt(0, "", None, "", (1, 2, 5)), 0, (3, 4, 6), True, 0)])
    padded = parallel.local_batch(model, batch)
    assert padded.cu_seqlens.tolist() == [0, 5, 8] and padded.lengths == (5, 3)
    assert padded.positions_N.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert torch.equal(padded.active_A, batch.active_A) and padded.responses == (3, 0)
    assert padded.cu_seqlens.dtype == torch.int32


@pytest.mark.parametrize("limit", [None, 1.0, 100.0])
def test_clipping_plain_gradients_is_torch_clipping(limit):
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (7,), (2,))]
    theirs = [nn.Parameter(torch.zeros_like(p)) for p in ours]
    for a, b in zip(ours[:2], theirs[:2], strict=True):  # the third has no gradient
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    norm = grad_norm.clip_grad_norm(ours, limit)
    wanted = nn.utils.clip_grad_norm_(theirs, float("inf") if limit is None else limit)
    torch.testing.assert_close(norm, wanted)
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert grad_norm.clip_grad_norm(ours[2:], limit) == 0

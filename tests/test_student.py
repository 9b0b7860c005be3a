"""The training step: gradients do not depend on packing or micro-batches, schedules tick once, NaN stops it."""

import math

import pytest
import torch

from fastkd import optim
from fastkd.batch import pack
from fastkd.errors import NonFiniteLoss, RecipeError
from fastkd.kernels import TopK
from fastkd.losses import Divergence, FusedLoss, FusedTopK, PackedModel
from fastkd.models import packed_hidden
from fastkd.recipe import recipe_from
from fastkd.student import Student
from fastkd.teacher import Teacher

DIVERGENCE = Divergence("reverse", "bucket")


def gradients(model, rollouts, targets, bins, autocast=False):
    """Gradients by parameter name when the rollouts are split into micro-batches as given."""
    student = PackedModel(model)
    tokens = sum(len(one.response) for one in rollouts)
    for indices in bins:
        batch = pack([rollouts[i] for i in indices])
        rows = TopK(*(torch.cat(parts) for parts in zip(*(targets[i] for i in indices), strict=True)))
        weights = torch.full((len(batch.labels_A),), 1 / tokens)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = student(batch, FusedLoss(DIVERGENCE, rows, weights))
        loss.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def score(teacher, rollouts, k=8):
    root = PackedModel(teacher)
    with torch.no_grad():
        rows = [root(pack([one]), FusedTopK(k)) for one in rollouts]
    return [TopK(*(field.float() if field.is_floating_point() else field for field in row)) for row in rows]


BINS = [[[0, 1, 2, 3, 4, 5, 6]], [[i] for i in range(7)], [[6, 2], [0, 5, 1], [4, 3]], [[3, 1, 0], [2, 4, 5, 6]]]


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_do_not_depend_on_packing_float64(tiny_qwen3, rollouts, tied):
    model, teacher = tiny_qwen3(tied, dtype=torch.float64), tiny_qwen3(seed=1)
    sequences = rollouts(7)
    targets = score(teacher, sequences)
    first, *others = [gradients(model, sequences, targets, bins) for bins in BINS]
    for other in others:
        for name, grad in first.items():
            torch.testing.assert_close(other[name], grad, rtol=1e-6, atol=1e-9, msg=name)
    assert ("lm_head.weight" in first) is not tied


def test_gradients_do_not_depend_on_packing_bfloat16(tiny_qwen3, rollouts):
    model, teacher = tiny_qwen3(initializer_range=0.05), tiny_qwen3(seed=1)
    sequences = rollouts(7)
    targets = score(teacher, sequences)
    exact = gradients(model, sequences, targets, BINS[0])
    rounded = [gradients(model, sequences, targets, bins, autocast=True) for bins in BINS]
    for name, grad in exact.items():
        own_error = (rounded[0][name] - grad).norm()
        for other in rounded[1:]:
            # Splitting may cost no more than what bf16 costs anyway.
            assert (other[name] - rounded[0][name]).norm() <= 2 * own_error + 1e-6, name


def test_under_autocast_the_head_computes_in_bfloat16_and_gradients_stay_float32(tiny_qwen3, rollouts, monkeypatch):
    from fastkd import losses

    seen = []
    real = losses.topk_kl
    monkeypatch.setattr(losses, "topk_kl", lambda h, w, *a, **k: seen.append((h.dtype, w.dtype)) or real(h, w, *a, **k))
    model = tiny_qwen3()
    sequences = rollouts(3)
    found = gradients(model, sequences, score(tiny_qwen3(seed=1), sequences), [[0, 1, 2]], autocast=True)
    assert seen == [(torch.bfloat16, torch.bfloat16)]
    assert {grad.dtype for grad in found.values()} == {torch.float32}


def test_the_fused_head_equals_dense_autograd(tiny_qwen3, rollouts):
    model, teacher = tiny_qwen3(dtype=torch.float64), tiny_qwen3(seed=1, dtype=torch.float64)
    sequences = rollouts(5)
    batch = pack(sequences)
    with torch.no_grad():
        teacher_logits = (packed_hidden(teacher, batch) @ teacher.lm_head.weight.T)[batch.active_A]
        rows = PackedModel(teacher)(batch, FusedTopK(101))
    weights = torch.full((len(batch.labels_A),), 1 / len(batch.labels_A))
    fused = PackedModel(model)(batch, FusedLoss(DIVERGENCE, rows, weights)).loss
    fused.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    log_q = (packed_hidden(model, batch) @ model.lm_head.weight.T)[batch.active_A].log_softmax(-1)
    dense = (log_q.exp() * (log_q - teacher_logits.log_softmax(-1))).sum(-1).mean()
    dense.backward()
    assert fused.item() == pytest.approx(dense.item(), rel=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-7, msg=name)


def recipe(arithmetic, **policy):
    return recipe_from(
        {
            "distillation": {"topk_logits_k": 16, "num_prompts_per_step": 8},
            "loss_fn": {"kl_type": "reverse", "outside_topk": "bucket"},
            "policy": {
                "model_name": str(arithmetic / "student"),
                "precision": "float32",
                "max_total_sequence_length": 128,
                "train_global_batch_size": 8,
                "sequence_packing": {"enabled": True, "train_mb_tokens": 60},
                **policy,
            },
            "teacher": {"model_name": str(arithmetic / "teacher")},
            "data": {"train": {"data_path": "unused.jsonl"}},
        }
    ).recipe


CPU = torch.device("cpu")


def test_activation_checkpointing_changes_memory_not_gradients(arithmetic, rollouts):
    found = []
    sequences = rollouts(8)
    targets = None
    for recompute in (False, True):
        config = recipe(arithmetic, dtensor_cfg={"activation_checkpointing": recompute})
        student = Student(config, CPU, None)
        targets = targets or Teacher(config, CPU, None).score(sequences)
        student.optimizer.step = lambda: None  # keep the gradients' effect out of the comparison
        kept = {}
        student.optimizer.zero_grad = lambda set_to_none=True, student=student, kept=kept: kept.update(
            {name: p.grad.clone() for name, p in student.causal_lm.named_parameters()}
        )
        student.train(sequences, targets)
        found.append(kept)
    for name, grad in found[0].items():
        assert torch.equal(grad, found[1][name]), name


def test_optimizer_steps_and_one_tick_of_the_schedule(arithmetic, rollouts):
    config = recipe(
        arithmetic,
        train_global_batch_size=4,
        optimizer={"name": "torch.optim.AdamW", "kwargs": {"lr": 1e-3}},
        scheduler=[{"name": "torch.optim.lr_scheduler.LinearLR", "kwargs": {"start_factor": 0.5, "total_iters": 2}}],
    )
    student, teacher = Student(config, CPU, None), Teacher(config, CPU, None)
    sequences = rollouts(8)
    targets = teacher.score(sequences)
    rates = [student.train(sequences, targets)["train/lr"] for _ in range(3)]
    assert rates == pytest.approx([0.5e-3, 0.75e-3, 1e-3])
    assert student.version == 6  # two optimizer steps per batch of rollouts
    assert [row.indices.shape for row in targets] == [(len(one.response), 16) for one in sequences]


def test_the_norm_of_the_weights_on_request(arithmetic, rollouts):
    config = recipe(arithmetic)
    config = config.model_copy(update={"logger": config.logger.model_copy(update={"log_params_norm": True})})
    student, teacher = Student(config, CPU, None), Teacher(config, CPU, None)
    sequences = rollouts(8)
    found = student.train(sequences, teacher.score(sequences))["train/params_norm"]
    wanted = torch.cat([parameter.flatten() for parameter in student.causal_lm.parameters()]).norm()
    assert found == pytest.approx(float(wanted), rel=1e-5)


def test_learns(arithmetic, rollouts):
    config = recipe(arithmetic, optimizer={"name": "AdamW", "kwargs": {"lr": 3e-3, "weight_decay": 0.0}})
    student, teacher = Student(config, CPU, None), Teacher(config, CPU, None)
    sequences = rollouts(8)
    targets = teacher.score(sequences)
    before = student.divergences(sequences, targets, with_loss=True)
    losses = [student.train(sequences, targets)["train/loss"] for _ in range(20)]
    after = student.divergences(sequences, targets)
    assert losses[0] == pytest.approx(before["loss"], rel=1e-5) == pytest.approx(before["kl"], rel=1e-5)
    assert after["kl"] < 0.5 * before["kl"]
    assert before["kl_forward"] > 0


def test_a_non_finite_loss_leaves_the_weights_alone(arithmetic, rollouts):
    config = recipe(arithmetic)
    student, teacher = Student(config, CPU, None), Teacher(config, CPU, None)
    sequences = rollouts(8)
    targets = teacher.score(sequences)
    with torch.no_grad():
        student.causal_lm.model.norm.weight[0] = math.inf
    before = {name: p.clone() for name, p in student.causal_lm.named_parameters()}
    with pytest.raises(NonFiniteLoss, match="the weights were left as they were"):
        student.train(sequences, targets)
    assert all(torch.equal(before[name], p) for name, p in student.causal_lm.named_parameters())


def test_a_batch_of_masked_prompts_takes_no_optimizer_step(arithmetic, rollouts):
    from dataclasses import replace

    student = Student(recipe(arithmetic), CPU, None)
    empty = [replace(one, response=()) for one in rollouts(8)]
    metrics = student.train(empty, [None] * 8)
    assert student.version == 0
    assert "train/loss" not in metrics


def test_state_round_trip_continues_bit_for_bit(arithmetic, rollouts):
    config = recipe(
        arithmetic,
        scheduler=[
            {"name": "LinearLR", "kwargs": {"start_factor": 0.1, "total_iters": 3}},
            {"name": "ConstantLR", "kwargs": {"factor": 0.5, "total_iters": 9}},
            {"milestones": [2]},
        ],
    )
    first, teacher = Student(config, CPU, None), Teacher(config, CPU, None)
    sequences = rollouts(8)
    targets = teacher.score(sequences)
    for _ in range(3):
        first.train(sequences, targets)
    import copy

    saved = copy.deepcopy(first.state_dict())
    second = Student(config, CPU, None)
    second.load_state_dict(saved)
    for _ in range(3):
        assert first.train(sequences, targets) == second.train(sequences, targets)
    for (name, ours), theirs in zip(first.causal_lm.named_parameters(), second.causal_lm.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(
    "policy, message",
    [
        ({"optimizer": {"name": "torch.optim.AdmW"}}, r"Did you mean torch.optim.Adam"),
        (
            {"optimizer": {"name": "AdamW", "kwargs": {"lr": 1e-3, "decay": 1}}},
            "policy.optimizer.kwargs.*does not accept",
        ),
        ({"scheduler": [{"name": "LinearLRR"}]}, r"policy.scheduler.0.name.*LinearLR"),
        ({"scheduler": [{"name": "LinearLR"}, {"name": "ConstantLR"}]}, "2 schedulers need 1 milestones"),
    ],
)
def test_bad_optimizers_are_named(arithmetic, policy, message):
    parameter = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(RecipeError, match=message):
        config = recipe(arithmetic, **policy).policy
        optim.build_scheduler(config, optim.build_optimizer(config.optimizer, [parameter]))


def test_adapters_learn_over_a_frozen_base_that_is_the_teacher(arithmetic, rollouts, tmp_path):
    from transformers import AutoModelForCausalLM

    from fastkd.models import load_causal_lm
    from fastkd.shared_weights import is_base_of

    lora = {"lora_cfg": {"enabled": True, "dim": 8, "dropout": 0.1}}
    config = recipe(arithmetic, dtensor_cfg=lora, optimizer={"name": "AdamW", "kwargs": {"lr": 1e-2}})
    student, teacher = Student(config, CPU, None), Teacher(config, CPU, None)
    assert not is_base_of(config)  # the teacher is another checkpoint
    base = {name: p.clone() for name, p in student.causal_lm.named_parameters() if not p.requires_grad}
    sequences = rollouts(8)
    targets = teacher.score(sequences)
    before = student.divergences(sequences, targets)["kl"]
    for _ in range(20):
        student.train(sequences, targets)
    after = student.divergences(sequences, targets)["kl"]
    assert after < 0.7 * before
    kept = dict(student.causal_lm.named_parameters())
    assert base and all(torch.equal(value, kept[name]) for name, value in base.items())

    # The same weights without adapters are a teacher of their own: the base as it was loaded.
    same = config.model_copy(
        update={"teacher": config.teacher.model_copy(update={"model_name": config.policy.model_name})}
    )
    assert is_base_of(same)
    shared = Teacher(same, CPU, None, shared=student).score(sequences)
    separate = Teacher(same, CPU, None).score(sequences)
    for ours, theirs in zip(shared, separate, strict=True):
        assert torch.equal(ours.indices, theirs.indices) and torch.equal(ours.logits, theirs.logits)

    student.export(tmp_path / "export")
    assert (tmp_path / "export" / "adapter" / "adapter_model.safetensors").is_file()
    merged = load_causal_lm("key", str(tmp_path / "export"), dtype=torch.float32, device=CPU)
    batch = pack(sequences)
    with torch.no_grad():
        student.causal_lm.eval()
        torch.testing.assert_close(packed_hidden(merged, batch), packed_hidden(student.causal_lm, batch))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "export").config.dtype == torch.float32

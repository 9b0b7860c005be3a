"""The kernels inside what training loops wrap around them: checkpointing, no_grad, autocast, accumulation, odd strides.

Passes are counted from outside, by the profiler: a matrix product counts when the vocabulary is one of its dimensions,
wherever it was called from.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fastkd.kernels import TopK, topk_kl, topk_kl_from_logits, vocab_topk


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


N, D, V, K = 12, 6, 41, 5
HIDDEN, WEIGHT = normal(N, D), normal(V, D, seed=1)
TEACHER = vocab_topk(normal(N, D, seed=2), normal(V, D, seed=3), K)
WEIGHTS = torch.rand(N, generator=torch.Generator().manual_seed(4), dtype=torch.float64) + 0.1


def passes(function, *args, **kwargs):
    """(result, products with the vocabulary as a dimension) of a call."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        result = function(*args, **kwargs)
    products = [event for event in recorded.events() if event.name in ("aten::mm", "aten::addmm")]
    return result, sum(any(V in shape for shape in event.input_shapes if shape) for event in products)


class Student(nn.Module):
    """A trunk of one layer, and the head."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(D, D, dtype=torch.float64), nn.Tanh())
        self.head = nn.Linear(D, V, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.trunk[0].weight.copy_(normal(D, D, seed=5))
            self.trunk[0].bias.zero_()
            self.head.weight.copy_(WEIGHT)

    def loss(self, hidden):
        return topk_kl(hidden, self.head.weight, TEACHER, kl="mixed", token_weights=WEIGHTS).loss

    def forward(self, x):
        return self.loss(self.trunk(x))


def plain():
    """Gradients without any wrapper, and that they take three passes."""
    student = Student()
    loss = student(HIDDEN)
    loss.backward()
    return loss.detach(), [p.grad for p in student.parameters()]


def assert_plain(loss, student):
    expected, gradients = plain()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-13, atol=0)
    torch.testing.assert_close([p.grad for p in student.parameters()], gradients, rtol=1e-13, atol=1e-14)


def backward_of(build):
    """Runs forward and backward: passes(backward_of(...)) counts both."""

    def run():
        loss = build()
        loss.backward()
        return loss

    return run


# ---------------------------------------------------------------- activation checkpointing


def test_three_passes_without_a_wrapper_and_with_a_checkpointed_trunk():
    student = Student()
    loss, count = passes(backward_of(lambda: student(HIDDEN)))
    assert count == 3
    assert_plain(loss, student)
    student = Student()
    loss, count = passes(backward_of(lambda: student.loss(checkpoint(student.trunk, HIDDEN, use_reentrant=False))))
    assert count == 3
    assert_plain(loss, student)


def test_a_checkpointed_call_is_right_but_takes_six_passes():
    student = Student()
    loss, count = passes(backward_of(lambda: checkpoint(student, HIDDEN, use_reentrant=False)))
    assert count == 6
    assert_plain(loss, student)


@pytest.mark.parametrize("factor", [1.0, -2.5])
def test_selective_checkpointing_can_save_the_call(factor):
    def policy(context, op, *args, **kwargs):
        saved = op is torch.ops.fastkd.topk_kl.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    student = Student()

    def run():
        loss = checkpoint(
            student,
            HIDDEN,
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(policy),
        )
        (factor * loss).backward()
        return loss

    loss, count = passes(run)
    assert count == 3
    expected, gradients = plain()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-13, atol=0)
    wanted = [factor * gradient for gradient in gradients]
    torch.testing.assert_close([p.grad for p in student.parameters()], wanted, rtol=1e-13, atol=1e-14)


# ---------------------------------------------------------------- without gradients


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("memory", ["fast", "low"])
def test_evaluation_takes_one_pass_and_changes_nothing(mode, memory):
    student = Student()
    expected = topk_kl(student.trunk(HIDDEN), student.head.weight, TEACHER, memory=memory)
    with mode():
        hidden = student.trunk(HIDDEN)
        result, count = passes(topk_kl, hidden, student.head.weight, TEACHER, memory=memory)
        kept, topk_count = passes(vocab_topk, hidden, student.head.weight, K)
    assert count == topk_count == 1
    assert not result.loss.requires_grad and not any(field.requires_grad for field in kept)
    torch.testing.assert_close(result[:2], expected[:2], rtol=1e-13, atol=0)


def test_teacher_rows_made_in_inference_mode_train_a_student():
    with torch.inference_mode():
        teacher = vocab_topk(normal(N, D, seed=2), normal(V, D, seed=3), K)
    x = HIDDEN.clone().requires_grad_()
    topk_kl(x, WEIGHT, teacher).loss.backward()
    y = HIDDEN.clone().requires_grad_()
    topk_kl(y, WEIGHT, TEACHER).loss.backward()
    assert torch.equal(x.grad, y.grad)


def test_a_frozen_head_or_trunk_saves_a_pass():
    for frozen in ("trunk", "head"):
        student = Student()
        getattr(student, frozen).requires_grad_(False)
        _, count = passes(backward_of(lambda student=student: student(HIDDEN)))
        assert count == 2
        _, gradients = plain()
        for got, wanted in zip(student.parameters(), gradients, strict=True):
            if got.requires_grad:
                torch.testing.assert_close(got.grad, wanted, rtol=1e-13, atol=1e-14)


# ---------------------------------------------------------------- autocast


def test_a_bfloat16_trunk_under_autocast_meets_a_bfloat16_head():
    # Autocast makes hidden states bfloat16 while the head stays float32: the caller casts, gradients come back wide.
    student = Student().float()
    x = HIDDEN.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = student.trunk(x)
        assert hidden.dtype == torch.bfloat16
        with pytest.raises(ValueError, match="cast one to the other"):
            topk_kl(hidden, student.head.weight, TEACHER)
        result = topk_kl(hidden, student.head.weight.bfloat16(), TEACHER, token_weights=WEIGHTS, kl="mixed")
    assert result.per_token.dtype == torch.float32
    result.loss.backward()
    expected, gradients = plain()
    assert abs(result.loss.item() - expected.item()) < 0.02 * expected.item()
    for parameter, wanted in zip(student.parameters(), gradients, strict=True):
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad.double() - wanted).norm() < 0.05 * wanted.norm()


# ---------------------------------------------------------------- graphs


def test_micro_batches_add_up_to_the_batch():
    student = Student()
    for part in (slice(0, 5), slice(5, 6), slice(6, N)):
        rows = TopK(*(field[part] for field in TEACHER))
        hidden = student.trunk(HIDDEN[part])
        topk_kl(hidden, student.head.weight, rows, kl="mixed", token_weights=WEIGHTS[part]).loss.backward()
    _, gradients = plain()
    torch.testing.assert_close([p.grad for p in student.parameters()], gradients, rtol=1e-12, atol=1e-13)


def test_two_calls_in_one_graph_keep_apart():
    def losses(x, w):
        forward = topk_kl(x, w, TEACHER, kl="forward", token_weights=WEIGHTS).loss
        reverse = topk_kl(x, w, TEACHER, kl="reverse", token_weights=WEIGHTS, temperature=1.0).loss
        return forward, reverse

    leaves = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    forward, reverse = losses(*leaves)
    got = torch.autograd.grad(0.3 * forward + 0.7 * reverse, leaves)
    parts = [torch.autograd.grad(loss, leaves) for loss in losses(*leaves)]
    torch.testing.assert_close(got, tuple(0.3 * a + 0.7 * b for a, b in zip(*parts, strict=True)))
    mixed = topk_kl(*leaves, TEACHER, kl="mixed", mixed_weight=0.3, token_weights=WEIGHTS).loss
    torch.testing.assert_close(got, torch.autograd.grad(mixed, leaves))


def test_each_backward_through_a_retained_graph_accumulates():
    x, w = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    loss = topk_kl(x, w, TEACHER).loss
    loss.backward(retain_graph=True)
    once = x.grad.clone(), w.grad.clone()
    loss.backward()
    torch.testing.assert_close((x.grad, w.grad), (2 * once[0], 2 * once[1]))


def test_a_gradient_kept_by_the_caller_is_never_written_to():
    # The op hands out its stored gradients: a second use of the graph must not change the first one's.
    x = HIDDEN.clone().requires_grad_()
    loss = topk_kl(x, WEIGHT, TEACHER).loss
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    copy = first.clone()
    (second,) = torch.autograd.grad(3.0 * loss, x)
    assert torch.equal(first, copy)
    torch.testing.assert_close(second, 3.0 * copy)


def test_hooks_on_the_inputs_see_the_gradient():
    seen = []
    x, w = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    hidden = x * 1.0
    hidden.register_hook(lambda gradient: seen.append(gradient.clone()))
    topk_kl(hidden, w, TEACHER).loss.backward()
    assert torch.equal(seen[0], x.grad)


# ---------------------------------------------------------------- strides


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_slices_and_expanded_rows_are_inputs_like_any_other(memory):
    wide, tall = normal(2 * N, 2 * D, seed=6), normal(2 * V, D, seed=7)
    cases = [
        (wide[::2, 1 : 1 + D], tall[1::2]),  # strides in both dimensions
        (wide[:1, :D].expand(N, D), tall[:V]),  # one row, N times: stride 0
        (wide[:N, : 2 * D : 2], tall[:V].flip(0)),
    ]
    for hidden, weight in cases:
        results = []
        for x, w in ((hidden, weight), (hidden.clone(memory_format=torch.contiguous_format), weight.contiguous())):
            x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
            result = topk_kl(x, w, TEACHER, memory=memory, token_weights=WEIGHTS, labels=torch.arange(N))
            results.append((*result, *torch.autograd.grad(result.loss, (x, w))))
            kept = vocab_topk(x, w, K)
            results[-1] += tuple(kept)
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_strided_logits():
    logits = normal(V, 2 * N, seed=8).T[::2]
    assert not logits.is_contiguous()
    x, y = logits.clone(memory_format=torch.contiguous_format).requires_grad_(), logits.requires_grad_()
    for z in (x, y):
        topk_kl_from_logits(z, TEACHER, token_weights=WEIGHTS).loss.backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_gradient_of_a_batched_trunk_through_flatten():
    # [batch, sequence, D] flattened, a mask as weights: what a Hugging Face loop does.
    x, y = HIDDEN.view(3, 4, D).clone().requires_grad_(), HIDDEN.clone().requires_grad_()
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 0, 0]])
    weights = mask.flatten().double() / mask.sum()
    topk_kl(x.flatten(0, 1), WEIGHT, TEACHER, token_weights=weights).loss.backward()
    topk_kl(y, WEIGHT, TEACHER, token_weights=weights).loss.backward()
    assert torch.equal(x.grad.flatten(0, 1), y.grad)
    assert (x.grad[mask == 0] == 0).all()

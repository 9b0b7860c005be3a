"""The registered operators: what compilers, policies and other tools of torch rely on."""

from __future__ import annotations

import pytest
import torch

from fastkd.kernels import topk_kl, topk_kl_from_logits, vocab_topk

VARIANTS = [("forward", "bucket"), ("reverse", "zero"), ("mixed", "renormalize"), ("jsd", "bucket")]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


HIDDEN, WEIGHT, BIAS, TEACHER = normal(9, 8), normal(50, 8, seed=1), normal(50, seed=2), None
TEACHER = vocab_topk(normal(9, 8, seed=3), WEIGHT, 6)


def arguments(hidden, weight, bias, *, kl="forward", outside="bucket", stats=True, low=False, labels=None):
    needs = [x is not None and x.requires_grad for x in (hidden, weight, bias)]
    count = hidden.shape[1] if weight is None else len(weight)
    return (
        hidden, weight, bias, *TEACHER, torch.rand(9), None, labels, kl, outside, 0.5, 0.5, 1.0, stats, None, count,
        count, 0, None, False, low, 1 << 20, True, *needs,
    )  # fmt: skip


@pytest.mark.parametrize("stats", [True, False])
@pytest.mark.parametrize("low", [True, False])
@pytest.mark.parametrize(("kl", "outside"), [VARIANTS[0], VARIANTS[2]])
def test_opcheck_of_the_loss(kl, outside, low, stats):
    x, w, b = (t.clone().requires_grad_() for t in (HIDDEN, WEIGHT, BIAS))
    labels = torch.arange(9)
    for tensors in ((x, w, b, labels), (x, WEIGHT, None, None), (normal(9, 50).requires_grad_(), None, None, labels)):
        torch.library.opcheck(
            torch.ops.fastkd.topk_kl.default,
            arguments(*tensors[:3], kl=kl, outside=outside, low=low, stats=stats, labels=tensors[3]),
        )


def test_opcheck_of_the_rest():
    for bias in (None, BIAS):
        inputs = (HIDDEN, WEIGHT, bias, 6, 1.0, 30.0, 50, 0, None, False, 1 << 20)
        torch.library.opcheck(torch.ops.fastkd.vocab_topk.default, inputs)
    torch.library.opcheck(torch.ops.fastkd.scale_gradients_.default, ([normal(3), normal(2, 2)], torch.tensor(2.0)))


def head(hidden, weight, bias, teacher, weights, labels, **options):
    """A step as a user writes it: something before the op, something after it."""
    out = topk_kl(torch.tanh(hidden), weight, teacher, bias=bias, token_weights=weights, labels=labels, **options)
    return 3.0 * out.loss, out.per_token, out.entropy


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("kl", "outside"), VARIANTS)
def test_compiles_to_one_graph(kl, outside, dynamic):
    torch._dynamo.reset()
    options = dict(kl=kl, outside=outside)
    compiled = torch.compile(head, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (9, 7) if dynamic else (9,):
        teacher = TEACHER.map(lambda field, rows=rows: field[:rows])
        rest = (teacher, torch.rand(rows), torch.arange(rows))
        outcomes = []
        for function in (head, compiled):
            leaves = [t.clone().requires_grad_() for t in (HIDDEN[:rows], WEIGHT, BIAS)]
            loss, per_token, entropy = function(*leaves, *rest, **options)
            outcomes.append((loss.detach(), per_token, entropy, *torch.autograd.grad(loss, leaves)))
        torch.testing.assert_close(outcomes[1], outcomes[0])


def test_the_teacher_and_given_logits_compile():
    torch._dynamo.reset()

    def step(hidden, weight, logits):
        teacher = vocab_topk(hidden, weight, 6, softcap=10.0)
        return topk_kl_from_logits(logits, teacher, kl="reverse").loss

    logits = normal(9, 50, seed=5).requires_grad_()
    expected = torch.autograd.grad(step(HIDDEN, WEIGHT, logits), logits)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(HIDDEN, WEIGHT, logits), logits), expected)


def test_inductor_compiles_a_module_around_the_op():
    torch._dynamo.reset()
    trunk = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU())
    module = torch.nn.Linear(8, 50, bias=True)

    def step():
        return topk_kl(trunk(HIDDEN), module.weight, TEACHER, bias=module.bias).loss

    parameters = [*trunk.parameters(), *module.parameters()]
    expected = torch.autograd.grad(step(), parameters)
    try:
        loss = torch.compile(step, fullgraph=True)()
    except torch._inductor.exc.InductorError as error:
        pytest.skip(f"no working C++ compiler: {str(error).splitlines()[0]}")
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), expected, rtol=1e-4, atol=1e-6)


def test_mistakes_of_shape_are_found_while_compiling():
    torch._dynamo.reset()
    with pytest.raises(Exception, match="hidden size"):
        torch.compile(topk_kl, fullgraph=True, backend="eager")(HIDDEN, WEIGHT[:, :5], TEACHER)

"""How the kernels behave as functions: rows that drop out, autograd, autocast, arguments, imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastkd._kernels import gemm, linear_kl
from fastkd.kernels import TopK, topk_kl, topk_kl_from_logits, vocab_topk


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


N, D, V, K = 11, 6, 40, 5
HIDDEN, WEIGHT = normal(N, D), normal(V, D, seed=1)
TEACHER = vocab_topk(normal(N, D, seed=2), normal(V, D, seed=3), K)
WEIGHTS = torch.rand(N, generator=torch.Generator().manual_seed(4), dtype=torch.float64) + 0.1
LABELS = torch.arange(N)


def run(hidden=HIDDEN, weight=WEIGHT, teacher=TEACHER, **options):
    """(result, dX, dW)."""
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    result = topk_kl(x, w, teacher, **{"labels": LABELS, "token_weights": WEIGHTS, **options})
    return result, *torch.autograd.grad(result.loss, (x, w))


def rows_of(teacher, rows):
    return TopK(*(field[rows] for field in teacher))


@pytest.fixture
def gemm_rows(monkeypatch):
    """Counts the rows that are projected onto the vocabulary."""
    counted = []
    original = linear_kl.LinearHead.activations

    def activations(self, part):
        counted.append(part.stop - part.start)
        return original(self, part)

    monkeypatch.setattr(linear_kl.LinearHead, "activations", activations)
    return counted


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("stats", [True, False])
@pytest.mark.parametrize("compact", [True, False], ids=["a row per active token", "a row per token"])
def test_active_rows(memory, stats, compact, gemm_rows):
    active = torch.tensor([1, 2, 5, 10])
    options = dict(kl="mixed", memory=memory, stats=stats, chunk_bytes=3000)
    expected = run(HIDDEN[active], WEIGHT, rows_of(TEACHER, active), token_weights=WEIGHTS[active],
                   labels=LABELS[active], **options)  # fmt: skip
    gemm_rows.clear()
    if compact:
        options |= dict(teacher=rows_of(TEACHER, active), token_weights=WEIGHTS[active], labels=LABELS[active])
    result, dx, dw = run(active=active, **options)
    assert sum(gemm_rows) == len(active)
    inactive = torch.ones(N, dtype=torch.bool).index_fill(0, active, False)
    torch.testing.assert_close(result.loss, expected[0].loss)
    torch.testing.assert_close(dx[active], expected[1])
    assert (dx[inactive] == 0).all()
    torch.testing.assert_close(dw, expected[2])
    for field, wanted in zip(result[1:], expected[0][1:], strict=True):
        if wanted is not None:
            torch.testing.assert_close(field[active], wanted)
            assert (field[inactive] == 0).all()


@pytest.mark.parametrize("with_active", [True, False])
def test_weight_zero_drops_a_token_whatever_it_holds(with_active, gemm_rows):
    weights = WEIGHTS.clone()
    dropped = torch.tensor([0, 4, 10])
    weights[dropped] = 0
    junk = TopK(*(field.clone() for field in TEACHER))
    junk.indices[dropped], junk.logits[dropped], junk.tail_logsumexp[dropped] = -7, torch.nan, torch.nan
    hidden, labels = HIDDEN.clone(), LABELS.clone()
    hidden[dropped], labels[dropped] = torch.nan, -100
    options = dict(active=torch.arange(N)) if with_active else {}
    result, dx, dw = run(hidden, WEIGHT, junk, token_weights=weights, labels=labels, **options)
    assert sum(gemm_rows) == N - len(dropped)
    expected, wanted_dx, wanted_dw = run(token_weights=weights)
    torch.testing.assert_close(result.loss, expected.loss)
    torch.testing.assert_close(dx, wanted_dx)
    torch.testing.assert_close(dw, wanted_dw)
    assert (result.per_token[dropped] == 0).all() and (result.label_logprob[dropped] == 0).all()


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("stats", [True, False])
@pytest.mark.parametrize("outside", ["bucket", "renormalize"])
def test_no_active_token_is_legal(memory, stats, outside):
    options = dict(memory=memory, stats=stats, outside=outside)
    for changes in (
        dict(token_weights=torch.zeros(N)),
        dict(active=torch.empty(0, dtype=torch.int64)),
        dict(hidden=HIDDEN[:0], teacher=rows_of(TEACHER, slice(0)), token_weights=None, labels=None),
    ):
        result, dx, dw = run(**{**options, **changes})
        assert result.loss == 0
        assert (dx == 0).all() and (dw == 0).all() and dw.shape == WEIGHT.shape
        assert len(result.per_token) == len(dx)
    x = normal(N, V).requires_grad_()
    topk_kl_from_logits(x, TEACHER, token_weights=torch.zeros(N), **options).loss.backward()
    assert (x.grad == 0).all()


def test_stats_false_leaves_out_what_costs_a_pass():
    full, lean = run()[0], run(stats=False)[0]
    assert lean.entropy is None and lean.top1_agree is None
    torch.testing.assert_close(lean[:4], full[:4])
    torch.testing.assert_close(lean.label_logprob, full.label_logprob)
    assert run(stats=False, temperature=2.0)[0].label_logprob is None
    bare = run(stats=False, outside="renormalize")[0]
    assert bare.student_mass is None and bare.label_logprob is None and bare.teacher_mass is not None
    assert (
        run(outside="renormalize", teacher=TEACHER._replace(logsumexp=None, tail_logsumexp=None))[0].teacher_mass
        is None
    )


def test_only_the_kept_columns_are_projected_when_only_they_matter(monkeypatch):
    widths = []
    original = gemm.HeadGemms.__init__

    def init(self, weight, scratch):
        widths.append(weight.shape[0])
        original(self, weight, scratch)

    monkeypatch.setattr(gemm.HeadGemms, "__init__", init)
    run(outside="renormalize", stats=False)
    used = len(TEACHER.indices.unique())
    assert widths[0] == V  # the head itself, never run
    assert sum(widths[1:]) == 2 * used  # logits, then gradients


def test_frozen_head_or_frozen_trunk_skips_its_gemm(monkeypatch):
    calls = []
    for name in ("logits", "grad_hidden", "grad_weight"):
        original = getattr(gemm.HeadGemms, name)

        def counted(self, *args, name=name, original=original, **kwargs):
            calls.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(gemm.HeadGemms, name, counted)
    for need_x in (True, False):
        for need_w in (True, False):
            calls.clear()
            x, w = HIDDEN.clone().requires_grad_(need_x), WEIGHT.clone().requires_grad_(need_w)
            loss = topk_kl(x, w, TEACHER).loss
            assert loss.requires_grad == (need_x or need_w)
            assert calls == ["logits"] + ["grad_hidden"] * need_x + ["grad_weight"] * need_w
    calls.clear()
    with torch.no_grad():
        topk_kl(HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_(), TEACHER)
    assert calls == ["logits"]


def test_upstream_gradient_and_repeated_backward():
    _, dx, dw = run()
    x, w = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    loss = topk_kl(x, w, TEACHER, token_weights=WEIGHTS).loss
    for factor in (3.0, 1.0, -0.5):  # after the first, gradients are computed again
        got = torch.autograd.grad(factor * loss, (x, w), retain_graph=True)
        torch.testing.assert_close(got, (factor * dx, factor * dw))
    loss.backward()
    torch.testing.assert_close((x.grad, w.grad), (dx, dw))


def test_a_head_tied_to_the_embedding_sums_both_gradients():
    embedding = WEIGHT.clone().requires_grad_()
    ids = torch.arange(N)
    topk_kl(embedding[ids], embedding, TEACHER, token_weights=WEIGHTS).loss.backward()
    _, dx, dw = run(WEIGHT[ids])
    torch.testing.assert_close(embedding.grad, dw.index_add(0, ids, dx))


def test_only_the_loss_is_differentiable_and_only_once():
    x = HIDDEN.clone().requires_grad_()
    result = topk_kl(x, WEIGHT, TEACHER, labels=LABELS)
    assert not any(field.requires_grad for field in result[1:])
    (gradient,) = torch.autograd.grad(result.loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()


def test_input_changed_in_place_before_a_second_backward_is_noticed():
    x, w = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    loss = topk_kl(x, w, TEACHER).loss
    loss.backward(retain_graph=True)
    with torch.no_grad():
        w.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    hidden, weight = HIDDEN.to(dtype), WEIGHT.to(dtype)
    plain, kept = run(hidden, weight), vocab_topk(hidden, weight, K)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, kept_inside = run(hidden, weight), vocab_topk(hidden, weight, K)
    for a, b in zip((*plain[0], *plain[1:], *kept), (*inside[0], *inside[1:], *kept_inside), strict=True):
        assert torch.equal(a, b)


def test_a_checkpointed_trunk_computes_the_loss_once(gemm_rows):
    trunk = torch.nn.Linear(D, D, dtype=torch.float64)
    weight = WEIGHT.clone().requires_grad_()
    hidden = torch.utils.checkpoint.checkpoint(trunk, HIDDEN, use_reentrant=False)
    topk_kl(hidden, weight, TEACHER).loss.backward()
    assert sum(gemm_rows) == N
    assert trunk.weight.grad is not None


def test_inputs_need_not_be_contiguous():
    _, dx, dw = run()
    x, w = HIDDEN.T.contiguous().T.requires_grad_(), WEIGHT.T.contiguous().T.requires_grad_()
    wide = TopK(TEACHER.indices.long(), *TEACHER[1:])
    for memory in ("fast", "low"):
        got = torch.autograd.grad(topk_kl(x, w, wide, token_weights=WEIGHTS, memory=memory).loss, (x, w))
        torch.testing.assert_close(got, (dx, dw))


def test_kernels_import_torch_alone():
    code = (
        "import sys; import torch; before = set(sys.modules); import fastkd.kernels; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "import_ok = new <= set(sys.stdlib_module_names) | {'fastkd', 'torch'}; "
        "sys.exit(0 if import_ok else str(new))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names():
    import fastkd.kernels

    assert set(fastkd.kernels.__all__) == {"TopK", "TopKLoss", "topk_kl", "topk_kl_from_logits", "vocab_topk"}


UNSORTED = TEACHER._replace(indices=TEACHER.indices.flip(1))
DOUBLED = TEACHER._replace(indices=TEACHER.indices.clone().index_fill_(1, torch.tensor([1]), 0).sort(1).values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(kl="backward"), "kl='backward'.*forward, reverse"),
        (dict(outside="tail"), "outside='tail'.*bucket"),
        (dict(kl="jsd", outside="zero"), "outside='zero' with kl='jsd'"),
        (dict(kl="jsd", outside="drop"), "outside='drop' with kl='jsd'"),
        (dict(mixed_weight=1.5), "mixed_weight=1.5"),
        (dict(jsd_beta=0.0), "jsd_beta=0.0"),
        (dict(temperature=0.0), "temperature=0.0"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(memory="slow"), "memory='slow'"),
        (dict(chunk_bytes=0), "chunk_bytes=0"),
        (dict(valid_vocab=41), "valid_vocab=41.*40"),
        (dict(vocab_start=8), "vocab_start=8.*group"),
        (dict(hidden=HIDDEN[None]), "hidden is .1, 11, 6..*flatten"),
        (dict(hidden=HIDDEN.half()), "hidden has dtype torch.float16"),
        (dict(hidden=HIDDEN.float()), "weight has dtype torch.float64 but hidden has torch.float32"),
        (dict(weight=WEIGHT.T.contiguous()), "weight is .6, 40. but hidden"),
        (dict(teacher=rows_of(TEACHER, slice(3))), "teacher.indices is .3, 5."),
        (dict(teacher=TEACHER._replace(indices=TEACHER.indices.double())), "teacher.indices has dtype"),
        (dict(teacher=TEACHER._replace(logits=TEACHER.logits.int())), "teacher.logits has dtype"),
        (dict(teacher=TEACHER._replace(tail_logsumexp=WEIGHTS[:3])), "teacher.tail_logsumexp is .3,."),
        (dict(teacher=TEACHER._replace(logsumexp=None, tail_logsumexp=None)), "outside='bucket' needs.*tail_logsumexp"),
        (dict(teacher=UNSORTED), "row 0 does not ascend"),
        (dict(teacher=DOUBLED), "does not ascend"),
        (dict(teacher=TEACHER._replace(indices=TEACHER.indices + 30)), "teacher.indices hold .*0 to 39"),
        (dict(teacher=TEACHER._replace(indices=TEACHER.indices - 30)), "teacher.indices hold -"),
        (dict(teacher=TEACHER._replace(logits=TEACHER.logits * torch.nan)), "row 0 holds NaN"),
        (dict(teacher=TEACHER._replace(logits=TEACHER.logits - torch.inf)), "row 0 has no finite entry"),
        (dict(valid_vocab=4), "keeps K=5 ids.*4"),
        (dict(teacher=None), "teacher is NoneType"),
        (dict(token_weights=torch.ones(3)), "token_weights is .3,."),
        (dict(token_weights=torch.ones(N, dtype=torch.int64)), "token_weights has dtype"),
        (dict(labels=torch.full((N,), -100)), "labels hold -100"),
        (dict(labels=torch.ones(N)), "labels has dtype"),
        (dict(active=torch.ones(N, dtype=torch.bool)), "active is .*not a mask"),
        (dict(active=torch.tensor([3, 1])), "active runs from 3 to 1"),
        (dict(active=torch.tensor([3, 11])), "active runs from 3 to 11"),
    ],
)
def test_wrong_arguments(changes, message):
    arguments = dict(hidden=HIDDEN, weight=WEIGHT, teacher=TEACHER, labels=LABELS) | changes
    with pytest.raises(ValueError, match=message):
        topk_kl(arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("teacher"), **arguments)


def test_validate_false_skips_value_checks_only():
    topk_kl(HIDDEN, WEIGHT, UNSORTED, validate=False)
    with pytest.raises(ValueError, match="kl="):
        topk_kl(HIDDEN, WEIGHT, TEACHER, validate=False, kl="x")


def test_the_guide_s_example_runs(capsys):
    guide = (Path(__file__).resolve().parents[1] / "docs" / "kernels.md").read_text()
    exec(guide.split("```python\n")[1].split("```")[0], {})
    assert "tensor" in capsys.readouterr().out

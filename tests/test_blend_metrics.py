"""Metrics of a blend by source: whose tokens made which part of the loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastkd import by_source
from fastkd.batch import pack
from fastkd.kernels import TopKLoss
from fastkd.losses import LossBySource
from fastkd.recipe import recipe_from
from fastkd.student import Student
from fastkd.teacher import Teacher

CPU = torch.device("cpu")


def marked(rollouts, *sources):
    return [
        replace(one, prompt=replace(one.prompt, source=source)) for one, source in zip(rollouts, sources, strict=True)
    ]


@pytest.fixture
def build(arithmetic):
    def make(batch, kl="reverse"):
        model = {"model_name": str(arithmetic / "teacher"), "max_total_sequence_length": 128}
        policy = {
            **model,
            "model_name": str(arithmetic / "student"),
            "precision": "float32",
            "train_global_batch_size": batch,
            "sequence_packing": {"enabled": True, "train_mb_tokens": 60},
            # Weights stay: the losses of a step can be asked for again.
            "optimizer": {"name": "torch.optim.AdamW", "kwargs": {"lr": 1e-12, "weight_decay": 0.0}},
        }
        loop = {"topk_logits_k": 16, "num_prompts_per_step": 8}
        loss = {"kl_type": kl, "outside_topk": "bucket"}
        tree = {"distillation": loop, "loss_fn": loss, "policy": policy, "teacher": model}
        recipe = recipe_from(tree | {"data": {"train": {"data_path": "unused.jsonl"}}}).recipe
        return Student(recipe, CPU, None), Teacher(recipe, CPU, None)

    return make


SOURCES = ("code", "books", "code", "empty", "code", None, "books", "code")


@pytest.mark.parametrize("batch", [8, 4])
@pytest.mark.parametrize("kl", ["reverse", "forward"])
def test_the_loss_of_a_source_is_that_of_its_tokens_alone(build, rollouts, batch, kl):
    student, teacher = build(batch, kl)
    texts = marked(rollouts(8), *SOURCES)
    texts[3] = replace(texts[3], response=())
    targets = teacher.score(texts)
    found = student.train(texts, targets)
    assert {name for name in found if name.startswith("blend/")} == {"blend/loss/code", "blend/loss/books"}
    name = {"reverse": "kl", "forward": "kl_forward"}[kl]
    for source in ("code", "books"):
        own = [index for index, one in enumerate(SOURCES) if one == source]
        alone = student.divergences([texts[i] for i in own], [targets[i] for i in own])[name]
        assert found[f"blend/loss/{source}"] == pytest.approx(alone, rel=1e-5)
    assert found["blend/loss/code"] != pytest.approx(found["blend/loss/books"], rel=1e-3)


@pytest.mark.parametrize("kl", ["reverse", "jsd"])
def test_weighted_by_tokens_they_are_the_loss(build, rollouts, kl):
    student, teacher = build(8, kl)
    texts = marked(rollouts(8), *(source or "other" for source in SOURCES))
    found = student.train(texts, teacher.score(texts))
    given = by_source.given(["code", "books", "other", "empty", "unread"], texts)
    names = [name for name in found if name.startswith("blend/loss/")]
    assert len(names) == 4 and given["blend/tokens/unread"] == given["blend/samples/unread"] == 0
    sums = [given[name.replace("loss", "tokens")] * found[name] for name in names]
    assert sum(sums) / found["train/global_valid_toks"] == pytest.approx(found["train/loss"], rel=1e-5)
    assert sum(given[f"blend/samples/{name}"] for name in ("code", "books", "other", "empty")) == 8


def test_samples_of_a_model_have_no_source(build, rollouts):
    student, teacher = build(8)
    texts = rollouts(8)
    assert not any(name.startswith("blend/") for name in student.train(texts, teacher.score(texts)))


def test_sums_by_source_do_not_wait_for_the_device(rollouts):
    texts = marked(rollouts(8), *SOURCES)
    batch, names = pack(texts), list(by_source.tokens(texts))
    sources_A = by_source.places(texts, names)
    assert len(sources_A) == len(batch.active_A) and names[0] == "blend/loss/code"
    per_token = torch.rand(len(batch.tokens_N))
    head = LossBySource(lambda hidden, shard, batch: TopKLoss(per_token.sum(), per_token), sources_A, len(names))
    _, sums = head(per_token[:, None], None, batch)
    rows = per_token[batch.active_A].split([len(one.response) for one in texts])
    wanted = [sum(row.sum() for row, one in zip(rows, SOURCES, strict=True) if one == source) for source in ("code",)]
    torch.testing.assert_close(sums[0], wanted[0])
    with FakeTensorMode() as fake:  # has no values: whatever asks for one raises
        per_token, sources_A = fake.from_tensor(per_token), fake.from_tensor(sources_A)
        batch = replace(batch, active_A=fake.from_tensor(batch.active_A))
        _, sums = replace(head, sources_A=sources_A)(per_token[:, None], None, batch)
    assert sums.shape == (len(names),)

"""The loop and the kernels on one CUDA device, against the CPU. Skipped where there is none.

``pytest tests/test_gpu.py`` is the whole check of a GPU machine. With FASTKD_TEST_DEVICE=cpu the same tests run on the
CPU, to see that they are sound.
"""

import os

import pytest
import torch

from fastkd._kernels import reference
from fastkd.kernels import TopK, topk_kl, vocab_topk
from fastkd.sampling import Sampler, gumbel_noise

DEVICE = os.environ.get("FASTKD_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]

VARIANTS = [
    (kl, outside)
    for kl in ("forward", "reverse", "mixed", "jsd")
    for outside in ("renormalize", "zero", "bucket", "drop")
    if kl != "jsd" or outside in ("renormalize", "bucket")
]


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kl", "outside"), VARIANTS)
def test_loss_and_gradients_equal_the_float64_reference(kl, outside, dtype, memory):
    make = torch.Generator().manual_seed(0)
    hidden, teacher_hidden = (torch.randn(70, 64, generator=make) for _ in range(2))
    weight = 0.3 * torch.randn(1003, 64, generator=make)
    hidden, weight = hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype)
    teacher = vocab_topk((hidden.float().cpu() + 0.1 * teacher_hidden).to(DEVICE, dtype), weight, 50)
    token_weights = (torch.rand(70, generator=make) + 0.1).to(DEVICE)
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = topk_kl(x, w, teacher, kl=kl, outside=outside, token_weights=token_weights, memory=memory)
    out.loss.backward()

    exact_x, exact_w = (t.detach().cpu().double().requires_grad_() for t in (hidden, weight))
    rows = TopK(*(field.cpu() for field in teacher))
    exact = reference.topk_kl(exact_x @ exact_w.T, *rows, kl=kl, outside=outside)
    (exact.per_token * token_weights.cpu().double()).sum().backward()
    tolerance = 1e-4 if dtype == torch.float32 else 1.5e-2  # bf16: dlogits and the results are rounded
    torch.testing.assert_close(out.per_token.cpu().double(), exact.per_token.detach(), rtol=1e-3, atol=1e-4)
    for ours, theirs in ((x.grad, exact_x.grad), (w.grad, exact_w.grad)):
        assert (ours.cpu().double() - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_bias_and_soft_cap_equal_the_float64_reference(memory):
    make = torch.Generator().manual_seed(2)
    leaves = [torch.randn(*shape, generator=make) for shape in ((70, 64), (1003, 64), (1003,))]
    teacher = vocab_topk(leaves[0].to(DEVICE) * 1.1, leaves[1].to(DEVICE), 50)
    exact = [t.double().requires_grad_() for t in leaves]
    ours = [t.clone().to(DEVICE).requires_grad_() for t in leaves]
    topk_kl(ours[0], ours[1], teacher, kl="mixed", bias=ours[2], softcap=9.0, memory=memory).loss.backward()
    logits = 9.0 * torch.tanh((exact[0] @ exact[1].T + exact[2]) / 9.0)
    rows = TopK(*(field.cpu() for field in teacher))
    reference.topk_kl(logits, *rows, kl="mixed", outside="bucket").per_token.sum().backward()
    for leaf, wanted in zip(ours, exact, strict=True):
        assert (leaf.grad.cpu().double() - wanted.grad).norm() <= 1e-4 * wanted.grad.norm()


@pytest.mark.skipif(DEVICE == "cpu", reason="about CUDA streams")
@pytest.mark.parametrize("memory", ["fast", "low"])
def test_no_call_waits_for_the_device(memory):
    hidden, weight = (torch.randn(n, 64, device=DEVICE, dtype=torch.bfloat16) for n in (300, 5000))
    labels = torch.zeros(300, dtype=torch.int64, device=DEVICE)
    active = torch.arange(0, 300, 2, device=DEVICE)
    hidden.requires_grad_(), weight.requires_grad_()
    for mode in ("default", "error"):  # once to compile
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for outside in ("bucket", "renormalize"):
                for stats in (True, False):
                    teacher = vocab_topk(hidden.detach(), weight.detach(), 64)
                    options = dict(outside=outside, labels=labels, active=active, memory=memory, stats=stats)
                    topk_kl(hidden, weight, teacher, chunk_bytes=1 << 21, **options).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_same_bits_every_time():
    hidden, weight = (torch.randn(n, 64, generator=torch.Generator().manual_seed(n)).to(DEVICE) for n in (300, 5000))
    outcomes = []
    for _ in range(3):
        teacher = vocab_topk(hidden, weight, 64)
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = topk_kl(x, w, teacher, kl="reverse", chunk_bytes=1 << 21)
        out.loss.backward()
        outcomes.append((*teacher, *out[:5], x.grad, w.grad))
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))


@pytest.mark.skipif(DEVICE == "cpu", reason="takes 10 GB of a GPU's memory")
def test_a_chunk_of_more_logits_than_an_int32_counts():
    make = torch.Generator(DEVICE).manual_seed(0)
    hidden, weight = (torch.randn(n, 32, device=DEVICE, generator=make) for n in (16_384, 151_936))
    teacher = vocab_topk(hidden, weight, 16, chunk_bytes=12 << 30)
    x = hidden.clone().requires_grad_()
    out = topk_kl(x, weight, teacher, kl="reverse", chunk_bytes=12 << 30)
    out.loss.backward()
    few = torch.tensor([0, 9_000, 16_383])  # the last rows lie behind 2³¹ logits
    exact = hidden[few].double().cpu().requires_grad_()
    logits = exact @ weight.double().cpu().T
    found = reference.topk(logits, 16)
    assert torch.equal(teacher.indices[few].cpu().long(), found[0])
    rows = TopK(*(field[few].cpu() for field in teacher))
    reference.topk_kl(logits, *rows, kl="reverse", outside="bucket").per_token.sum().backward()
    assert (x.grad[few].cpu().double() - exact.grad).norm() <= 1e-3 * exact.grad.norm()


def test_top_k_is_exact():
    make = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(40, 32, generator=make), torch.randn(5000, 32, generator=make))
    found = vocab_topk(hidden.to(DEVICE), weight.to(DEVICE), 64)
    logits = hidden.double() @ weight.double().T
    values, _ = logits.topk(64)
    torch.testing.assert_close(found.logits.cpu().double().sort(descending=True).values, values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.logsumexp.cpu().double(), logits.logsumexp(1), rtol=1e-5, atol=1e-5)


def test_the_noise_is_the_same_on_every_device():
    seeds = torch.arange(7) * 12345678901234567
    torch.testing.assert_close(
        gumbel_noise(seeds.to(DEVICE), 3, 999).cpu(), gumbel_noise(seeds, 3, 999), rtol=1e-5, atol=1e-5
    )
    logits = torch.randn(7, 999, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(0.8, top_p=0.9, top_k=50)
    assert torch.equal(sampler(logits.to(DEVICE), seeds.to(DEVICE), 1).cpu(), sampler(logits, seeds, 1))


@pytest.mark.parametrize("fused", [False, True])
def test_memory_given_and_taken_changes_no_step(fused):
    from types import SimpleNamespace

    from fastkd.turns import give_memory, take_memory

    def run(turns: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.Linear(512, 512)).to(DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
        worker = SimpleNamespace(causal_lm=model, optimizer=optimizer, device=torch.device(DEVICE))
        for step in range(3):
            model(torch.full((4, 512), 0.1 * step, device=DEVICE)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if turns:
                give_memory(worker)
                held = [*model.parameters(), *(s["exp_avg"] for s in optimizer.state.values())]
                assert all(one.device.type == "cpu" for one in held)
                take_memory(worker)
                assert all(one.device.type == DEVICE for one in model.parameters())
        return [one.detach().clone() for one in model.parameters()]

    assert all(torch.equal(one, other) for one, other in zip(run(True), run(False), strict=True))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_loop_learns_saves_and_resumes(tmp_path, precision):
    pytest.importorskip("omegaconf")
    pytest.importorskip("datasets")
    from pathlib import Path

    from fastkd import runner
    from fastkd.recipe import load_recipe

    recipe = Path(__file__).resolve().parents[1] / "recipes" / "arithmetic_cpu.yaml"
    settings = [
        f"cluster.gpus_per_node={0 if DEVICE == 'cpu' else 1}",
        f"logger.log_dir={tmp_path / 'run'}",
        f"policy.precision={precision}",
        "distillation.val_period=4",
        "checkpointing.save_period=4",
        "distillation.max_val_samples=64",
        "policy.dtensor_cfg.activation_checkpointing=true",
    ]
    runner.run(load_recipe(recipe, [*settings, "distillation.max_num_steps=4"]))
    runner.run(load_recipe(recipe, [*settings, "distillation.max_num_steps=8"]))
    from fastkd.metrics import read

    lines = read(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(9))
    assert all(line["train/loss"] > 0 and line["train/grad_norm"] > 0 for line in lines[1:])
    assert lines[0]["validation/teacher_accuracy"] > 0.9
    assert (tmp_path / "run" / "summary.json").exists()

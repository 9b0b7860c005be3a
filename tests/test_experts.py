"""Mixtures of experts in one process: the grouped products, NVFP4 experts, and what files hold of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
import yaml
from safetensors.torch import load_file
from torch.testing._internal.distributed.fake_pg import FakeStore

from fastkd import attention, experts, models, nvfp4_export, parallel, quantization
from fastkd._kernels.nvfp4 import global_scale
from fastkd._kernels.nvfp4_ops import fake_quantize
from fastkd.batch import pack
from fastkd.checks import check
from fastkd.config import Quantization
from fastkd.errors import ModelError, RecipeErrors, UserError
from fastkd.losses import PackedModel
from fastkd.models import packed_hidden
from fastkd.plan.layout import Mesh, read
from fastkd.plan.rates import load_rates
from fastkd.plan.shapes import published
from fastkd.plan.split import held
from fastkd.recipe import recipe_from
from fastkd.weight_sync import GLOO, Engines, Weights, WeightSender

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]


def mixture(kind: str = "Qwen3Moe", **changes):
    """Random: two blocks of 8 experts, of which a token uses 3."""
    settings = dict(
        vocab_size=101, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_experts=8, num_experts_per_tok=3, tie_word_embeddings=False, initializer_range=0.2,
        pad_token_id=None, max_position_embeddings=128,
    )  # fmt: skip
    if kind == "Qwen3Moe":
        settings |= dict(moe_intermediate_size=16, head_dim=8, norm_topk_prob=True)
    config = getattr(transformers, f"{kind}Config")(**{**settings, **changes})
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")._from_config(config, attn_implementation=attention.NAME)


def step(model, batch):
    """Hidden states and every gradient."""
    model.zero_grad()
    hidden = packed_hidden(model, batch)
    torch.manual_seed(1)
    (hidden.float() * torch.randn(hidden.shape)).sum().backward()
    return hidden.detach(), {name: p.grad.clone() for name, p in model.base_model.named_parameters()}


@pytest.mark.parametrize("kind", ["Qwen3Moe", "Olmoe"])
def test_the_products_are_those_of_transformers(kind, rollouts):
    model, batch = mixture(kind), pack(rollouts(6))
    model.set_experts_implementation("eager")
    wanted = step(model, batch)
    experts.adopt(model)
    assert model.config._experts_implementation == experts.NAME
    got = step(model, batch)
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-5, atol=1e-5)
    for name, gradient in wanted[1].items():
        assert (got[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    again = step(model, batch)
    assert all(torch.equal(again[1][name], gradient) for name, gradient in got[1].items())


def test_experts_that_no_token_chose(rollouts):
    model, batch = mixture(num_experts=64), pack(rollouts(1, longest=2))
    experts.adopt(model)
    hidden, gradients = step(model, batch)
    assert hidden.isfinite().all()
    gradient = gradients["layers.0.mlp.experts.down_proj"]
    used = gradient.flatten(1).any(1)
    assert 0 < used.sum() < 64 and gradient.isfinite().all()


def test_autocast_reaches_the_products(monkeypatch, rollouts):
    model, seen = mixture(), []
    experts.adopt(model)
    monkeypatch.setattr(F, "linear", lambda x, w, *b, real=F.linear: seen.append((x.dtype, w.dim())) or real(x, w, *b))
    with torch.autocast("cpu", torch.bfloat16):
        hidden = packed_hidden(model, pack(rollouts(2)))
    inside = [dtype for dtype, _ in seen if dtype == torch.bfloat16]
    assert len(inside) >= 2 * 2 * 8 and hidden.isfinite().all()


@pytest.mark.parametrize("copies", [1, 3])
def test_permuting_rows_and_back(copies):
    torch.manual_seed(0)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    order = torch.randperm(5 * copies)
    rows = experts.permute(x, order, copies=copies)
    assert torch.equal(rows, x.detach().repeat_interleave(copies, 0)[order])
    assert torch.equal(rows[experts.inverse(order)], x.detach().repeat_interleave(copies, 0))
    assert torch.autograd.gradcheck(lambda x: experts.permute(x, order, copies=copies), x)


def test_a_model_without_experts_stays_as_it_is(tiny_qwen3):
    model = tiny_qwen3()
    before = model.config._experts_implementation
    experts.adopt(model)
    assert model.config._experts_implementation == before and not list(experts.experts_of(model))


# ---------------------------------------------------------------- NVFP4


def calibrated(model, batch, preset="default", exclude=()):
    quantization.apply(model, Quantization(preset, exclude), torch.float32)
    if not quantization.quantizers_of(model).on:
        with quantization.calibrating(model):
            packed_hidden(model, batch)
    return model


def test_experts_compute_with_nvfp4_values(rollouts):
    """Against a plain model whose experts' weights are rounded one by one, and whose inputs are rounded before."""
    batch = pack(rollouts(6))
    model = calibrated(mixture(), batch, "experts_only")
    block = model.model.layers[0].mlp
    for own, fused in block.experts.quantizers.items():
        weight = block.experts.get_parameter(own)
        assert torch.equal(fused.weight_scale_2, global_scale(weight.detach().abs().amax((1, 2))))
        assert fused.input_scale.dim() == 0
    torch.manual_seed(0)
    x = torch.randn(7, 32)
    chosen, shares = torch.randint(0, 8, (7, 3)), torch.rand(7, 3)
    got = block.experts(x, chosen, shares)
    wanted = torch.zeros_like(x)
    first, second = (block.experts.quantizers[own] for own in experts.FUSED)
    for token in range(7):
        for expert, share in zip(chosen[token].tolist(), shares[token], strict=True):
            gate_up = fake_quantize(block.experts.gate_up_proj[expert], first.weight_scale_2[expert])
            down = fake_quantize(block.experts.down_proj[expert], second.weight_scale_2[expert])
            gate, up = (gate_up @ fake_quantize(x[token : token + 1], first.input_scale)[0]).chunk(2)
            inner = fake_quantize((F.silu(gate) * up)[None], second.input_scale)[0]
            wanted[token] += share * (down @ inner)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    hidden = torch.randn(3, 32)
    assert torch.equal(block.gate(hidden)[0], F.linear(hidden, block.gate.weight))  # the router is as it was


@pytest.mark.parametrize(
    ("preset", "exclude", "count"),
    [("experts_only", (), 2), ("mlp_only", (), 2), ("default", (), 10), ("default", ("experts",), 8)],
)
def test_which_layers_of_a_mixture(preset, exclude, count, rollouts):
    names = quantization.apply(mixture(), Quantization(preset, exclude), torch.float32)
    assert len(names) == count and not any(name.endswith("gate") for name in names)
    assert (f"model.layers.1.mlp.{'experts'}" in names) == (not exclude)


def test_inputs_of_experts_that_no_block_of_sixteen_divides():
    with pytest.raises(ModelError, match=r"mlp\.experts\.down_proj has 24 inputs, no multiple.*Add experts to"):
        quantization.apply(mixture(moe_intermediate_size=24), Quantization("experts_only"), torch.float32)


@pytest.mark.parametrize("preset", ["default", "weight_only"])
def test_packed_files_of_experts(preset, rollouts, tmp_path):
    """Codes and scales expert by expert; read back, they are what the experts multiplied with."""
    batch = pack(rollouts(4))
    model = calibrated(mixture(), batch, preset)
    nvfp4_export.export(model, tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.5.up_proj"
    module = model.model.layers[1].mlp.experts
    assert files[f"{name}.weight"].dtype == torch.uint8 and files[f"{name}.weight"].shape == (16, 16)
    gate = name.replace("up_proj", "gate_proj")
    wanted = module.quantizers["gate_up_proj"].weight_scale_2[5]
    assert files[f"{name}.weight_scale_2"] == files[f"{gate}.weight_scale_2"] == wanted
    assert (f"{name}.input_scale" in files) == (preset == "default")
    read = dict(nvfp4_export.dequantized(tmp_path, torch.float32))
    folded = quantization.fold(model, module.quantizers["gate_up_proj"], module.gate_up_proj)
    assert torch.equal(read[f"{name}.weight"], folded[5, 16:]) and torch.equal(read[f"{gate}.weight"], folded[5, :16])
    down = quantization.fold(model, module.quantizers["down_proj"], module.down_proj)
    assert torch.equal(read["model.layers.1.mlp.experts.0.down_proj.weight"], down[0])
    assert files["model.layers.0.mlp.gate.weight"].is_floating_point()
    ignored = json.loads((tmp_path / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    assert ignored == ["lm_head", "model.embed_tokens", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]


def test_a_mixture_trains_on_packed_tokens_and_samples(rollouts, tmp_path):
    """Loaded from the hub's format, packed or one by one, it is the model that transformers generates with."""
    mixture().save_pretrained(tmp_path)
    model = models.load_causal_lm("policy.model_name", str(tmp_path), dtype=torch.float32, device=CPU).eval()
    sequences = rollouts(5)
    with torch.no_grad():
        together = packed_hidden(model, pack(sequences))
        apart = torch.cat([packed_hidden(model, pack([one])) for one in sequences])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
    prompt = torch.tensor([sequences[0].prompt.tokens])
    out = model.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        scores = model.lm_head(model.model(out[:, :-1], use_cache=False).last_hidden_state)
    assert torch.equal(scores.argmax(-1)[0, prompt.shape[1] - 1 :], out[0, prompt.shape[1] :])


# ---------------------------------------------------------------- to engines


def test_experts_are_sent_one_by_one(monkeypatch):
    """The stream's names and values are those of the files. CPU engines are refused: theirs would be wrong."""
    model = mixture()
    stream = Weights(model, torch.bfloat16)
    sent = dict(stream)
    entries = {entry.name: entry for entry in stream.metadata()}
    assert list(sent) == list(entries)
    assert all((one.dtype, tuple(one.shape)) == entries[name][1:] for name, one in sent.items())
    fused = model.model.layers[0].mlp.experts.gate_up_proj.detach().bfloat16()
    assert torch.equal(sent["model.layers.0.mlp.experts.6.up_proj.weight"], fused[6, 16:])
    with pytest.raises(UserError, match=r"policy\.generation\.backend='vllm'.*wrong experts.*backend=transformers"):
        WeightSender(stream, Engines(lambda method, args: None, [1]), GLOO)


# ---------------------------------------------------------------- what a rank holds


@pytest.mark.parametrize(("tp", "ep"), [(4, 8), (4, 4), (1, 16), (4, 1)])
def test_a_ranks_share_of_qwen3_30b_a3b(tp, ep):
    """The plan counts what sharding leaves on a rank: 16 ranks, on meta tensors."""
    name = "Qwen/Qwen3-30B-A3B"
    entries = yaml.safe_load((ROOT / "fastkd" / "plan" / "shapes.yaml").read_text())
    config = next(entry["config"] for entry in entries if name in entry["names"])
    config = transformers.Qwen3MoeConfig(**config | {"num_hidden_layers": 2})
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM._from_config(config, attn_implementation=attention.NAME)
    experts.adopt(model)
    root = PackedModel(model)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=16)
    try:
        mesh = parallel.build_mesh(tp, 1, None, "cpu")
        parallel.shard(root, model, mesh, expert_parallel=ep, param_dtype=torch.bfloat16)
        held_here = sum(p.to_local().numel() for p in model.base_model.layers.parameters()) // 2
        inside = sum(p.to_local().numel() for _, one in experts.experts_of(model) for p in one.parameters())
    finally:
        dist.destroy_process_group()
    assert inside == 2 * 128 * 3 * 768 * 2048 // 16
    block = held(published()[name], Mesh(16, tp, 1, 16 // tp, 4, ep)).need("block")
    assert block.trained == held_here
    # Gathered for a moment: the experts of one set, and the rest of the block.
    assert block.gathered >= 128 * 3 * 768 * 2048 // ep


# ---------------------------------------------------------------- recipes


@pytest.fixture
def problems(tmp_path, monkeypatch):
    """problems(override, …): {key: message} of a recipe for 8 GPUs whose models have 6 experts."""
    monkeypatch.chdir(tmp_path)
    for name in ("SLURM_NNODES", "SLURM_JOB_NUM_NODES", "SLURM_GPUS_ON_NODE", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "model"
    mixture(num_experts=6, num_experts_per_tok=2).save_pretrained(folder)

    def find(*overrides):
        tree = {
            "distillation": {"num_prompts_per_step": 8, "val_period": 0, "topk_logits_k": 16},
            "policy": {"model_name": str(folder), "train_global_batch_size": 8, "max_total_sequence_length": 64},
            "teacher": {"model_name": str(folder)},
            "data": {"train": {"data_path": "org/data"}},
            "cluster": {"num_nodes": 2, "gpus_per_node": 4},
        }
        found = check(recipe_from(tree, overrides)).errors
        return {error.key: str(error) for error in found if "dtensor_cfg" in error.key}

    return find


EP = "dtensor_cfg.expert_parallel_size"


def test_recipes_whose_experts_do_not_divide(problems):
    assert problems(f"policy.{EP}=2") == {}
    for size, words in (
        (4, "must divide the model's 6 experts"),
        (3, "8 training devices do not divide into groups of 3"),
    ):
        found = problems(f"policy.{EP}={size}", f"teacher.{EP}=1")
        assert set(found) == {f"policy.{EP}"} and words in found[f"policy.{EP}"]
    assert set(problems(f"teacher.{EP}=4")) == {f"teacher.{EP}"}


def test_plans_of_experts_that_do_not_divide():
    tree = {
        "distillation": {"num_prompts_per_step": 8},
        "policy": {"model_name": "Qwen/Qwen3-30B-A3B", "train_global_batch_size": 8},
        "teacher": {"model_name": "Qwen/Qwen3-8B"},
        "data": {"train": {"data_path": "org/data"}},
        "cluster": {"num_nodes": 4, "gpus_per_node": 4},
    }
    asked = recipe_from(tree, [f"policy.{EP}=8", f"teacher.{EP}=1", "policy.dtensor_cfg.tensor_parallel_size=4"])
    layout = read(asked, load_rates())
    assert str(layout.train) == "TP4 DP4 EP8" and layout.score.ep == 1
    with pytest.raises(RecipeErrors, match=rf"teacher\.{EP}=2.*Qwen3-8B has no experts"):
        read(recipe_from(tree, [f"teacher.{EP}=2"]), load_rates())
    with pytest.raises(RecipeErrors, match=rf"policy\.{EP}=32.*128 experts .* and the 16 devices.*1, 2, 4, 8, 16"):
        read(recipe_from(tree, [f"policy.{EP}=32", f"teacher.{EP}=1"]), load_rates())

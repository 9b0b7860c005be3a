"""Quantised students in one process: which layers, calibration, gradients, training states, rollouts, the recipe."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastkd import block_compile, lora, quantization, train_state
from fastkd._kernels import nvfp4
from fastkd.batch import Prompt, pack
from fastkd.config import LoRA, Quantization
from fastkd.errors import ModelError, RecipeErrors
from fastkd.models import packed_hidden
from fastkd.quantization_choice import excluded, families
from fastkd.recipe import recipe_from
from fastkd.rollout import Generation, Request
from fastkd.sampling import Sampler
from fastkd.student import Student
from fastkd.teacher import Teacher

Q, MLP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp"


def quantized(model, preset="default", exclude=(), dtype=torch.float32):
    quantization.apply(model, Quantization(preset, tuple(exclude)), dtype)
    return model


def hidden(model, batch):
    return packed_hidden(model, batch)


def calibrated(model, batch, preset="default", exclude=(), dtype=torch.float32):
    quantized(model, preset, exclude, dtype)
    with quantization.calibrating(model):
        hidden(model, batch)
    return model


@pytest.fixture
def batch(rollouts):
    return pack(rollouts(5))


# ---------------------------------------------------------------- which layers

ATTENTION, FEED_FORWARD = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("preset", "exclude", "kinds"),
    [
        ("default", (), ATTENTION + FEED_FORWARD),
        ("weight_only", (), ATTENTION + FEED_FORWARD),
        ("mlp_only", (), FEED_FORWARD),
        ("default", ("o_proj", "*.mlp.*"), ATTENTION[:3]),
        ("mlp_only", ("mlp.down_proj",), FEED_FORWARD[:2]),
    ],
)
def test_presets_and_exclusions(tiny_qwen3, preset, exclude, kinds):
    model = tiny_qwen3(tied=False)
    names = quantization.apply(model, Quantization(preset, exclude), torch.float32)
    assert {name.rpartition(".")[2] for name in names} == set(kinds) and len(names) == 2 * len(kinds)
    assert names == [name for name, _ in quantization.quantized_layers(model)]
    assert all(
        hasattr(layer, "input_scale") == (preset != "weight_only") for _, layer in quantization.quantized_layers(model)
    )


def mixture(**changes):
    from transformers import MixtralConfig, MixtralForCausalLM

    settings = dict(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    return MixtralForCausalLM(MixtralConfig(**settings | changes))


def test_experts_in_one_tensor_are_an_error_not_an_omission():
    with pytest.raises(ModelError, match=r"experts holds its experts in one tensor.*quant_exclude_modules=\[experts\]"):
        quantized(mixture())
    model = mixture()
    names = quantization.apply(model, Quantization("default", ("experts",)), torch.float32)
    assert {name.rpartition(".")[2] for name in names} == set(ATTENTION)  # and not the router
    assert excluded(model, names) == ["lm_head", "model.embed_tokens", "model.layers.0.mlp*"]


class Experts(torch.nn.Module):
    """A feed-forward part whose experts are linear layers."""

    def __init__(self):
        super().__init__()
        self.gate = torch.nn.Linear(32, 2)
        make = torch.nn.ModuleDict
        self.experts = torch.nn.ModuleList(
            make({name: torch.nn.Linear(32, 32) for name in ("gate_proj", "up_proj", "down_proj")}) for _ in range(2)
        )


@pytest.mark.parametrize(("preset", "layers"), [("experts_only", 6), ("mlp_only", 9), ("default", 17)])
def test_experts_one_by_one(tiny_qwen3, preset, layers):
    model = tiny_qwen3()
    model.model.layers[1].mlp = Experts()
    names = quantization.apply(model, Quantization(preset), torch.float32)
    assert len(names) == layers and not any(name.endswith(".gate") for name in names)
    assert ["model.layers.1.mlp.experts.0.gate_proj", "model.layers.1.mlp.experts.0.up_proj"] in families(names)


def test_a_list_of_what_is_not_quantised(tiny_qwen3):
    model = tiny_qwen3(num_hidden_layers=11)
    names = quantization.apply(
        model, Quantization("default", ("*.layers.1.*", "layers.10.self_attn.k_proj")), torch.float32
    )
    found = excluded(model, names)
    assert found == [
        "lm_head", "model.embed_tokens", "model.layers.1.mlp*", "model.layers.1.self_attn*",
        "model.layers.10.self_attn.k_proj",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "exclude", "words"),
    [
        ("experts_only", (), "quant_cfg='experts_only': leaves no layer.*q_proj"),
        ("default", ("q_prj",), "quant_exclude_modules='q_prj': matches no module.*q_proj"),
        ("default", ("*_proj",), "quant_cfg='default': leaves no layer"),
    ],
)
def test_choices_that_leave_nothing(tiny_qwen3, preset, exclude, words):
    with pytest.raises(ModelError, match=words):
        quantized(tiny_qwen3(), preset, exclude)


def test_layers_that_cannot_be_quantised(tiny_qwen3):
    with pytest.raises(
        ModelError, match=r"down_proj has 40 inputs, no multiple of NVFP4's block of 16.*exclude_modules"
    ):
        quantized(tiny_qwen3(intermediate_size=40))
    quantized(tiny_qwen3(intermediate_size=40), exclude=["down_proj"])
    model = tiny_qwen3()
    lora.apply(model, LoRA(enabled=True))
    with pytest.raises(ModelError, match=r"q_proj is a AdaptedLinear.*without adapters"):
        quantized(model)


# ---------------------------------------------------------------- what they compute


def expected(model, batch):
    """The same model without our layers: every linear layer of the trunk replaced in a forward hook."""
    scales = {
        name: (m.weight_scale_2, getattr(m, "input_scale", None)) for name, m in quantization.quantized_layers(model)
    }

    def compute(name):
        def hook(module, args, out):
            weight, inputs = scales[name]
            x = args[0] if inputs is None else nvfp4.fake_quantize(args[0], inputs)
            return F.linear(x, nvfp4.fake_quantize(module.weight, weight))

        return hook

    handles = [m.register_forward_hook(compute(name)) for name, m in model.named_modules() if name in scales]
    with quantization.disabled(model):
        out = hidden(model, batch)
    for handle in handles:
        handle.remove()
    return out


@pytest.mark.parametrize("preset", ["default", "weight_only", "mlp_only"])
def test_layers_multiply_quantised_values(tiny_qwen3, batch, preset):
    plain = hidden(tiny_qwen3(), batch)
    model = calibrated(tiny_qwen3(), batch, preset)
    with torch.no_grad():
        assert torch.equal(hidden(model, batch), expected(model, batch))
        with quantization.disabled(model):
            assert torch.equal(hidden(model, batch), plain)
        difference = (hidden(model, batch) - plain).norm() / plain.norm()
        assert 0.01 < difference < 0.6
        with quantization.weights_alone(model):
            alone = (hidden(model, batch) - plain).norm() / plain.norm()
        assert alone == difference if preset == "weight_only" else alone < difference


def test_layers_that_read_one_input_quantise_it_once(tiny_qwen3, batch, monkeypatch):
    model = calibrated(tiny_qwen3(), batch)
    calls = []
    real = quantization.layers.fake_quantize
    monkeypatch.setattr(quantization.layers, "fake_quantize", lambda x, scale: calls.append(x.dim()) or real(x, scale))
    for _ in range(2):
        hidden(model, batch).sum().backward()
        assert calls.count(2) == 2 * 7 and calls.count(3) == 2 * 4  # weights, inputs
        assert not quantization.quantizers_of(model).inputs  # nothing is held
        calls.clear()
    # Another input of the same shape, a member that was left out: never what another input gave.
    attention = model.model.layers[0].self_attn
    first, second = torch.randn(2, 1, 3, 32)
    for x in (first, second):
        got = attention.k_proj(x)
        wanted = (
            real(x, attention.k_proj.input_scale) @ real(attention.k_proj.weight, attention.k_proj.weight_scale_2).T
        )
        torch.testing.assert_close(got, wanted)


def test_scales_are_those_of_the_largest_value_and_shared(tiny_qwen3, batch):
    model, seen = tiny_qwen3(), {}
    handles = [
        module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: args[0].abs().max()}))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    calibrated(model, batch)
    for handle in handles:
        handle.remove()
    layers = dict(quantization.quantized_layers(model))
    for name, layer in layers.items():
        torch.testing.assert_close(layer.input_scale, seen[name] / 2688, rtol=1e-6, atol=0)
    for parent, kinds in ((Q[:-7], ATTENTION[:3]), (MLP, FEED_FORWARD[:2])):
        family = [layers[f"{parent}.{kind}"] for kind in kinds]
        largest = max(layer.weight.abs().max() for layer in family)
        assert all(layer.weight_scale_2 == largest / 2688 for layer in family)
        assert len({layer.weight.abs().max().item() for layer in family}) == len(family)
    down = layers[f"{MLP}.down_proj"]
    assert down.weight_scale_2 == down.weight.abs().max() / 2688


def test_calibration_takes_the_largest_of_all_batches_and_keeps_no_graph(tiny_qwen3, rollouts):
    parts = [pack(rollouts(3, seed)) for seed in range(3)]
    scales = [calibrated(tiny_qwen3(), part).get_submodule(Q).input_scale for part in parts]
    assert len(set(map(float, scales))) == 3
    for order in (parts, parts[::-1]):
        model = quantized(tiny_qwen3())
        with quantization.calibrating(model):
            for part in order:
                assert not hidden(model, part).requires_grad
        assert model.get_submodule(Q).input_scale == max(scales)


def test_a_failed_calibration_changes_nothing(tiny_qwen3, batch):
    model = quantized(tiny_qwen3())
    with pytest.raises(KeyError), quantization.calibrating(model):
        raise KeyError
    assert not quantization.quantizers_of(model).on and quantization.quantizers_of(model).watched is None
    assert torch.equal(hidden(model, batch), hidden(tiny_qwen3(), batch))


def test_gradients_pass_straight_through(tiny_qwen3, batch):
    model = calibrated(tiny_qwen3(), batch)
    down = model.get_submodule(f"{MLP}.down_proj")
    x = torch.randn(3, 64, requires_grad=True)
    factor = torch.randn(3, 32)
    (down(x) * factor).sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(down.weight.grad, factor.T @ nvfp4.fake_quantize(x, down.input_scale))
        torch.testing.assert_close(x.grad, factor @ nvfp4.fake_quantize(down.weight, down.weight_scale_2))


def test_under_autocast_the_rounded_weights_are_quantised(tiny_qwen3, batch):
    model = calibrated(tiny_qwen3(), batch, dtype=torch.bfloat16)
    layer = model.get_submodule(Q)
    assert layer.weight_scale_2 * 2688 == max(
        model.get_submodule(f"{Q[:-6]}{kind}").weight.bfloat16().abs().max().float() for kind in ATTENTION[:3]
    )
    x = torch.randn(3, 32)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    wanted = F.linear(
        nvfp4.fake_quantize(x.bfloat16(), layer.input_scale),
        nvfp4.fake_quantize(layer.weight.detach().bfloat16(), layer.weight_scale_2),
    )
    assert out.dtype == torch.bfloat16 and torch.equal(out, wanted)


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_and_recomputed_blocks(tiny_qwen3, batch, recompute):
    gradients = []
    for change in (False, True):
        model = calibrated(tiny_qwen3(num_hidden_layers=1), batch)
        if change and recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        elif change:
            block_compile.compile_blocks(model, "aot_eager")
        model.train()
        hidden(model, batch).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) > 8
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- training states, rollouts, the student


def recipe(arithmetic, preset="default", **policy):
    return recipe_from(
        {
            "distillation": {"topk_logits_k": 16, "num_prompts_per_step": 8},
            "loss_fn": {"kl_type": "forward", "outside_topk": "bucket"},
            "policy": {
                "model_name": str(arithmetic / "teacher"),
                "precision": "float32",
                "max_total_sequence_length": 128,
                "train_global_batch_size": 8,
                "sequence_packing": {"enabled": True, "train_mb_tokens": 60},
                "optimizer": {"name": "torch.optim.AdamW", "kwargs": {"lr": 1e-3}},
                "quant_cfg": preset,
                **policy,
            },
            "teacher": {"model_name": str(arithmetic / "teacher")},
            "data": {"train": {"data_path": "unused.jsonl"}},
        }
    ).recipe


CPU = torch.device("cpu")


def test_the_student_learns_to_be_quantised(arithmetic, rollouts, tmp_path):
    config, sequences = recipe(arithmetic), rollouts(8)
    targets = Teacher(config, CPU, None).score(sequences)
    student = Student(config, CPU, None)
    assert student.needs_calibration and student.divergences(sequences, targets)["kl_forward"] < 1e-5
    with pytest.raises(AssertionError, match="calibrate"):
        student.train(sequences, targets)
    student.calibrate(sequences)
    before = student.divergences(sequences, targets)["kl_forward"]
    scales = {name: b.clone() for name, b in student.causal_lm.named_buffers() if quantization.is_scale(name)}
    for _ in range(12):
        student.train(sequences, targets)
    after = student.divergences(sequences, targets)["kl_forward"]
    assert before > 1e-3 and after < before / 2
    buffers = dict(student.causal_lm.named_buffers())
    assert len(scales) == 2 * 7 * 3 and all(torch.equal(buffers[name], value) for name, value in scales.items())

    student.save(tmp_path / "state", asynchronous=False)
    resumed = Student(config, CPU, None)
    resumed.load(tmp_path / "state")
    assert not resumed.needs_calibration
    assert resumed.divergences(sequences, targets) == student.divergences(sequences, targets)
    first, second = (one.train(sequences, targets) for one in (student, resumed))
    assert first == second


def test_a_state_without_scales_is_refused(arithmetic, rollouts):
    plain = Student(recipe(arithmetic, None), CPU, None)
    state = train_state.capture(plain.causal_lm, plain.optimizer, plain.scheduler, 0, room=True)
    with pytest.raises(KeyError, match="weight_scale_2"):
        Student(recipe(arithmetic), CPU, None).load_state_dict(state)


def test_rollouts_are_those_of_the_quantised_model(tiny_qwen3, batch):
    def sample(model):
        prompts = [Prompt(i, "", None, "", (3 * i + 1, 5)) for i in range(4)]
        generation = Generation(model, None, 6, 64, 4, stop_token_ids=[100])
        return [one.response for one in generation.sample(prompts, Request(Sampler(temperature=0.0)))]

    model = calibrated(tiny_qwen3(), batch)
    calls = []
    real = quantization.layers.fake_quantize
    try:
        quantization.layers.fake_quantize = lambda x, scale: calls.append(x.shape) or real(x, scale)
        got = sample(model)
    finally:
        quantization.layers.fake_quantize = real
    assert calls.count(torch.Size([32, 64])) == 2 + 2  # o_proj and down_proj of both blocks: each weight once
    plain = tiny_qwen3()
    with torch.no_grad():
        tokens = torch.tensor([[1, 5]])
        for _ in range(6):
            tokens = torch.cat((tokens, expected_next(model, tokens)), 1)
    assert got[0] == tuple(tokens[0, 2 : 2 + len(got[0])].tolist()) and got != sample(plain)


def expected_next(model, tokens):
    with quantization.weights_kept(model):
        out = model(input_ids=tokens, use_cache=False).logits[:, -1]
    return out.argmax(-1, keepdim=True)


def test_kept_weights_do_not_outlive_an_update(tiny_qwen3, batch):
    model = calibrated(tiny_qwen3(), batch)
    with torch.no_grad():
        with quantization.weights_kept(model):
            before = hidden(model, batch)
        model.get_submodule(Q).weight.mul_(-1)
        assert not torch.allclose(hidden(model, batch), before)
        with quantization.weights_kept(model):
            after = hidden(model, batch)
        assert torch.equal(after, hidden(model, batch)) and not torch.allclose(before, after)


# ---------------------------------------------------------------- the recipe

MINIMAL = {
    "policy": {"model_name": "org/student"},
    "teacher": {"model_name": "org/teacher"},
    "data": {"train": {"data_path": "org/data"}},
}


def test_nemo_rls_keys_load():
    keys = {
        "quant_cfg": "NVFP4_DEFAULT_CFG", "quant_calib_data": "cnn_dailymail", "quant_calib_size": 512,
        "quant_batch_size": 1, "quant_sequence_length": 2048, "quant_fold_frozen_weight_snap": False,
        "generation": {"quant_cfg": "NVFP4_DEFAULT_CFG"},
    }  # fmt: skip
    loaded = recipe_from(MINIMAL | {"policy": {"model_name": "org/student"} | keys})
    policy = loaded.recipe.policy
    assert policy.quantization == Quantization("default") and policy.quant_calib_data == "cnn_dailymail"
    assert {one.name for one in loaded.ignored} == {
        "policy.quant_batch_size", "policy.quant_fold_frozen_weight_snap", "policy.generation.quant_cfg"
    }  # fmt: skip
    assert not hasattr(loaded.recipe.teacher, "quant_cfg")
    assert recipe_from(MINIMAL).recipe.policy.quantization is None
    only = recipe_from(MINIMAL, ["policy.quant_cfg=W4A16_NVFP4_CFG", "policy.quant_exclude_modules=[o_proj]"])
    assert only.recipe.policy.quantization == Quantization("weight_only", ("o_proj",))
    assert not only.recipe.policy.quantization.activations


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("quant_cfg=NVFP4", "must be default, weight_only, mlp_only, experts_only, NVFP4_DEFAULT_CFG"),
        ("quant_calib_size=0", "must be above 0"),
        ("quant_exclude_modules=o_proj", "must be a list"),
    ],
)
def test_wrong_values(override, words):
    with pytest.raises(RecipeErrors, match=words):
        recipe_from(MINIMAL, [f"policy.{override}"])

"""Adapters in one process: equal to PEFT's, the base untouched, exports, names in the recipe, dropout."""

from __future__ import annotations

import json

import pytest
import torch

from fastkd import attention, block_compile, lora, lora_export, weights_export
from fastkd.batch import pack
from fastkd.config import LoRA
from fastkd.errors import ModelError, RecipeErrors
from fastkd.kernels import topk_kl, vocab_topk
from fastkd.models import head_weight, packed_hidden
from fastkd.recipe import recipe_from

KINDS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
SOME = {"target_modules": ["q_proj", "mlp.*", "*.layers.1.*"], "exclude_modules": ["*.layers.1.*.down_proj"]}


def adapted(model, *, seed=3, random_b=True, **config):
    """Adapters in use: B is random, as after some training."""
    lora.apply(model, LoRA(enabled=True, **config), seed=seed)
    if random_b:
        make = torch.Generator().manual_seed(7)
        for _, layer in lora.adapted_layers(model):
            with torch.no_grad():
                layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=make) * 0.1)
    return model.train()


@pytest.fixture
def batch(rollouts):
    return pack(rollouts(5))


def hidden(model, batch):
    return packed_hidden(model, batch).index_select(0, batch.active_A)


def loss(model, batch):
    make = torch.Generator().manual_seed(1)
    teacher = vocab_topk(
        torch.randn(len(batch.labels_A), 16, generator=make), torch.randn(101, 16, generator=make), k=7
    )
    weights = torch.full((len(batch.labels_A),), 1.0 / len(batch.labels_A))
    return topk_kl(hidden(model, batch), head_weight(model), teacher, kl="reverse", token_weights=weights).loss


# ---------------------------------------------------------------- against PEFT


@pytest.mark.parametrize("config", [{}, {"target_modules": ["q_proj", "v_proj"], "alpha": 5.5}, SOME])
@pytest.mark.parametrize("tied", [True, False])
def test_peft_loads_the_export_and_agrees(tiny_qwen3, batch, tmp_path, tied, config):
    peft = pytest.importorskip("peft")
    ours = adapted(tiny_qwen3(tied, attention_bias=True), dim=4, **config)
    lora_export.export(ours, tmp_path / "adapter", "org/base")
    base = tiny_qwen3(tied, attention_bias=True)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).train()

    a, b = loss(ours, batch), loss(base, batch)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    a.backward()
    b.backward()
    wanted = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): p.grad
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    got = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert got.keys() == wanted.keys() and len(got) >= 8
    for name, gradient in got.items():
        assert gradient.norm() > 0
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-7, msg=name)

    merged = theirs.merge_and_unload().state_dict()
    state = dict(lora_export.merged_state(ours))
    assert state.keys() == merged.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-6, atol=1e-6, msg=name)


def test_the_exported_folder(tiny_qwen3, tmp_path):
    model = adapted(tiny_qwen3(), dim=4, alpha=6)
    lora_export.export(model, tmp_path, "org/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 6, "org/base")
    assert set(config["target_modules"]) == KINDS
    from safetensors.torch import load_file

    state = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    assert len(state) == 2 * 7 * 2 and torch.equal(state[name], model.model.layers[1].mlp.down_proj.lora_B)


def test_short_names_are_exported_only_when_they_choose_the_same_layers(tiny_qwen3, tmp_path):
    model = adapted(tiny_qwen3(), target_modules=["*.layers.1.*.q_proj", "up_proj"])
    lora_export.export(model, tmp_path, "org/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {
        "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"
    }  # fmt: skip


# ---------------------------------------------------------------- the base


@pytest.mark.parametrize("tied", [True, False])
def test_only_adapters_are_trained(tiny_qwen3, batch, tied):
    model = adapted(tiny_qwen3(tied), random_b=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(8):
        value = loss(model, batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    assert losses[-1] < 0.8 * losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != lora.is_adapter(name), name
        assert parameter.requires_grad == lora.is_adapter(name)
    assert head_weight(model).grad is None
    assert (head_weight(model) is model.get_input_embeddings().weight) == tied


def test_disabled_is_the_base_bit_for_bit(tiny_qwen3, batch):
    base, model = tiny_qwen3(), adapted(tiny_qwen3())
    wanted, other = hidden(base, batch), hidden(model, batch)
    assert (other - wanted).abs().max() > 1e-3
    with lora.disabled(model):
        with lora.disabled(model):
            assert torch.equal(hidden(model, batch), wanted)
        assert torch.equal(hidden(model, batch), wanted)
    with pytest.raises(RuntimeError), lora.disabled(model):
        raise RuntimeError
    assert torch.equal(hidden(model, batch), other)
    with lora.disabled(base):  # no adapters: nothing to switch off
        assert torch.equal(hidden(base, batch), wanted)


def test_training_starts_at_the_base(tiny_qwen3, batch):
    assert torch.equal(hidden(adapted(tiny_qwen3(), random_b=False), batch), hidden(tiny_qwen3(), batch))


@pytest.mark.parametrize("tied", [True, False])
def test_merged_weights_in_a_plain_model(tiny_qwen3, batch, tied):
    model, plain = adapted(tiny_qwen3(tied), alpha=12, **SOME), tiny_qwen3(tied, seed=1)
    plain.load_state_dict(dict(lora_export.merged_state(model)))  # strict: the names of a plain model
    torch.testing.assert_close(hidden(plain, batch), hidden(model, batch), rtol=1e-5, atol=1e-5)
    base = tiny_qwen3(tied)
    untouched = dict(lora_export.merged_state(base))
    assert all(torch.equal(untouched[name], tensor) for name, tensor in base.state_dict().items())


def test_the_full_export_is_merged(tiny_qwen3, batch, tmp_path):
    from transformers import Qwen3ForCausalLM

    model = adapted(tiny_qwen3(), alpha=12)
    weights_export.export(model, tmp_path, torch.float32)
    plain = Qwen3ForCausalLM.from_pretrained(tmp_path, attn_implementation=attention.NAME)
    torch.testing.assert_close(hidden(plain, batch), hidden(model, batch), rtol=1e-5, atol=1e-5)


def test_merging_rounds_once(tiny_qwen3):
    exact, low = tiny_qwen3(), tiny_qwen3(dtype=torch.bfloat16)
    exact.load_state_dict({name: tensor.float() for name, tensor in low.state_dict().items()})
    exact, low = (dict(lora_export.merged_state(adapted(model))) for model in (exact, low))
    for name, tensor in low.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, exact[name].bfloat16()), name


def test_a_base_in_bfloat16_has_adapters_in_float32(tiny_qwen3, batch):
    model = adapted(tiny_qwen3(dtype=torch.bfloat16))
    out = hidden(model, batch)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == p.grad.dtype == torch.float32 and p.grad.norm() > 0 for p in trained)


def test_compiled_blocks_notice_that_adapters_are_off(tiny_qwen3, batch):
    base, model = tiny_qwen3(), adapted(tiny_qwen3())
    wanted, other = hidden(base, batch), hidden(model, batch)
    block_compile.compile_blocks(model, "eager")
    for _ in range(2):
        torch.testing.assert_close(hidden(model, batch), other)
        with lora.disabled(model):
            torch.testing.assert_close(hidden(model, batch), wanted)


# ---------------------------------------------------------------- starting values


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if lora.is_adapter(name)}


def test_starting_values_depend_on_seed_and_layer_alone(tiny_qwen3):
    every, one = (
        values(adapted(tiny_qwen3(), random_b=False, **config)) for config in ({}, {"target_modules": ["up_proj"]})
    )
    assert one.keys() < every.keys() and all(torch.equal(every[name], one[name]) for name in one)
    up = "model.layers.{}.mlp.up_proj.lora_A"
    assert not torch.equal(every[up.format(0)], every[up.format(1)])
    other = values(adapted(tiny_qwen3(), seed=4, random_b=False))
    assert not torch.equal(every[up.format(0)], other[up.format(0)])
    for name, value in every.items():
        if name.endswith("lora_B"):
            assert not value.any()
        else:  # uniform in ±1/√inputs
            bound = value.shape[1] ** -0.5
            assert 0.9 * bound < value.abs().max() <= bound
            assert abs(value.std() / bound - 3**-0.5) < 0.1


def test_from_meta(tiny_qwen3):
    with torch.device("meta"):
        model = tiny_qwen3()
    lora.apply(model, LoRA(enabled=True))
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    lora.initialise(model, 3)
    wanted = values(adapted(tiny_qwen3(), random_b=False))
    assert all(torch.equal(value, wanted[name]) for name, value in values(model).items())


def test_xavier(tiny_qwen3):
    model = adapted(tiny_qwen3(), random_b=False, dim=16, lora_A_init="xavier")
    A = model.model.layers[0].mlp.down_proj.lora_A
    assert A.shape == (16, 64) and abs(A.std() / (2 / (16 + 64)) ** 0.5 - 1) < 0.1


# ---------------------------------------------------------------- dropout


@pytest.mark.parametrize("position", ["pre", "post"])
def test_dropout(tiny_qwen3, batch, position):
    model = adapted(tiny_qwen3(), dropout=0.25, dropout_position=position)
    plain = adapted(tiny_qwen3())
    lora.set_step(model, 5)
    first, second = hidden(model, batch), hidden(model, batch)
    assert not torch.allclose(first, second) and not torch.allclose(first, hidden(plain, batch))
    lora.set_step(model, 5)
    assert torch.equal(hidden(model, batch), first)
    lora.set_step(model, 6)
    assert not torch.allclose(hidden(model, batch), first)
    model.eval()
    assert torch.equal(hidden(model, batch), hidden(plain, batch))


def test_dropout_scales_what_it_keeps():
    adapters = lora.Adapters(LoRA(dropout=0.25))
    dropped = lora._drop(torch.ones(200, 100), 0.25, lora.Term("layer", adapters), 0)
    assert abs((dropped == 0).float().mean() - 0.25) < 0.02
    torch.testing.assert_close(dropped.unique(), torch.tensor([0.0, 1 / 0.75]))
    other = lora._drop(torch.ones(200, 100), 0.25, lora.Term("other", adapters), 0)
    part = lora._drop(torch.ones(200, 100), 0.25, lora.Term("layer", adapters), 1)
    assert not torch.equal(dropped, other) and not torch.equal(dropped, part)


def test_recomputation_drops_the_same(tiny_qwen3, batch):
    gradients = []
    for recompute in (False, True):
        model = adapted(tiny_qwen3(), dropout=0.5)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        value = loss(model, batch)
        with torch.no_grad(), lora.disabled(model):
            hidden(model, batch)  # the teacher's pass, before backward
        value.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, wanted in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], wanted, msg=name)


# ---------------------------------------------------------------- choosing layers


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({}, 14),
        ({"match_all_linear": True}, 14),
        ({"target_modules": ["q_proj"]}, 2),
        ({"target_modules": ["self_attn.q_proj", "model.layers.1.mlp.up_proj"]}, 3),
        ({"target_modules": ["*_proj"]}, 14),
        ({"target_modules": ["*.layers.0.*"]}, 7),
        ({"exclude_modules": ["lm_head", "*down_proj"]}, 12),
    ],
)
def test_chosen_layers(tiny_qwen3, config, wanted):
    model = tiny_qwen3()
    names = lora.apply(model, LoRA(**config))
    assert len(names) == wanted and "lm_head" not in names
    assert names == [name for name, _ in lora.adapted_layers(model)]


@pytest.mark.parametrize(
    ("config", "key", "words"),
    [
        ({"target_modules": ["q_prj"]}, "target_modules='q_prj'", ["Did you mean q_proj?", "down_proj"]),
        ({"target_modules": ["q_proj", "attention.wq"]}, "target_modules='attention.wq'", ["q_proj, k_proj"]),
        ({"target_modules": ["lm_head"]}, "target_modules='lm_head'", ["lm_head gets no adapter", "q_proj"]),
        ({"target_modules": ["embed_tokens"]}, "target_modules='embed_tokens'", ["gets no adapter"]),
        ({"exclude_modules": ["lm_haed"]}, "exclude_modules='lm_haed'", ["Did you mean lm_head?"]),
        ({"exclude_modules": ["*_proj"]}, "exclude_modules=['*_proj']", ["no layer is left"]),
    ],
)
def test_names_that_match_nothing(tiny_qwen3, config, key, words):
    with pytest.raises(ModelError) as raised:
        lora.apply(tiny_qwen3(), LoRA(**config))
    text = str(raised.value)
    assert text.startswith(f"policy.dtensor_cfg.lora_cfg.{key}"), text
    assert all(word in text for word in words), text


def test_a_layer_of_another_kind(tiny_qwen3):
    class Quantised(torch.nn.Linear):
        pass

    model = tiny_qwen3()
    model.model.layers[0].mlp.up_proj.__class__ = Quantised
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj is a Quantised"):
        lora.apply(model, LoRA())


# ---------------------------------------------------------------- the recipe

MINIMAL = {
    "policy": {"model_name": "org/student"},
    "teacher": {"model_name": "org/teacher"},
    "data": {"train": {"data_path": "org/data"}},
}


def test_nemo_rls_keys_load():
    given = {
        "enabled": True, "target_modules": [], "exclude_modules": [], "match_all_linear": True, "dim": 16, "alpha": 32,
        "dropout": 0.0, "dropout_position": "post", "lora_A_init": "xavier", "use_triton": True,
    }  # fmt: skip
    sharding = {"tensor_parallel_size": 2, "lora_cfg": given}
    tree = MINIMAL | {"policy": {"model_name": "org/student", "dtensor_cfg": sharding}}
    loaded = recipe_from(tree)
    config = loaded.recipe.policy.dtensor_cfg.lora_cfg
    assert (config.enabled, config.dim, config.alpha, config.lora_A_init) == (True, 16, 32, "xavier")
    assert [key.name for key in loaded.ignored] == ["policy.dtensor_cfg.lora_cfg.use_triton"]
    # The teacher is sharded likewise, but has no adapters, and nobody is told that it has none.
    assert loaded.recipe.teacher.dtensor_cfg.tensor_parallel_size == 2
    assert not hasattr(loaded.recipe.teacher.dtensor_cfg, "lora_cfg")
    assert not recipe_from(MINIMAL).recipe.policy.dtensor_cfg.lora_cfg.enabled


def test_adapters_of_a_teacher_have_no_effect():
    loaded = recipe_from(MINIMAL, ["+teacher.dtensor_cfg.lora_cfg.enabled=true"])
    assert [str(key) for key in loaded.ignored] == ["teacher.dtensor_cfg.lora_cfg={…}: the teacher is frozen"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("dim=0", "must be above 0"),
        ("dropout=1.0", "must be below 1"),
        ("lora_A_init=gaussian", "uniform, xavier"),
        ("rank=8", "unknown key"),
        ("target_modules=q_proj", "must be a list"),
    ],
)
def test_wrong_values(override, words):
    with pytest.raises(RecipeErrors, match=words):
        recipe_from(MINIMAL, [f"policy.dtensor_cfg.lora_cfg.{override}"])


def test_all_layers_and_some_layers():
    overrides = ["match_all_linear=true", "target_modules=[q_proj]"]
    with pytest.raises(RecipeErrors, match=r"match_all_linear=True: target_modules=\['q_proj'\] chooses some"):
        recipe_from(MINIMAL, [f"policy.dtensor_cfg.lora_cfg.{one}" for one in overrides])

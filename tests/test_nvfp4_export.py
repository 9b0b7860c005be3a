"""Export of a quantised model: ModelOpt's tensors and JSON, and weights read back that are those of training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fastkd import attention, nvfp4_export, quantization, weight_sync, weights_export
from fastkd.batch import Prompt, Rollout, pack
from fastkd.config import Quantization
from fastkd.errors import ModelError
from fastkd.models import packed_hidden

GOLDEN = Path(__file__).with_name("data") / "nvfp4_golden.safetensors"


def golden_tensors(prefix):
    with safe_open(GOLDEN, "pt") as file:
        names = [name for name in list(file.keys()) if name.startswith(prefix)]
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names}


def golden_json(name):
    with safe_open(GOLDEN, "pt") as file:
        return json.loads(file.metadata()[name])


@pytest.fixture
def golden_model():
    """The model that modelopt exported."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    state = golden_tensors("model/")
    config = Qwen3Config(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen3ForCausalLM._from_config(config, attn_implementation=attention.NAME)
    model.load_state_dict(state)
    return model


def calibrated(model, tokens, preset="default", dtype=torch.float32, exclude=()):
    quantization.apply(model, Quantization(preset, tuple(exclude)), dtype)
    batch = pack([Rollout(Prompt(0, "", None, "", tuple(tokens)), 0, (0,), True, 0)])
    with quantization.calibrating(model):
        packed_hidden(model, batch)
    return model


@pytest.mark.parametrize("preset", ["default", "weight_only", "mlp_only"])
def test_modelopts_export_of_the_same_weights(golden_model, preset, tmp_path):
    model = calibrated(golden_model, range(31, -1, -1), preset)
    nvfp4_export.export(model, tmp_path)
    wanted = golden_tensors("model/") | golden_tensors(f"export/{preset}/")
    got = load_file(tmp_path / "model.safetensors")
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape, name
        if name.endswith("input_scale"):  # their attention sums in another order
            torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=0)
        else:
            assert torch.equal(got[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name
    for file, name in (("hf_quant_config.json", "hf_quant_config"), ("config.json", "config")):
        ours, theirs = json.loads((tmp_path / file).read_text()), golden_json(f"{preset}/{name}")
        ours = ours.get("quantization_config", ours)
        assert ours.pop("producer")["name"] == "fastkd" and theirs.pop("producer")["name"] == "modelopt"
        assert ours == theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_read_back_is_what_was_trained(tiny_qwen3, tied, dtype, tmp_path):
    model = calibrated(tiny_qwen3(tied), range(60), dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for step in range(3):
        tokens = torch.arange(40)[None] + step
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = model(input_ids=tokens, use_cache=False).logits
        out.float().log_softmax(-1)[0, :, 7].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    nvfp4_export.export(model, tmp_path, max_shard_bytes=6_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    read = dict(nvfp4_export.dequantized(tmp_path, dtype))
    layers = dict(quantization.quantized_layers(model))
    used, clipped = {}, 0
    real = quantization.layers.fake_quantize
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        for name, layer in layers.items():
            seen = []
            try:
                quantization.layers.fake_quantize = lambda x, scale, seen=seen: seen.append(real(x, scale)) or seen[-1]
                layer(torch.randn(2, layer.in_features))
            finally:
                quantization.layers.fake_quantize = real
            used[f"{name}.weight"] = seen[-1]
            clipped += int((layer.weight.abs() > layer.weight_scale_2 * 2688).sum())
    assert clipped > 0  # weights have grown since their scale was fixed
    for name, parameter in model.state_dict().items():
        if quantization.is_scale(name) or (tied and name == "lm_head.weight"):
            assert name not in read
        else:
            assert torch.equal(read.pop(name), used.get(name, parameter.to(dtype))), name
    assert not read


def test_plain_exports_and_syncs_are_folded(tiny_qwen3, tmp_path):
    from transformers import Qwen3ForCausalLM

    model = calibrated(tiny_qwen3(), range(60), "weight_only")
    weights_export.export(model, tmp_path / "plain", torch.float32)
    nvfp4_export.export(model, tmp_path / "packed")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    packed = dict(nvfp4_export.dequantized(tmp_path / "packed", torch.float32))
    sent = dict(weight_sync.Weights(model, torch.float32))
    assert plain.keys() == packed.keys() == sent.keys()
    assert all(torch.equal(plain[name], packed[name]) and torch.equal(sent[name], packed[name]) for name in plain)
    loaded = Qwen3ForCausalLM.from_pretrained(tmp_path / "plain", attn_implementation=attention.NAME)
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens, use_cache=False).logits, model(tokens, use_cache=False).logits)
    assert not torch.equal(loaded.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)


def test_an_export_before_calibration(tiny_qwen3, tmp_path):
    model = tiny_qwen3()
    quantization.apply(model, Quantization(), torch.float32)
    with pytest.raises(RuntimeError, match="not calibrated"):
        nvfp4_export.export(model, tmp_path)
    weights_export.export(model, tmp_path, torch.float32)  # as it is
    plain = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(plain[name], value) for name, value in tiny_qwen3().state_dict().items() if name in plain)


def test_a_missing_scale(tiny_qwen3, tmp_path):
    nvfp4_export.export(calibrated(tiny_qwen3(), range(60)), tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    name = next(one for one in state if one.endswith("weight_scale_2"))
    del state[name]
    from safetensors.torch import save_file

    save_file(state, file)
    with pytest.raises(ModelError, match=f"lacks the tensor '{name}'"):
        dict(nvfp4_export.dequantized(tmp_path, torch.float32))

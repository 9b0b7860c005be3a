"""Loading and export in one process: bit for bit what transformers does, and what is said when files are wrong."""

from __future__ import annotations

import json
import logging
import shutil
import stat
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from fastkd import attention, lora, models, weights, weights_export
from fastkd.config import LoRA
from fastkd.errors import CheckpointError, ModelError

CPU = torch.device("cpu")
KEY = "policy.model_name"
SIZES = dict(
    vocab_size=101, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.2, pad_token_id=3,
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
ARCHITECTURES = [
    ("Qwen3", {"tie_word_embeddings": True}),
    ("Qwen3", {"tie_word_embeddings": False}),
    ("Qwen2", {"tie_word_embeddings": True}),
    ("Llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    ("Olmo2", {}),
    ("Olmo3", {"sliding_window": 5}),
    ("Mistral", {"sliding_window": 5}),
    ("Gemma", {}),
    ("Gemma3", {"sliding_window": 5, "final_logit_softcapping": None}),  # two rotary embeddings, a scaled embedding
]


def random_model(kind: str = "Qwen3", **changes):
    config = getattr(transformers, f"{kind}{'Text' if kind == 'Gemma3' else ''}Config")(**{**SIZES, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")._from_config(config, attn_implementation=attention.NAME)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def load(folder, dtype=torch.float32):
    return models.load_causal_lm(KEY, str(folder), dtype=dtype, device=CPU)


def same(got, wanted):
    ours, theirs = dict(got.state_dict()), dict(wanted.state_dict())
    ours, theirs = ours | dict(got.named_buffers()), theirs | dict(wanted.named_buffers())
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and torch.equal(ours[name], value), name


@pytest.fixture
def folder(tmp_path) -> Path:
    """A tied Qwen3 in several files, as save_pretrained writes it."""
    random_model(tie_word_embeddings=True).save_pretrained(tmp_path / "model", max_shard_size=20_000)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 3
    return tmp_path / "model"


def change(folder: Path, edit) -> None:
    """Rewrite the tensors of a folder as one file."""
    tensors = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        file.unlink()
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


# ---------------------------------------------------------------- the same as transformers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "changes"), ARCHITECTURES)
def test_loading_is_from_pretrained_bit_for_bit(kind, changes, dtype, tmp_path):
    saved = random_model(kind, **changes)
    saved.generation_config.temperature, saved.generation_config.do_sample = 0.75, True
    saved.save_pretrained(tmp_path)
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, attn_implementation=attention.NAME)
    got = load(tmp_path, dtype)
    assert weights.stored_as_is(got)
    same(got, wanted)
    assert (got.lm_head.weight is got.get_input_embeddings().weight) == wanted.config.tie_word_embeddings
    assert got.config.to_dict() == wanted.config.to_dict()
    assert got.generation_config.to_dict() == wanted.generation_config.to_dict()
    assert not got.training and all(parameter.requires_grad for parameter in got.parameters())
    ids = torch.arange(3, 40)[None]
    assert torch.equal(got(ids).logits, wanted(ids).logits)

    got.save_pretrained(tmp_path / "theirs")
    weights_export.export(got, tmp_path / "ours", dtype)
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "ours" / name).read_text() == (tmp_path / "theirs" / name).read_text()


def test_several_files(folder):
    same(load(folder), random_model(tie_word_embeddings=True))


def test_a_hugging_face_id_from_the_cache(folder, tmp_path, monkeypatch):
    from huggingface_hub import constants

    snapshot = tmp_path / "hub" / "models--someone--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    same(load("someone/tiny"), random_model(tie_word_embeddings=True))
    next(snapshot.glob("*00002-of*")).unlink()
    with pytest.raises(ModelError, match=r"policy\.model_name='someone/tiny'.*names model-00002-of.*is missing"):
        load("someone/tiny")


def test_names_of_the_base_model_alone(folder):
    def edit(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    change(folder, edit)
    same(load(folder), random_model(tie_word_embeddings=True))


def test_offloaded_parameters_stay_in_host_memory(folder, monkeypatch):
    model = models.meta_causal_lm(KEY, str(folder), torch.float32)
    assert all(parameter.is_meta for parameter in model.parameters())
    devices = []
    monkeypatch.setattr(weights, "_restore_buffers", lambda model, device: devices.append(device))
    weights.load(model, KEY, str(folder), torch.device("cuda"), offload=True)
    assert devices == [torch.device("cuda")]  # the buffers go where the work is done
    for name, value in random_model(tie_word_embeddings=True).named_parameters():
        assert model.get_parameter(name).device == CPU and torch.equal(model.get_parameter(name), value)


def test_adapters_are_no_part_of_the_files(folder, tmp_path):
    model = models.meta_causal_lm(KEY, str(folder), torch.float32)
    lora.apply(model, LoRA(enabled=True, dim=2))
    weights.load(model, KEY, str(folder), CPU)
    lora.initialise(model, seed=0)
    plain = random_model(tie_word_embeddings=True)
    weights_export.export(model, tmp_path / "same", torch.float32)
    same(load(tmp_path / "same"), plain)  # B is zero at first

    layer = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B.fill_(0.5)
    weights_export.export(model, tmp_path / "merged", torch.float32)
    merged = load(tmp_path / "merged").model.layers[0].self_attn.q_proj.weight
    scale = lora.adapters_of(model).scale
    torch.testing.assert_close(merged, layer.weight + scale * layer.lora_B @ layer.lora_A)
    assert not torch.equal(merged, plain.model.layers[0].self_attn.q_proj.weight)


# ---------------------------------------------------------------- wrong files


def replace(name, value):
    return lambda tensors: tensors.update({name: value(tensors) if callable(value) else value})


def drop(name):
    return lambda tensors: tensors.pop(name)


NORM = "model.layers.1.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (drop(NORM), f"model.safetensors lack the tensor '{NORM}' of Qwen3ForCausalLM"),
        (replace(NORM, torch.zeros(64, 31)), rf"'{NORM}' in .*model.safetensors has shape \[64, 31\].*\[64, 32\]"),
        (replace(NORM, torch.zeros(64, 32).char()), f"'{NORM}' in .* holds I8 numbers.*bfloat16 or float32"),
        (
            replace("lm_head.weight", torch.zeros(101, 32)),
            "ties 'lm_head.weight' to 'model.embed_tokens.weight'.*model.safetensors stores other values"
            ".*tie_word_embeddings to false",
        ),
    ],
)
def test_wrong_tensors(folder, edit, words):
    change(folder, edit)
    with pytest.raises(ModelError, match=f"^policy.model_name='{folder}'.*{words}"):
        load(folder)


def test_a_tied_head_that_is_stored_too(folder):
    change(folder, replace("lm_head.weight", lambda tensors: tensors["model.embed_tokens.weight"].clone()))
    same(load(folder), random_model(tie_word_embeddings=True))
    change(folder, drop("model.embed_tokens.weight"))  # now under the head's name alone
    same(load(folder), random_model(tie_word_embeddings=True))


def test_an_untied_head_that_is_missing(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(ModelError, match=r"lack the tensor 'lm_head.weight'.*Set tie_word_embeddings to true"):
        load(folder)


def test_tensors_that_the_model_lacks_are_mentioned(folder, caplog, monkeypatch):
    change(folder, replace("model.layers.2.mlp.up_proj.weight", torch.zeros(2)))
    monkeypatch.setattr(logging.getLogger("fastkd"), "propagate", True)
    load(folder)
    assert "1 stored tensors are not in Qwen3ForCausalLM, as 'model.layers.2.mlp.up_proj.weight'" in caplog.text


INDEX = "model.safetensors.index.json"


def truncate(folder):
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])


def wrong_index(folder):
    index = json.loads((folder / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = files[files.index(index["weight_map"]["model.norm.weight"]) - 1]
    (folder / INDEX).write_text(json.dumps(index))


def only_pickles(folder):
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")


def nothing(folder):
    for file in folder.glob("model*"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "cannot load its weights .*model-00002-of-.*The file is incomplete or damaged"),
        (wrong_index, "cannot load its weights .*model-0.*model.norm.weight.*The file is incomplete or damaged"),
        (lambda folder: next(folder.glob("*00003-of*")).unlink(), "names model-00003-of-.*, which is missing"),
        (
            lambda folder: (folder / INDEX).write_text("{"),
            "cannot load its weights .*index.json",
        ),
        (
            lambda folder: (folder / INDEX).write_text("[]"),
            "cannot load its weights .*index.json",
        ),
        (only_pickles, r"pickled weights only \(pytorch_model.bin\).*save_pretrained\(folder\)"),
        (nothing, "neither model.safetensors nor model.safetensors.index.json.*Give a complete folder"),
    ],
)
def test_damaged_folders(folder, damage, words):
    damage(folder)
    with pytest.raises(ModelError, match=words):
        load(folder)


def test_a_configuration_that_is_no_language_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ModelError, match=r"cannot build its model.*Give a causal language model"):
        load(tmp_path)


def test_a_buffer_that_nothing_initialises(folder):
    model = models.meta_causal_lm(KEY, str(folder), torch.float32)
    model.model.norm.register_buffer("table", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(RuntimeError, match=r"does not initialise its buffer model\.norm\.table"):
        weights.load(model, KEY, str(folder), CPU)


def test_experts_one_by_one_in_files(tmp_path):
    """The hub's names, one tensor per expert: read slice by slice into fused tensors, and written as they were."""
    sizes = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    saved = random_model("Qwen3Moe", **sizes)
    saved.save_pretrained(tmp_path / "moe")
    got = load(tmp_path / "moe")
    same(got, saved)
    assert weights.stored_as_is(got)
    weights_export.export(got, tmp_path / "export", torch.bfloat16)
    original, exported = (load_file(tmp_path / name / "model.safetensors") for name in ("moe", "export"))
    assert original.keys() == exported.keys() and any("experts.3.up_proj" in name for name in exported)
    assert all(torch.equal(exported[name], original[name].bfloat16()) for name in original)
    assert json.loads((tmp_path / "export" / "config.json").read_text())["dtype"] == "bfloat16"
    again = load(tmp_path / "export")
    assert all(torch.equal(p, saved.get_parameter(n).bfloat16().float()) for n, p in again.named_parameters())
    gone = "model.layers.1.mlp.experts.2.up_proj.weight"
    save_file({n: t for n, t in original.items() if n != gone}, tmp_path / "moe" / "model.safetensors")
    with pytest.raises(ModelError, match=rf"lack the tensor '{gone}' of Qwen3MoeForCausalLM"):
        load(tmp_path / "moe")


def test_experts_that_files_name_fused(tmp_path):
    saved = random_model("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    weights_export.write_config(saved, tmp_path, torch.float32)
    save_file({name: p.detach().clone() for name, p in saved.named_parameters()}, tmp_path / "model.safetensors")
    same(load(tmp_path), saved)


def test_experts_that_transformers_merges(tmp_path):
    """Renamed as well: not read shard by shard. One process leaves them to transformers, with the files' names."""
    saved = random_model("Mixtral", num_local_experts=4, num_experts_per_tok=2)
    saved.save_pretrained(tmp_path / "moe")
    got = load(tmp_path / "moe")
    same(got, saved)
    assert not weights.stored_as_is(got)
    with pytest.raises(ModelError, match=r"MixtralForCausalLM hold other tensors.*Use one device"):
        weights.load(models.meta_causal_lm(KEY, str(tmp_path / "moe"), torch.float32), KEY, str(tmp_path / "moe"), CPU)
    weights_export.export(got, tmp_path / "export", torch.bfloat16)
    original, exported = (load_file(tmp_path / name / "model.safetensors") for name in ("moe", "export"))
    assert original.keys() == exported.keys() and any("experts.3.w3" in name for name in exported)
    assert all(torch.equal(exported[name], original[name].bfloat16()) for name in original)
    assert json.loads((tmp_path / "export" / "config.json").read_text())["dtype"] == "bfloat16"


# ---------------------------------------------------------------- export


@pytest.mark.parametrize("tied", [True, False])
def test_export_in_several_files(tied, tmp_path):
    model = random_model(tie_word_embeddings=tied)
    config = model.config.to_dict()
    weights_export.export(model, tmp_path, torch.bfloat16, max_shard_bytes=9000)
    files = sorted(tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert [file.name for file in files] == [
        f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)
    ]
    assert index["weight_map"].keys() == {name for name, _ in model.named_parameters()}
    assert index["metadata"]["total_parameters"] == model.num_parameters()
    assert index["metadata"]["total_size"] == 2 * model.num_parameters()
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == 0o644
        assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            for name in list(opened.keys()):
                assert index["weight_map"][name] == file.name
                assert torch.equal(opened.get_tensor(name), model.get_parameter(name).bfloat16()), name
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert model.dtype == torch.float32 and model.config.to_dict() == config
    ids = torch.tensor([[5, 6, 7]])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    expected = load(tmp_path, torch.bfloat16)
    tokens = [one.generate(ids, max_new_tokens=8, do_sample=False) for one in (loaded, expected)]
    assert loaded.dtype == torch.bfloat16 and torch.equal(*tokens)


def test_persistent_buffers_are_stored_and_loaded(folder, tmp_path):
    model = load(folder)
    model.model.norm.register_buffer("steps", torch.tensor(7))
    model.model.norm.register_buffer("scale", torch.tensor([0.1, 0.2]))
    weights_export.export(model, tmp_path / "export", torch.bfloat16)
    stored = load_file(tmp_path / "export" / "model.safetensors")
    assert stored["model.norm.steps"] == 7 and stored["model.norm.steps"].dtype == torch.int64
    assert torch.equal(stored["model.norm.scale"], torch.tensor([0.1, 0.2]).bfloat16())

    again = models.meta_causal_lm(KEY, str(tmp_path / "export"), torch.bfloat16)
    again.model.norm.register_buffer("scale", nn.Buffer(torch.empty(2, device="meta", dtype=torch.bfloat16)))
    weights.load(again, KEY, str(tmp_path / "export"), CPU)
    assert torch.equal(again.model.norm.scale, stored["model.norm.scale"])


def test_an_export_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write the model .*Not a directory.*Give a folder") as raised:
        weights_export.export(random_model(), tmp_path / "file" / "export", torch.float32)
    assert isinstance(raised.value.__cause__, OSError)

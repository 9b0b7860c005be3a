"""Loading refuses what the fused loss would get wrong, and pairs that do not share a vocabulary."""

import json

import pytest
import torch
from transformers import AutoConfig

from fastkd import attention, models
from fastkd.errors import ModelError

CPU = torch.device("cpu")


def test_loads_with_packed_attention_in_the_dtype_asked_for(arithmetic):
    model = models.load_causal_lm("policy.model_name", str(arithmetic / "student"), dtype=torch.bfloat16, device=CPU)
    assert model.config._attn_implementation == attention.NAME
    assert models.head_weight(model).dtype == torch.bfloat16
    assert models.head_weight(model) is model.get_input_embeddings().weight  # tied
    untied = models.load_causal_lm("teacher.model_name", str(arithmetic / "teacher"), dtype=torch.float32, device=CPU)
    assert models.head_weight(untied) is not untied.get_input_embeddings().weight


@pytest.mark.parametrize(
    "name, message",
    [
        ("./nowhere", "no such folder"),
        ("no-org/no-such-model", "cannot load its config.json"),
    ],
)
def test_a_missing_model_names_its_key(name, message):
    with pytest.raises(ModelError, match=message) as caught:
        models.load_config("teacher.model_name", name)
    assert caught.value.key == "teacher.model_name" and caught.value.value == name


def test_damaged_files_are_named(tmp_path, arithmetic):
    import shutil

    folder = tmp_path / "student"
    shutil.copytree(arithmetic / "student", folder)
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="cannot load its weights"):
        models.load_causal_lm("policy.model_name", str(folder), dtype=torch.float32, device=CPU)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"cannot load its config.json"):
        models.load_config("policy.model_name", str(folder))


def test_a_head_with_a_bias_or_soft_cap_is_refused(tiny_qwen3):
    model = tiny_qwen3(tied=False)
    models.check_head("policy.model_name", "x", model)
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ModelError, match="final_logit_softcapping"):
        models.check_head("policy.model_name", "x", model)
    model.config.final_logit_softcapping = None
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(101))
    with pytest.raises(ModelError, match="a bias"):
        models.check_head("policy.model_name", "x", model)


def test_padded_vocabularies_are_noticed(arithmetic):
    tokenizer = models.load_tokenizer("policy.tokenizer.name", str(arithmetic / "student"))
    config = AutoConfig.from_pretrained(arithmetic / "student")
    assert models.valid_vocab(tokenizer, config) is None
    config.vocab_size = 512
    assert models.valid_vocab(tokenizer, config) == len(tokenizer)


def test_vocabularies_that_differ_name_the_first_token(tmp_path, arithmetic):
    import shutil

    shutil.copytree(arithmetic / "teacher", tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    first, second = sorted(vocab, key=vocab.get)[50:52]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    path.write_text(json.dumps(content))
    student = models.load_tokenizer("policy.tokenizer.name", str(arithmetic / "student"))
    other = models.load_tokenizer("teacher.tokenizer.name", str(tmp_path / "other"))
    models.check_vocabularies(student, student, "a", "a")
    with pytest.raises(ModelError, match="2 tokens, first"):
        models.check_vocabularies(student, other, "student", "other")


def test_a_chat_template_from_the_recipe(arithmetic, tmp_path):
    (tmp_path / "template.jinja").write_text("<{{ messages[0].content }}>")
    for template in ("<{{ messages[0].content }}>", str(tmp_path / "template.jinja")):
        tokenizer = models.load_tokenizer("policy.tokenizer.name", str(arithmetic / "student"), template)
        assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<hi>"

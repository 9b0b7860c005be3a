"""Hugging Face causal language models: loading, and the one way to run them on packed sequences."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from fastkd import attention, experts, weights
from fastkd.batch import Batch
from fastkd.errors import ModelError, reason

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _from_pretrained(auto: Any, key: str, name: str, what: str, **kwargs: Any) -> Any:
    if _looks_local(name) and not Path(name).is_dir():
        raise ModelError(
            key,
            "no such folder",
            "Give a folder with config.json and safetensors, or a Hugging Face id",
            value=name,
        )
    try:
        return auto.from_pretrained(name, **kwargs)
    except Exception as error:  # OSError, ValueError, KeyError, SafetensorError, …: all mean unusable files
        raise ModelError(
            key,
            f"cannot load its {what} ({reason(error)})",
            "Give a folder that save_pretrained wrote, or a Hugging Face id that is cached or reachable "
            "(HF_HUB_OFFLINE=1 uses the cache alone)",
            value=name,
        ) from error


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()


def load_config(key: str, name: str) -> Any:
    """The model's configuration; ``key`` is the recipe key named in errors. Raises ModelError."""
    return _from_pretrained(AutoConfig, key, name, "config.json")


def load_tokenizer(key: str, name: str, chat_template: str | None = None) -> Any:
    """The tokenizer, with the recipe's chat template when it gives one. Raises ModelError."""
    tokenizer = _from_pretrained(AutoTokenizer, key, name, "tokenizer")
    if chat_template:
        path = Path(chat_template)
        tokenizer.chat_template = path.read_text() if path.is_file() else chat_template
    if tokenizer.eos_token_id is None:
        raise ModelError(
            key,
            "its tokenizer has no end-of-sequence token",
            "Set eos_token in tokenizer_config.json: responses must be able to end",
            value=name,
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def meta_causal_lm(key: str, name: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model of config.json with our packed attention, without memory: ``parallel.shard`` it, then ``weights.load``.

    Raises:
        ModelError: no such configuration, or a head that the fused loss cannot stand for (bias, soft-cap, scaling).
    """
    config = load_config(key, name)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention.NAME)
    except Exception as error:  # ValueError, KeyError, AttributeError, …: all mean an unusable configuration
        remedy = "Give a causal language model that this version of transformers knows"
        raise ModelError(key, f"cannot build its model ({reason(error)})", remedy, value=name) from error
    check_head(key, name, model)
    if weights.stored_as_is(model):
        experts.adopt(model)
    with suppress(OSError):  # without the file: what config.json says
        model.generation_config = GenerationConfig.from_pretrained(name)
    return model.eval()


def load_causal_lm(key: str, name: str, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A causal language model with our packed attention, on its device.

    Raises:
        ModelError: missing or unreadable, or a head that the fused loss cannot stand for.
    """
    model = meta_causal_lm(key, name, dtype)
    if weights.stored_as_is(model):
        weights.load(model, key, name, device)
        return model
    return _from_pretrained(
        AutoModelForCausalLM, key, name, "weights", dtype=dtype, attn_implementation=attention.NAME
    ).to(device)


def check_head(key: str, name: str, model: PreTrainedModel) -> None:
    """Refuse heads that do more than ``hidden @ weight.T``: the fused loss would be silently wrong on them."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ModelError(key, "the model has no linear LM head", "Give a causal language model", value=name)
    extras = [
        field
        for field in ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
        if getattr(model.config, field, None) not in (None, 1, 1.0)
    ]
    if head.bias is not None:
        extras.append("a bias")
    if extras:
        raise ModelError(
            key,
            f"its LM head applies {' and '.join(extras)}, which the fused loss does not compute",
            "Use a model whose logits are hidden @ weight.T (Qwen, Llama, OLMo, Mistral)",
            value=name,
        )


def head_weight(model: PreTrainedModel) -> Tensor:
    """[V, D] LM-head weight; the embedding itself when the two are tied."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    return head.weight


def packed_hidden(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Run the trunk on packed sequences, which do not see one another.

    Every packed call goes through here: ``use_cache=False``, no mask, and the lengths that our attention needs
    (``fastkd.attention`` says what happens without them).

    Returns:
        [N, D] hidden states after the final norm, ready for the head.
    """
    out = model.base_model(
        input_ids=batch.tokens_N[None],
        position_ids=batch.positions_N[None],
        attention_mask=None,
        use_cache=False,
        cu_seq_lens_q=batch.cu_seqlens,
        cu_seq_lens_k=batch.cu_seqlens,
        max_length_q=batch.max_seqlen,
        max_length_k=batch.max_seqlen,
        packed_lengths=batch.lengths,
        packed_context=batch.context,
    )
    return out.last_hidden_state[0]


def valid_vocab(tokenizer: Any, config: Any) -> int | None:
    """Real vocabulary rows when the embedding is padded beyond the tokenizer (Qwen: 151,669 of 151,936), else None.

    Padded rows carry no token: both sides leave them out of every softmax.
    """
    return len(tokenizer) if len(tokenizer) < config.vocab_size else None


def check_vocabularies(student: Any, teacher: Any, student_name: str, teacher_name: str) -> None:
    """The two tokenizers must give the same ids to the same tokens: the teacher's ids index the student's head.

    Raises:
        ModelError: naming the first token on which they differ.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    differing = sorted(
        (token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)),
        key=lambda token: (ours.get(token, 1 << 60), theirs.get(token, 1 << 60)),
    )
    token = differing[0]
    raise ModelError(
        "teacher.model_name",
        f"its vocabulary differs from the student's ({student_name}): {len(differing)} tokens, first {token!r} with id "
        f"{ours.get(token)} in the student and {theirs.get(token)} in the teacher",
        "Use models that share a tokenizer: top-k ids of the teacher index the student's LM head",
        value=teacher_name,
    )

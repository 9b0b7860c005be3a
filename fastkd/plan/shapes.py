"""Shapes of models: every tensor's size from config.json, or from the published shapes that are shipped.

Parameter counts are exact for the decoder families named in ``FAMILIES``: a model is an embedding, L blocks of
attention and gated MLP (or experts) with their norms, a final norm, and a head that may be the embedding. Another
``model_type`` is counted as such a decoder and marked ``assumed``.

Letters: D hidden, F MLP width, V vocabulary, d head size.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml

from fastkd.errors import ModelError
from fastkd.model_files import find_folder

Split = Literal["columns", "rows", "keys", "whole"]
"""How tensor parallelism cuts a tensor: by outputs, by inputs, by key/value heads (outputs; replicated where there are
fewer heads than ranks), or not at all."""


@dataclass(frozen=True, slots=True)
class Family:
    """What a ``model_type`` adds to the plain decoder."""

    qk_norm: Literal["", "head", "all"] = ""
    """Norms of queries and keys: none, of one head's size, or over all heads."""
    qkv_bias: bool = False
    """Always there; else as ``attention_bias`` says (which then means the output projection too)."""
    norms: int = 2
    """Of size D, per block."""
    gathered_attention: bool = False
    """Its tensor-parallel plan runs attention whole on every rank."""


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm="head"),
    "qwen3_moe": Family(qk_norm="head"),
    "olmo2": Family(qk_norm="all", gathered_attention=True),
    "olmo3": Family(qk_norm="all", gathered_attention=True),
    "gemma3_text": Family(qk_norm="head", norms=4),
}


@dataclass(frozen=True, slots=True)
class TensorShape:
    """One parameter."""

    name: str
    """Without the prefix of its block."""
    shape: tuple[int, ...]
    split: Split = "whole"

    @property
    def numel(self) -> int:
        """Its elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a causal language model."""

    name: str
    model_type: str
    hidden: int
    inner: int
    """Of a dense block's MLP."""
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    bias: bool = False
    """Attention's projections have one (``attention_bias``)."""
    experts: int = 0
    experts_per_token: int = 0
    expert_inner: int = 0
    assumed: bool = False
    """The family is unknown: counted as a plain gated decoder."""

    @property
    def family(self) -> Family:
        """What its ``model_type`` adds."""
        return FAMILIES.get(self.model_type, Family())

    def block(self) -> list[TensorShape]:
        """Parameters of one block."""
        D, d = self.hidden, self.head_dim
        queries, keys, family = self.heads * d, self.kv_heads * d, self.family
        found = [
            TensorShape("self_attn.q_proj.weight", (queries, D), "columns"),
            TensorShape("self_attn.k_proj.weight", (keys, D), "keys"),
            TensorShape("self_attn.v_proj.weight", (keys, D), "keys"),
            TensorShape("self_attn.o_proj.weight", (D, queries), "rows"),
        ]
        if family.qkv_bias or self.bias:
            found += [
                TensorShape("self_attn.q_proj.bias", (queries,), "columns"),
                TensorShape("self_attn.k_proj.bias", (keys,), "keys"),
                TensorShape("self_attn.v_proj.bias", (keys,), "keys"),
            ]
        if self.bias:
            found.append(TensorShape("self_attn.o_proj.bias", (D,)))
        if family.qk_norm:
            whole = family.qk_norm == "all"
            found += [
                TensorShape("self_attn.q_norm.weight", (queries if whole else d,)),
                TensorShape("self_attn.k_norm.weight", (keys if whole else d,)),
            ]
        if self.experts:
            E, F = self.experts, self.expert_inner
            found += [
                TensorShape("mlp.gate.weight", (E, D)),
                TensorShape("mlp.experts.gate_up_proj", (E, 2 * F, D), "columns"),
                TensorShape("mlp.experts.down_proj", (E, D, F), "rows"),
            ]
        else:
            found += [
                TensorShape("mlp.gate_proj.weight", (self.inner, D), "columns"),
                TensorShape("mlp.up_proj.weight", (self.inner, D), "columns"),
                TensorShape("mlp.down_proj.weight", (D, self.inner), "rows"),
            ]
        return found + [TensorShape(f"norm_{index}.weight", (D,)) for index in range(family.norms)]

    def ends(self) -> list[TensorShape]:
        """Embedding, final norm and, where it has weights of its own, the head."""
        rows = (self.vocab, self.hidden)
        found = [TensorShape("embed_tokens.weight", rows, "columns"), TensorShape("norm.weight", (self.hidden,))]
        return found if self.tied else [*found, TensorShape("lm_head.weight", rows, "columns")]

    @property
    def parameters(self) -> int:
        """All, a tied head counted once."""
        return self.layers * sum(one.numel for one in self.block()) + sum(one.numel for one in self.ends())

    @property
    def active_block_parameters(self) -> int:
        """Of one block, those a token is multiplied with (of experts, the chosen ones)."""
        total = sum(one.numel for one in self.block() if len(one.shape) > 1)
        idle = self.experts - self.experts_per_token
        return total - idle * 3 * self.hidden * self.expert_inner if self.experts else total

    def key_value_bytes(self, size: int) -> int:
        """Of one cached token with numbers of ``size`` bytes: 2 · layers · key/value heads · head size · size."""
        return 2 * self.layers * self.kv_heads * self.head_dim * size


def legal_tensor_degree(shape: Shape, tp: int) -> bool:
    """Whether a model can be split so: the rule of ``fastkd.tensor_plan.check_tensor_parallel``."""
    inner = shape.expert_inner if shape.experts else shape.inner
    rows = -(-shape.vocab // tp)
    return (
        shape.heads % tp == 0
        and inner % tp == 0
        and (shape.kv_heads % tp == 0 or tp % shape.kv_heads == 0)
        and (tp - 1) * rows < shape.vocab
    )


def from_config(config: dict[str, Any], name: str, key: str = "model") -> Shape:
    """The shape that a config.json describes.

    Raises:
        ModelError: it lacks a size.
    """
    # Models with several towers keep the language model's sizes one level down.
    sizes = {**config, **(config.get("text_config") or {})}

    def size(field: str, default: int | None = None) -> int:
        value = sizes.get(field, default)
        value = default if value is None else value
        if not isinstance(value, int) or value < 1:
            raise ModelError(
                key,
                f"its config.json has no usable {field} (got {value!r}), so its tensors cannot be counted",
                "Give a decoder of the Llama kind: Qwen, Llama, OLMo, Mistral",
                value=name,
            )
        return value

    heads, hidden, model_type = size("num_attention_heads"), size("hidden_size"), str(sizes.get("model_type", ""))
    experts = int(sizes.get("num_experts") or sizes.get("num_local_experts") or 0)
    return Shape(
        name=name,
        model_type=model_type,
        hidden=hidden,
        inner=size("intermediate_size"),
        layers=size("num_hidden_layers"),
        heads=heads,
        kv_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", hidden // heads),
        vocab=size("vocab_size"),
        tied=bool(sizes.get("tie_word_embeddings", config.get("tie_word_embeddings", model_type.startswith("gemma")))),
        bias=bool(sizes.get("attention_bias", False)),
        experts=experts,
        experts_per_token=size("num_experts_per_tok") if experts else 0,
        expert_inner=size("moe_intermediate_size", size("intermediate_size")) if experts else 0,
        assumed=model_type not in FAMILIES,
    )


@cache
def published() -> dict[str, Shape]:
    """The shapes that are shipped, by Hugging Face id."""
    entries = yaml.safe_load((files("fastkd.plan") / "shapes.yaml").read_text(encoding="utf-8"))
    return {name: from_config(entry["config"], name) for entry in entries for name in entry["names"]}


def find(key: str, name: str) -> Shape:
    """The shape of a model: of its config.json if there is one on this machine, else the published one.

    Args:
        key: the recipe key that names it, for errors.
        name: folder or Hugging Face id. A path into a Hugging Face cache that is not on this machine names an id too.

    Raises:
        ModelError: there is neither, or the config.json cannot be used.
    """
    folder = find_folder(name)
    path = folder / "config.json" if folder else None
    if path is not None and path.is_file():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(key, f"its config.json cannot be read ({error})", "Write it anew", value=name) from None
        return from_config(config if isinstance(config, dict) else {}, name, key)
    known = published()
    cached = re.search(r"models--([^/]+?)--([^/]+)", name)
    wanted = "/".join(cached.groups()) if cached else name.rstrip("/")
    for one in (wanted, next((id for id in known if id.split("/")[1] == Path(wanted).name), "")):
        if one in known:
            return known[one]
    short = {id.split("/")[1].lower(): id for id in known}
    near = difflib.get_close_matches(Path(wanted).name.lower(), short, n=1, cutoff=0.75)
    raise ModelError(
        key,
        "its sizes are not known: no config.json of it on this machine, and no published shape of that name",
        f"Did you mean {short[near[0]]}?"
        if near
        else "Give a folder with config.json (the weights are not needed), or one of "
        + ", ".join(sorted({id for id in known if not re.search(r"Base|Instruct|Thinking|Meta", id)})),
        value=name,
    )

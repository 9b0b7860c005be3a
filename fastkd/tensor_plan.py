"""The tensor-parallel plan of a transformers model: its plan strings, translated once, into what we do to each module.

transformers describes tensor parallelism by a string per module ("colwise", …) and the strings change between its
versions. ``STYLES`` is the one place that knows them; a string it does not know is an error, never a guess.

What each string does to a module is in ``fastkd.tensor_styles``. Experts are not split, whatever the plan says: they
are spread whole (``fastkd.expert_parallel``).

Attention of OLMo 2 and 3 has norms that span all heads: its plan gathers q, k and v, and every rank attends with all
heads. That is right but not faster, and the plan decides it, not we.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fastkd.errors import ModelError, UserError
from fastkd.experts import experts_of
from fastkd.tensor_styles import Columns, Embedding, Norm, OneHead, Rows, SharedInput, Style

# What each string of a transformers plan means; ``sp``: sequence parallelism. transformers 5.17 … 5.23 use these; only
# some of them have an entry for the embedding, which is split in any case.
STYLES: dict[str, Callable[[bool], Style]] = {
    "colwise": lambda sp: Columns(),
    "rowwise": lambda sp: Rows(sp),
    "colwise_gather_output": lambda sp: Columns(gather_output=True),
    "rowwise_split_input": lambda sp: Rows(sp, split_input=True),
    # q_norm and k_norm of [1, N, heads, head size] with the heads split (Qwen3, Gemma 3).
    "replicated_with_grad_allreduce": lambda sp: Norm(partial=True),
    "embedding_rowwise": lambda sp: Embedding(sp),
}

_EXPERTS = "moe_tp_experts"
_COLUMNS = ("colwise", "colwise_gather_output")


def apply_plan(causal_lm: Any, mesh: DeviceMesh, *, sequence_parallel: bool) -> None:
    """Make every parameter of the trunk a DTensor over ``mesh`` (one dimension), in place. The head is not touched.

    All ranks must hold the same weights, or all of them meta tensors: nothing is sent.

    Raises:
        ModelError: no plan, a string that ``STYLES`` lacks, or a linear layer that the plan leaves out.
    """
    trunk = causal_lm.base_model
    config = causal_lm.config.get_text_config()
    tp, kv_heads = mesh.size(), config.num_key_value_heads
    embedding = causal_lm.get_input_embeddings()
    strings = plan_strings(causal_lm)
    styles: dict[str, Style] = {}
    parents: set[str] = set()
    experts = {id(module) for _, module in experts_of(trunk)}
    for name, module in trunk.named_modules():
        if id(module) in experts:
            continue
        string = strings.get(name)
        if module is embedding:
            styles[name] = Embedding(sequence_parallel)
        elif string is not None:
            one_head = string == "colwise" and name.endswith((".k_proj", ".v_proj")) and kv_heads < tp
            styles[name] = OneHead(kv_heads) if one_head else STYLES[string](sequence_parallel)
            if string in _COLUMNS:
                parents.add(name.rpartition(".")[0])
        elif isinstance(module, nn.Linear):
            raise ModelError(
                f"model.{name}",
                f"{type(causal_lm).__name__}'s tensor-parallel plan leaves this layer out",
                "Use tensor_parallel_size=1 with this model",
            )
        elif any(id(one) in experts for one in trunk.get_submodule(name.rpartition(".")[0]).children()):
            styles[name] = Norm(partial=True)  # a router: every rank sends its own tokens
        elif any(True for _ in module.parameters(recurse=False)):
            # Norms between the blocks' parts. One inside attention without an entry sees all heads and all tokens.
            styles[name] = Norm(partial=sequence_parallel and ".self_attn." not in name)
    for name, style in styles.items():
        style.apply(trunk.get_submodule(name), mesh)
    for name in parents:
        module = trunk.get_submodule(name)
        SharedInput(sequence_parallel).apply(module, mesh)
        if hasattr(module, "num_key_value_groups") and strings.get(f"{name}.q_proj") == "colwise":
            module.num_key_value_groups = config.num_attention_heads // tp // max(kv_heads // tp, 1)


def plan_strings(causal_lm: Any) -> dict[str, str]:
    """Plan string of every module of the trunk that the model's plan names.

    Raises:
        ModelError: the model has no plan, or a string is unknown.
    """
    plan = causal_lm.config.get_text_config().base_model_tp_plan
    if not plan:
        raise ModelError(
            "model",
            f"transformers has no tensor-parallel plan for {type(causal_lm).__name__}",
            "Use tensor_parallel_size=1 with this model",
        )
    patterns = [(re.compile(key.replace(".", r"\.").replace("*", r"\d+")), value) for key, value in plan.items()]
    found = {}
    for name, _ in causal_lm.base_model.named_modules():
        for pattern, string in patterns:
            if pattern.fullmatch(name) and string != _EXPERTS:
                if string not in STYLES:
                    raise ModelError(
                        f"model.{name}",
                        f"the tensor-parallel plan of {type(causal_lm).__name__} says {string!r}, which is unknown "
                        f"here (known: {', '.join(STYLES)})",
                        "Use tensor_parallel_size=1, or a transformers version from 5.17 to 5.23",
                        value=string,
                    )
                found[name] = string
    return found


def check_tensor_parallel(config: Any, tp: int, key: str) -> None:
    """Whether a model of this configuration can be split over ``tp`` ranks. ``key`` is named in the error.

    Raises:
        UserError: with the sizes, and every degree that would do.
    """
    config = config.get_text_config()
    heads, kv_heads, inner = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    vocab = config.vocab_size

    def fits(n: int) -> bool:
        rows = -(-vocab // n)
        return (
            heads % n == 0
            and inner % n == 0
            and (kv_heads % n == 0 or n % kv_heads == 0)
            and (n - 1) * rows < vocab  # the last rank has vocabulary rows too
        )

    if tp < 1 or not fits(tp):
        raise UserError(
            key,
            f"does not divide a model of {heads} attention heads, {kv_heads} key/value heads, intermediate size "
            f"{inner} and {vocab} vocabulary rows: it must divide the heads and the intermediate size, and divide the "
            "key/value heads or be a multiple of them",
            f"Use one of {', '.join(str(n) for n in range(1, heads + 1) if fits(n))}",
            value=tp,
        )

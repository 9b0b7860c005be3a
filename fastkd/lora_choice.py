"""Which layers of a model get an adapter: the names in the recipe against the linear layers there are."""

from __future__ import annotations

import difflib
from typing import Any

from torch import nn

from fastkd.config import LoRA
from fastkd.errors import ModelError
from fastkd.module_names import matches

KEY = "policy.dtensor_cfg.lora_cfg"


def choose(causal_lm: Any, config: LoRA) -> list[str]:
    """Names of the layers that the recipe chooses, in the model's order.

    A pattern names a layer when it matches its full name, or an end of it that starts at a dot.

    Raises:
        ModelError: with the linear layers there are.
    """
    trunk, head = causal_lm.base_model, causal_lm.get_output_embeddings()
    inside = {id(module) for module in trunk.modules()}
    modules = {name: module for name, module in causal_lm.named_modules() if name}
    linear = {
        name: module
        for name, module in modules.items()
        if isinstance(module, nn.Linear) and module is not head and id(module) in inside
    }
    kinds = ", ".join(dict.fromkeys(_leaf(name) for name in linear))
    for pattern in config.target_modules:
        if not any(matches(pattern, name) for name in linear):
            raise _no_match("target_modules", pattern, modules, linear, kinds)
    for pattern in config.exclude_modules:
        # A recipe may well exclude the head, which gets no adapter anyway.
        if not any(matches(pattern, name) for name in modules):
            raise _no_match("exclude_modules", pattern, modules, linear, kinds)
    targets = config.target_modules or ["*"]
    names = [
        name
        for name in linear
        if any(matches(pattern, name) for pattern in targets)
        and not any(matches(pattern, name) for pattern in config.exclude_modules)
    ]
    if not names:
        raise ModelError(
            f"{KEY}.exclude_modules",
            f"no layer is left of {type(causal_lm).__name__}'s linear layers: {kinds}",
            "Exclude fewer",
            value=config.exclude_modules,
        )
    for name in names:
        if type(linear[name]) is not nn.Linear:
            raise ModelError(
                f"{KEY}.target_modules",
                f"{name} is a {type(linear[name]).__name__}; adapters are for plain linear layers",
                f"Write {KEY}.exclude_modules=[{_leaf(name)}]",
                value=config.target_modules,
            )
    return names


def _no_match(key: str, pattern: str, modules: Any, linear: Any, kinds: str) -> ModelError:
    others = [name for name in modules if matches(pattern, name)]
    if others:
        rule = f"{others[0]} gets no adapter: only the linear layers inside the blocks do"
        return ModelError(f"{KEY}.{key}", rule, f"Use some of {kinds}", value=pattern)
    known = {_leaf(name) for name in modules} if key == "exclude_modules" else {_leaf(name) for name in linear}
    near = difflib.get_close_matches(_leaf(pattern), sorted(known), n=1, cutoff=0.6)
    remedy = f"Did you mean {near[0]}?" if near and near[0] != _leaf(pattern) else "Name a layer, or give a pattern"
    return ModelError(f"{KEY}.{key}", f"matches no linear layer of the model, which has {kinds}", remedy, value=pattern)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]

"""Which layers of a model are quantised: a preset and the names in the recipe against the linear layers there are.

The presets are ModelOpt's. Left out of all of them: the LM head, embeddings and norms (not linear layers of a block),
and routers, whose few outputs decide where a token goes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from fastkd import expert_names
from fastkd._kernels.nvfp4 import BLOCK
from fastkd.config import Quantization
from fastkd.errors import ModelError
from fastkd.experts import FUSED, is_plain
from fastkd.module_names import matches

KEY = "policy.quant_cfg"
EXCLUDE = "policy.quant_exclude_modules"
ROUTERS = ("gate", "router", "shared_expert_gate")
"""Last part of a router's name."""
PARTS = {"mlp_only": ("mlp", "feed_forward", "block_sparse_moe"), "experts_only": ("experts",)}
"""A preset that takes some layers takes those with one of these parts in their names."""
FAMILIES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Layers of one module that read one input and that engines run as one layer: they share global scales."""


def choose(causal_lm: Any, config: Quantization) -> list[str]:
    """Names of the layers to quantise, in the model's order; of experts in one tensor the module that holds it.

    Raises:
        ModelError: with the linear layers there are.
    """
    trunk, head = causal_lm.base_model, causal_lm.get_output_embeddings()
    inside = {id(module) for module in trunk.modules()}
    modules = {name: module for name, module in causal_lm.named_modules() if name}
    fused = expert_names.pieces(causal_lm)
    for pattern in config.exclude_modules:
        if not any(matches(pattern, name) for name in modules):
            kinds = ", ".join(dict.fromkeys(_leaf(n) for n, m in modules.items() if isinstance(m, nn.Linear)))
            rule = f"matches no module of {type(causal_lm).__name__}, whose linear layers are {kinds}"
            raise ModelError(EXCLUDE, rule, "Name one of them, or drop it", value=pattern)
    names = []
    for name, module in modules.items():
        if id(module) not in inside or module is head or not _taken(name, config):
            continue
        if f"{name}.{FUSED[0]}" in fused and is_plain(module):
            _check_experts(name, module, config)
            names.append(name)
        elif any(parameter.dim() > 2 for parameter in module.parameters(recurse=False)):
            raise ModelError(
                KEY,
                f"{name} holds its experts in one tensor of a layout that is not quantised",
                f"Write {EXCLUDE}=[{_leaf(name)}] to leave them as they are",
                value=config.preset,
            )
        if isinstance(module, nn.Linear):
            _check(name, module, config)
            names.append(name)
    if not names:
        kinds = ", ".join(dict.fromkeys(_leaf(n) for n, m in modules.items() if isinstance(m, nn.Linear)))
        rule = f"leaves no layer of {type(causal_lm).__name__} to quantise; its linear layers are {kinds}"
        raise ModelError(KEY, rule, "Use default, or exclude fewer", value=config.preset)
    return names


def families(names: Iterable[str]) -> list[list[str]]:
    """The names in groups that share global scales; most are alone."""
    groups: dict[tuple[str, Any], list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        kind = next((members for members in FAMILIES if leaf in members), leaf)
        groups.setdefault((parent, kind), []).append(name)
    return list(groups.values())


def excluded(causal_lm: Any, quantized: Iterable[str]) -> list[str]:
    """What a checkpoint says is not quantised: module names, ``name*`` where that is all of a module with parts.

    Names of blocks are never shortened: "layers.1*" would mean layer 10 too.
    """
    taken = set(quantized)
    found: list[str] = []

    def visit(name: str, module: nn.Module) -> tuple[bool, list[str]]:
        """Whether nothing below is quantised, and the names that say so."""
        children = [visit(f"{name}.{own}" if name else own, child) for own, child in module.named_children()]
        below = [one for _, names in children for one in names]
        if name in taken:
            return False, []
        if not all(free for free, _ in children):
            return False, below
        if not children or any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)):
            whole = any(parameter.dim() > 1 for parameter in module.parameters())
            return True, [name] if whole else []
        shorten = bool(below) and bool(name) and not _leaf(name).isdigit() and not _holds_blocks(module)
        return True, [f"{name}*"] if shorten else below

    found += visit("", causal_lm)[1]
    return sorted(found)


def _holds_blocks(module: nn.Module) -> bool:
    return any(isinstance(one, nn.ModuleList) for one in module.modules())


def _taken(name: str, config: Quantization) -> bool:
    parts = name.split(".")
    wanted = PARTS.get(config.preset)
    return (
        parts[-1] not in ROUTERS
        and (wanted is None or any(part in wanted for part in parts))
        and not any(matches(pattern, name) for pattern in config.exclude_modules)
    )


def _check(name: str, layer: nn.Linear, config: Quantization) -> None:
    if type(layer) is not nn.Linear:
        rule = f"{name} is a {type(layer).__name__}; only plain linear layers are quantised"
        raise ModelError(KEY, rule, f"Add {_leaf(name)} to {EXCLUDE}, or train without adapters", value=config.preset)
    if layer.in_features % BLOCK:
        rule = f"{name} has {layer.in_features} inputs, no multiple of NVFP4's block of {BLOCK}"
        raise ModelError(KEY, rule, f"Add {_leaf(name)} to {EXCLUDE}", value=config.preset)


def _check_experts(name: str, module: Any, config: Quantization) -> None:
    for own in FUSED:
        inputs = module.get_parameter(own).shape[-1]
        if inputs % BLOCK:
            rule = f"{name}.{own} has {inputs} inputs, no multiple of NVFP4's block of {BLOCK}"
            raise ModelError(KEY, rule, f"Add {_leaf(name)} to {EXCLUDE}", value=config.preset)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]

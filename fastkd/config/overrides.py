"""Overrides on the command line: ``a.b=v``, ``+a.b=v``, ``++a.b=v``, ``~a.b``, list indices, lists and
mappings.

A value is read as YAML (``null``, ``1e-5``, ``[x, y]``, ``{k: v}``; ``{k:v}`` without the space too),
except where the key holds text: there it is taken as it stands, so ``{problem}`` or ``a: b`` need no extra
quotes. Whether the key exists is decided later, together with the keys of the files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import NoneType
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fastkd.config.base import items_of
from fastkd.config.inherit import merge
from fastkd.config.names import find, scalars
from fastkd.errors import RecipeError

_SET = re.compile(r"(?:\+\+|\+)?([A-Za-z_]\w*(?:\.[\w\-]+)*)=(.*)", re.DOTALL)
_GLUED = re.compile(r"""'[^']*'|"[^"]*"|([{,]\s*[\w.\-]+):(?=\S)""")
_RESET = re.compile(r"~([A-Za-z_]\w*(?:\.[\w\-]+)*)")


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> list[RecipeError]:
    """Apply overrides to a recipe mapping in place, left to right; returns what was wrong with them."""
    errors: list[RecipeError] = []
    for text in overrides:
        try:
            _apply(tree, text)
        except RecipeError as error:
            errors.append(error)
    return errors


def _apply(tree: dict[str, Any], text: str) -> None:
    if reset := _RESET.fullmatch(text):
        _reset(tree, reset[1].split("."))
    elif assignment := _SET.fullmatch(text):
        parts = assignment[1].split(".")
        _assign(tree, parts, _value(parts, assignment[2]))
    else:
        raise RecipeError(
            f"override {text!r}",
            "is not of the form key=value",
            "Write policy.model_name=Qwen/Qwen3-1.7B-Base, or ~logger.wandb_enabled to reset a key to its default",
        )


def _value(parts: list[str], text: str) -> Any:
    field = find(parts)
    kinds = scalars(field.annotation) if field is not None else {object}
    stripped = text.strip()
    quoted = len(stripped) > 1 and stripped[0] == stripped[-1] and stripped[0] in "'\""
    if kinds <= {str, NoneType} and not quoted:
        is_null = NoneType in kinds and stripped in ("null", "None", "~")
        return None if is_null else text
    if not stripped:
        return ""
    try:
        parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={_spaced(stripped)}"]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException):
        if object not in kinds:
            return text
        raise RecipeError(
            ".".join(parts),
            "the value cannot be read",
            "Write lists as [a, b], mappings as {k: v}, and quote text that holds brackets or colons",
            value=text,
        ) from None
    value = parsed["value"]
    return text if isinstance(value, dict) and object not in kinds else value


def _spaced(text: str) -> str:
    """Hydra's ``{k:v}`` as YAML's ``{k: v}``; quoted text is left alone."""
    return _GLUED.sub(lambda found: f"{found[1]}: " if found[1] else found[0], text) if "{" in text else text


def _assign(tree: dict[str, Any], parts: list[str], value: Any) -> None:
    node: Any = tree
    part: Any
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        here = ".".join(parts[:depth])
        if isinstance(node, list):
            part = _index(node, part, here, parts[depth:])
        elif not isinstance(node, dict):
            raise RecipeError(
                ".".join(parts),
                f"{here} is {node!r}, which holds no keys",
                f"Set the whole value: {here}=...",
            )
        if last:
            present = part in node if isinstance(node, dict) else True
            node[part] = merge(node[part], value) if present else value
            return
        present = node[part] if isinstance(node, list) else node.get(part)
        if present is None:
            field = find(parts[: depth + 1])
            is_list = field is not None and items_of(field.annotation) and parts[depth + 1].isdigit()
            node[part] = [] if is_list else {}
        node = node[part]


def _index(items: list[Any], part: str, here: str, rest: list[str]) -> int:
    if not part.isdigit():
        raise RecipeError(
            f"{here}.{part}",
            f"{here} is a list of {len(items)}",
            f"Name the entry: {here}.0.{'.'.join(rest)}",
        )
    if int(part) >= len(items):
        raise RecipeError(
            f"{here}.{part}",
            f"{here} has {len(items)} entries, counted from 0",
            f"Set the whole list: {here}=[...]",
        )
    return int(part)


def _reset(tree: dict[str, Any], parts: list[str]) -> None:
    node: Any = tree
    for depth, part in enumerate(parts[:-1]):
        if isinstance(node, list):
            node = node[_index(node, part, ".".join(parts[:depth]), parts[depth:])]
        elif isinstance(node, dict):
            node = node.get(part)
    if find(parts) is None and not (isinstance(node, dict) and parts[-1] in node):
        # Left in the tree as an unknown key, so that it is reported with a suggestion.
        _assign(tree, parts, None)
    elif isinstance(node, dict):
        node.pop(parts[-1], None)

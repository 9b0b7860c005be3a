"""The recipes that ship with the repository, and the names they have elsewhere.

``topk512_qwen3_4b`` is also ``distill_topk512_qwen3_4b`` and ``…/distill_topk512_qwen3_4b.v1.yaml``: folder, suffix,
version and the prefix ``distill_`` do not count.
"""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "recipes"

ALIASES: dict[str, tuple[str, ...]] = {
    "distill_1n4g": ("my-distillation-1n4g",),
    "32b_to_1.7b_1n4g": ("distillation-qwen3-32b-to-1.7b-base-1n4g-fsdp2tp1",),
    "32b_to_1.7b_1n8g": ("distillation-qwen3-32b-to-1.7b-base-1n8g-fsdp2tp1",),
    "14b_to_4b_2n4g": ("distillation-qwen3-14b-to-4b-2n4g-fsdp2tp1-long",),
    "32b_to_4b_2n4g": ("distillation-qwen3-32b-to-4b-2n4g-fsdp2tp1-long",),
    "32b_to_4b_2n8g": ("distillation-qwen3-32b-to-4b-base-2n8g-fsdp2tp2-long",),
    "32b_to_4b_2n8g_seqpack": ("distillation-qwen3-32b-to-4b-base-2n8g-fsdp2tp2-seqpack",),
    "32b_to_4b_3n4g_isolated": ("distillation-qwen3-32b-to-4b-3n4g-isolated",),
    "smoke_isolated_14b_to_4b": ("distillation-qwen3-14b-to-4b-3n4g-isolated-smoke",),
    "smoke_isolated_8b_to_4b": ("distillation-qwen3-8b-to-4b-3n4g-isolated-smoke",),
    "smoke_isolated_4b_to_1.7b": ("distillation-qwen3-4b-to-1.7b-3n4g-isolated-smoke",),
    "context_self_distill_1n4g": ("my-context-self-distillation-1n4g",),
    "context_self_distill_1p7b": ("context-self-distill-qwen3-1p7b-3n4g",),
    "context_self_distill_4b": ("context-self-distill-qwen3-4b-3n4g",),
    "context_self_distill_8b": ("context-self-distill-qwen3-8b-3n4g",),
    "context_self_distill_14b": ("context-self-distill-qwen3-14b-3n4g",),
}
"""Names in the runbooks, where they are more than the shipped name with a prefix or a version."""


def shipped() -> dict[str, Path]:
    """{name: file} of every shipped recipe; empty where the package was installed without its repository."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def aliases(name: str) -> tuple[str, ...]:
    """What a shipped recipe is also called, the runbooks' name first."""
    return ALIASES.get(name, ()) + ((f"distill_{name}",) if name.startswith("topk512_") else ())


def find_recipe(path: Path) -> Path:
    """The file meant: the path itself if it exists, else the shipped recipe of that name.

    Only where the path cannot be a slip of the user's own: a bare name, a file in recipes/, or one in a folder that
    does not exist here.
    """
    elsewhere = path.parent == Path() or not path.parent.is_dir() or path.parent.resolve() == FOLDER
    if path.is_file() or not elsewhere:
        return path
    name = re.sub(r"(\.v\d+)?(\.ya?ml)?$", "", path.name)
    known = shipped()
    for one in (name, name.removeprefix("distill_")):
        if one in known:
            return known[one]
    return next((known[own] for own, others in ALIASES.items() if name in others and own in known), path)

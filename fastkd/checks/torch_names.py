"""Rules of names that torch defines: optimizers and schedulers, read from its source without importing it."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from fastkd.checks.finding import Finding
from fastkd.errors import RecipeError
from fastkd.recipe import LoadedRecipe


def optimizer(loaded: LoadedRecipe) -> Iterator[Finding]:
    policy = loaded.recipe.policy
    yield from _known("policy.optimizer.name", policy.optimizer.name, "optim/__init__.py", "torch.optim")
    for number, entry in enumerate(policy.scheduler):
        if entry.name is not None:
            key, module = f"policy.scheduler.{number}.name", "torch.optim.lr_scheduler"
            yield from _known(key, entry.name, "optim/lr_scheduler.py", module)


def _known(key: str, name: str, file: str, module: str) -> Iterator[RecipeError]:
    names = _exported(file)
    short = name.rpartition(".")[2]
    if not names or short in names:
        return
    near = difflib.get_close_matches(short, names, n=1)
    remedy = f"Did you mean {module}.{near[0]}?" if near else f"Known are {', '.join(names)}"
    yield RecipeError(key, f"{module} has no such class", remedy, value=name)


@cache
def _exported(file: str) -> tuple[str, ...]:
    """Classes in ``__all__`` of a file of torch; empty where torch is not installed or has changed its layout."""
    spec = importlib.util.find_spec("torch")
    path = Path(spec.origin).parent / file if spec and spec.origin else None
    if path is None or not path.is_file():
        return ()
    found = re.search(r"^__all__ = (\[.*?\])", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    names = ast.literal_eval(found[1]) if found else ()
    return tuple(one for one in names if one[0].isupper() and one not in ("Optimizer", "LRScheduler"))

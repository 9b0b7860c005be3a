"""What a run was made with, for environment.json: versions, the state of the checkout, and the hardware.

Of the checkout the commit, the branch and the names of files that differ from the commit are recorded, so that somebody
can tell whether the commit alone gives the run again. No contents, and no remotes: their addresses may hold passwords.
"""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

NAMED = 50
"""Changed files that are named."""
_SECONDS = 20
"""A checkout on a slow file system is not waited for longer, by each command."""
_PACKAGES = ("fastkd", "torch", "triton", "transformers", "datasets", "safetensors")


def environment() -> dict[str, Any]:
    """Versions, state of the checkout and hardware of this process."""
    import torch

    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        **checkout(Path(__file__).resolve().with_name("__init__.py")),
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def checkout(file: Path) -> dict[str, Any]:
    """The state of the git checkout that a file of the code belongs to.

    Keys: ``commit``; ``branch``, None for a detached head; ``dirty``, whether anything differs from the commit, new
    files that are not ignored included; ``changed_files``, the first ``NAMED`` names of those, from the checkout's
    root; ``changed_count``, of all. Each is None where git cannot tell: without git, and for a package that is
    installed, even inside somebody else's checkout.
    """
    folder = file.parent
    if _git(folder, "ls-files", "--error-unmatch", "--", file.name) is None:
        return dict.fromkeys(("commit", "branch", "dirty", "changed_files", "changed_count"))
    changed = _changed(_git(folder, "status", "--porcelain=v1", "-z", "--untracked-files=all"))
    return {
        "commit": _line(_git(folder, "rev-parse", "--verify", "HEAD")),
        "branch": _line(_git(folder, "symbolic-ref", "--quiet", "--short", "HEAD")),
        "dirty": None if changed is None else bool(changed),
        "changed_files": None if changed is None else changed[:NAMED],
        "changed_count": None if changed is None else len(changed),
    }


def _changed(status: str | None) -> list[str] | None:
    if status is None:
        return None
    entries = iter(status.split("\0")[:-1])
    found = []
    for entry in entries:
        found.append(entry[3:])
        if entry[0] in "RC":  # a name that it had before follows
            next(entries)
    return found


def _line(text: str | None) -> str | None:
    return (text or "").strip() or None


def _git(folder: Path, *arguments: str) -> str | None:
    """What a git command prints; None when it fails or there is no git."""
    # Without optional locks it writes nothing, and disturbs no git command that somebody runs beside it.
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=False, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

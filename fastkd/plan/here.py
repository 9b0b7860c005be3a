"""Which GPU this machine has, in the words of the table of rates; asked of nvidia-smi, because torch loads slowly."""

from __future__ import annotations

import shutil
import subprocess

_DEVICES = {"GH200": "gh200", "B200": "b200", "H200": "h200", "H100": "h100", "A100": "a100-40"}
"""By what is in the name that nvidia-smi gives; A100 come with 80 GB too."""


def here() -> str:
    """This machine's GPU as the table of rates calls it; empty without one, or for another kind."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    name = told.partition("\n")[0]
    device = next((ours for theirs, ours in _DEVICES.items() if theirs in name), "")
    return "a100-80" if device == "a100-40" and "80GB" in name else device

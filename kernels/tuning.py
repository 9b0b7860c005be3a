"""Where the Triton kernels run, and the block sizes they run with.

Sizes come from this table, by architecture: nothing is tuned inside a training step, so the first step is as fast as
the thousandth and the same shape always runs the same program (and gives the same bits). Architectures that are not
listed use the entry of the newest one below them.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """Elements that one program handles at a time, and the warps it runs with."""

    block: int
    warps: int


# The sweeps over [c, V] are bound by memory: blocks as large as registers allow keep enough loads in flight. The sizes
# follow from the compiler's register counts (tests/test_triton_compile.py), not from timings: none was taken yet.
_BASE = {
    "poison": Tile(1024, 4),
    "tail_stats": Tile(4096, 8),
    "write_dlogits": Tile(4096, 8),
    "finish_rows": Tile(512, 4),
    "sum24": Tile(4096, 8),
    "nvfp4": Tile(256, 8),
    "lane_maxima": Tile(4096, 16),
    "lane_candidates": Tile(1024, 4),
    "select_rows": Tile(1024, 4),
}
# Compute capability (major · 10 + minor of the first chip of a generation): kernel: tile.
TABLE: dict[int, dict[str, Tile]] = {80: _BASE, 90: _BASE, 100: _BASE}


@functools.cache
def interpreting() -> bool:
    """Whether Triton interprets its kernels on the CPU (TRITON_INTERPRET=1, set before the first kernel)."""
    return os.environ.get("TRITON_INTERPRET") == "1" and _installed()


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def use_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether rows of ``dtype`` on ``device`` go to the Triton kernels: float32 on CUDA, or under the interpreter.

    Not on AMD GPUs, which torch calls "cuda" too: nothing was compiled for them.
    """
    if dtype != torch.float32:
        return False
    if device.type == "cpu":
        return interpreting()
    return device.type == "cuda" and torch.version.hip is None and _installed()


def tile(kernel: str, device: torch.device) -> Tile:
    """Tile of a kernel on a device; the interpreter, where every operation is a numpy call, uses the table of sm_90."""
    return TABLE[_architecture(device.index if device.type == "cuda" else None)][kernel]


@functools.cache
def _architecture(index: int | None) -> int:
    if index is None and not torch.cuda.is_available():
        return 90
    major, minor = torch.cuda.get_device_capability(index)
    known = [number for number in TABLE if number <= 10 * major + minor]
    return max(known, default=min(TABLE))


def on_device(device: torch.device) -> AbstractContextManager:
    """Makes ``device`` the current one: Triton launches there, wherever its arguments are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

"""The four passes over a chunk of rows, in torch or in Triton: one interface, chosen by device and dtype.

    logits → pick_poison → tail_stats → finish_rows → write_dlogits → dlogits

What the buffer holds between ``tail_stats`` and ``write_dlogits`` is the pair's own business: torch leaves
exponentials there, which saves it a sweep; Triton leaves the logits. ``exponents`` turns freshly computed logits into
that state, for the low-memory path. ``cap`` and ``pick`` are the small passes before: the soft-cap, and one logit per
row for the labels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from fastkd._kernels import row_finish, row_stats
from fastkd._kernels.tuning import use_triton


class RowPasses(NamedTuple):
    """See ``row_stats`` and ``row_finish`` for arguments and results."""

    cap: Callable
    pick: Callable
    pick_poison: Callable
    find_columns: Callable
    tail_stats: Callable
    exponents: Callable
    finish_rows: Callable
    write_dlogits: Callable
    kept_temporaries: int  # tensors of [c, K] alive at a time: they count towards a chunk
    narrows_in_place: bool  # bfloat16 dlogits take no memory beside the float32 logits


TORCH = RowPasses(
    row_stats.cap,
    row_stats.pick,
    row_stats.pick_poison,
    row_stats.find_columns,
    row_stats.tail_stats,
    row_stats.exponents,
    row_finish.finish_rows,
    row_stats.write_dlogits,
    kept_temporaries=12,
    narrows_in_place=False,
)


def row_passes(device: torch.device, dtype: torch.dtype) -> RowPasses:
    """The passes for logits of ``dtype`` (the compute dtype) on ``device``."""
    if not use_triton(device, dtype):
        return TORCH
    # Triton is imported when the first tensor asks for it: the package works without.
    from fastkd._kernels import triton_finish, triton_stats

    return RowPasses(
        triton_stats.cap,
        triton_stats.pick,
        triton_stats.pick_poison,
        triton_stats.find_columns,
        triton_stats.tail_stats,
        triton_stats.exponents,
        triton_finish.finish_rows,
        triton_stats.write_dlogits,
        kept_temporaries=5,
        narrows_in_place=True,
    )

"""Launches the exact top-K of ``triton_lanes``: sizes, scratch memory, four kernels in a row.

Letters: c rows, V columns, K kept.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from fastkd._kernels.rows import TopK
from fastkd._kernels.triton_lanes import lane_candidates, lane_maxima, select_rows, select_whole_row
from fastkd._kernels.tuning import tile

_LOG2_E = 1.0 / math.log(2.0)
# With K ≤ L / 2 about 1.4 K of L independent logits lie above the median lane maximum, so 2 K places are enough.
_LANES_PER_KEPT = 2
_MOST_LANES = 8192
# Blocks of a row in shared memory: the one being worked on and those on their way.
STAGES = 3


def lanes_for(k: int, block: int) -> int | None:
    """Lanes for K kept, ``block`` or, for large K, twice as many; None: too large a K for lanes."""
    for lanes in (block, 2 * block):
        if lanes <= _MOST_LANES and k * (_LANES_PER_KEPT if lanes > block else 2 * _LANES_PER_KEPT) <= lanes:
            return lanes
    return None


def lane_launch(warps: int, lanes: int, block: int, generation: int) -> dict[str, int]:
    """Launch options of ``lane_maxima`` on chips ``generation``.x; ``warps`` are those of ``block`` lanes."""
    warps = min(32, warps * max(1, lanes // block))
    # An SM has 65,536 registers: with 64 per thread two programs of 16 warps share it, and one streams while
    # the other reduces. Left alone, the compiler takes 100 for the reductions and a program has the SM to itself.
    # From generation 10 on, its schedule does not fit in 64 without spilling.
    return {"num_warps": warps} if warps > 16 or generation >= 10 else {"num_warps": warps, "maxnreg": 64}


def select_launch(warps: int, places: int, block: int) -> dict[str, int]:
    """Launch options of ``select_rows``; ``warps`` are those of ``block`` places."""
    return {"num_warps": min(32, warps * max(1, places // block))}


def places_for(k: int) -> int:
    """Survivors a row has room for, a power of 2."""
    return max(32, triton.next_power_of_2(2 * k))


def topk_rows(
    buffer: Tensor,
    columns: int,
    k: int,
    temperature: float = 1.0,
    softcap: float | None = None,
    *,
    lanes: int | None = None,
) -> TopK:
    """The exact K largest of each row of logits and both logsumexps; no memory of size [c, V], no synchronisation.

    Args:
        buffer: [c, ≥ columns] float32 raw logits, rows contiguous; read only. What lies behind ``columns`` is not read.
        columns: V, the ids that count.
        k: K, from 1 to V.
        temperature: T of the logsumexps.
        softcap: logit → softcap · tanh(logit / softcap), for the logsumexps. The function ascends, so raw logits decide
            what is kept, here and when ranks merge theirs; raw ones are returned. −inf stays −inf.
        lanes: a power of 2; left out, it comes from the tuning table.

    Returns:
        TopK with *local* columns [c, K] int32 that ascend, the lower id winning a tie; their logits [c, K];
        logsumexp [c], and tail_logsumexp [c] that is LOG_ZERO where the tail is empty or all −inf. A row that holds
        NaN has NaN in ``logsumexp`` and K columns that are in range.

    Raises:
        ValueError: the buffer is not float32 with contiguous rows, or k does not fit.
    """
    if buffer.dtype != torch.float32 or buffer.stride(1) != 1:
        raise ValueError(f"buffer is {buffer.dtype} with strides {buffer.stride()}: must be float32, contiguous rows")
    if not 1 <= k <= columns <= buffer.shape[1]:
        raise ValueError(f"k={k!r}, columns={columns!r}: must satisfy 1 ≤ k ≤ columns ≤ {buffer.shape[1]}")
    c, ld, device = buffer.shape[0], buffer.stride(0), buffer.device
    indices = torch.empty((c, k), dtype=torch.int32, device=device)
    kept = torch.empty((c, k), dtype=torch.float32, device=device)
    lse = torch.empty(c, dtype=torch.float32, device=device)
    tail_lse = torch.empty(c, dtype=torch.float32, device=device)
    result = TopK(indices, kept, lse, tail_lse)
    if c == 0:
        return result
    scale, inverse_temperature = _LOG2_E / temperature, 1.0 / temperature
    cap, capped = softcap or 1.0, softcap is not None

    stream = tile("lane_maxima", device)
    if lanes is None:
        lanes = lanes_for(k, stream.block)
    elif k > lanes:
        lanes = None
    counts = None
    if lanes is not None:
        places = places_for(k)
        values = torch.empty((c, places), dtype=torch.float32, device=device)
        ids = torch.empty((c, places), dtype=torch.int32, device=device)
        multi = torch.empty((c, places // 2), dtype=torch.int32, device=device)
        counts = torch.empty((c, 3), dtype=torch.int32, device=device)
        parts = torch.empty((c, 5), dtype=torch.float32, device=device)
        generation = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
        lane_maxima[(c,)](
            buffer, values, ids, multi, counts, parts, ld, columns, k, k + k // 16, scale, cap,
            LANES=lanes, PLACES=places, CAPPED=capped, STAGES=STAGES,
            **lane_launch(stream.warps, lanes, stream.block, generation),
        )  # fmt: skip
        gather = tile("lane_candidates", device)
        per_lane = triton.next_power_of_2(triton.cdiv(columns, lanes))
        lane_candidates[(c,)](
            buffer, values, ids, multi, counts, parts, ld, columns, scale, cap,
            LANES=lanes, PER_LANE=per_lane, BLOCK=max(gather.block, per_lane), PLACES=places, CAPPED=capped,
            num_warps=gather.warps,
        )  # fmt: skip
        select = tile("select_rows", device)
        select_rows[(c,)](
            values, ids, counts, parts, indices, kept, lse, tail_lse, columns, k, scale, inverse_temperature, cap,
            PLACES=places, WIDE=columns * places >= 2**31, CAPPED=capped,
            **select_launch(select.warps, places, select.block),
        )  # fmt: skip
    select_whole_row[(c,)](
        buffer, counts, indices, kept, lse, tail_lse, ld, columns, k, scale, inverse_temperature, cap,
        ALL=counts is None, BLOCK=stream.block, CAPPED=capped,
        num_warps=stream.warps,
    )  # fmt: skip
    return result

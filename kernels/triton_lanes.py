"""The exact K largest logits of each row and the logsumexp of the others, in one read of the row, as Triton programs.

Four launches, nothing asked of the device in between:

1. ``lane_maxima`` streams a row. Lane l of L sees the ids l, l + L, l + 2L, … and keeps its two largest logits, the id
   of the largest, and Σ exp over all but the largest. At least K lanes have a maximum ≥ θ for θ = the K-th largest
   lane maximum or a little less, so θ bounds the K-th largest logit from below. Lanes below θ go to the tail; lanes
   with just their maximum above it give that *survivor*, the rest goes to the tail; lanes with more are listed.
2. ``lane_candidates`` reads the listed lanes again (some thirty of 4,096 when K = 512), each logit of theirs being a
   survivor or part of the tail.
3. ``select_rows`` takes the K largest of the survivors (530 to 600), the lower id winning a tie, and sorts them by id.
4. ``select_whole_row`` does rows whose survivors overflow their place (constant rows, rows of period L), −inf among
   the K largest, or K too large for the lanes, by streaming the row about thirty times. Other programs exit at once.

The tail is a sum of positive terms everywhere, relative to its own largest logit: no difference, no underflow.
Lanes are strided because neighbouring ids have similar logits, which would crowd into few contiguous ones.

A threshold is found by bisection on the integers that order as the floats do (``_key``): count, halve, stop.

Letters: c rows, V columns, L lanes, K kept, S places for survivors. "max, sum" of a tail: its largest (soft-capped)
logit m, and Σ exp((logit − m) / T).
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastkd._kernels.rows import LOG_ZERO

# Below any logit that counts, and finite: a difference of two such values is 0, not NaN. Also what −inf sums up to.
_NONE = tl.constexpr(-1e38)
_EMPTY = tl.constexpr(LOG_ZERO)


@triton.jit
def _key(bits):
    """Maps the bits of floats to integers of the same order, and back."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _float(key):
    return _key(key).to(tl.float32, bitcast=True)


@triton.jit
def _bisect(values, low, high, count, K, MOST):
    """(low, high, how many values are ≥ each), from ``count`` ≥ low and none ≥ high, narrowed until K … MOST values

    are ≥ low, or low and high are neighbours.
    """
    count_high = tl.full((), 0, tl.int32)
    while (count > MOST) & (low + 1 < high):
        middle = (low & high) + ((low ^ high) >> 1)  # their mean; low + high would overflow
        found = tl.sum((values >= _float(middle)).to(tl.int32), 0)
        enough = found >= K
        low = tl.where(enough, middle, low)
        count = tl.where(enough, found, count)
        high = tl.where(enough, high, middle)
        count_high = tl.where(enough, count_high, found)
    return low, high, count, count_high


@triton.jit
def _capped(x, softcap, CAPPED: tl.constexpr):
    """softcap · tanh(x / softcap), to 2e-7 relative; −inf stays. Without a soft-cap, x."""
    if CAPPED:
        t = x * (1.0 / softcap)
        size = tl.abs(t)
        # 1 − 2 / (exp(2|t|) + 1) loses the digits of small t: there, t + t³ P(t²), a minimax fit on |t| < 0.55.
        large = 1.0 - 2.0 / (tl.exp2(size * 2.885390082) + 1.0)
        u = t * t
        p = ((0.01643753 * u - 0.05267178) * u + 0.13320724) * u - 0.33332947
        tanh = tl.where(size < 0.55, t + t * (u * p), tl.where(t < 0.0, -large, large))
        return tl.where(x <= _NONE, x, softcap * tanh)
    else:
        return x


@triton.jit
def _max_sum(x, belongs, scale):
    """Max and sum of the logits [S] that belong to the tail; NaN shows in the sum, −inf adds nothing."""
    m = tl.max(tl.where(belongs & (x > _NONE), x, _NONE), 0)
    terms = tl.where(x < _NONE, 0.0, tl.exp2((x - m) * scale))
    return m, tl.sum(tl.where(belongs, terms, 0.0), 0)


@triton.jit
def _merge(m, s, other_m, other_s, scale):
    """Max and sum of two parts."""
    largest = tl.where(other_m > m, other_m, m)
    return largest, s * tl.exp2((m - largest) * scale) + other_s * tl.exp2((other_m - largest) * scale)


@triton.jit
def _log(m, s, inverse_temperature):
    """logsumexp of a max and sum; that of no terms is LOG_ZERO."""
    return tl.where(s == 0.0, _EMPTY, m * inverse_temperature + tl.log(s))


@triton.jit
def _store_logs(row, lse, tail_lse, m, s, tail_m, tail_s, scale, inverse_temperature):
    tl.store(tail_lse + row, _log(tail_m, tail_s, inverse_temperature))
    m, s = _merge(m, s, tail_m, tail_s, scale)
    tl.store(lse + row, _log(m, s, inverse_temperature))


@triton.jit
def _push(x, block, first, block_of_first, second, others, scale, softcap, CAPPED: tl.constexpr):
    """One more logit for each lane: (first, its block, second, Σ exp(others − second)), one exponential per logit.

    ``first`` is raw, for selection; ``second``, the largest of the others, is soft-capped, for the sum.
    """
    new = x > first  # not ≥: of equal logits the lower id stays
    demoted = _capped(tl.where(new, first, x), softcap, CAPPED)  # NaN and −inf too
    first = tl.where(new, x, first)
    block_of_first = tl.where(new, block, block_of_first)
    larger = demoted > second
    e = tl.exp2(tl.abs(demoted - second) * -scale)
    others = others * tl.where(larger, e, 1.0) + tl.where(larger, 1.0, e)
    second = tl.where(larger, demoted, second)
    return first, block_of_first, second, others


# Logits are not taken for aligned: 4-byte loads leave the lanes where the scattered stores want them. With 16-byte
# loads those would exchange 32 KB of pointers through shared memory and spill at the two blocks an SM should hold.
@triton.jit(do_not_specialize=["logits", "ld"])
def lane_maxima(
    logits, values, ids, multi, counts, parts, ld, columns, K, MOST, scale, softcap,
    LANES: tl.constexpr, PLACES: tl.constexpr, CAPPED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program per row [V] → survivors (values, ids [c, S]), listed lanes (multi [c, S / 2]), and

    counts [c, 3] (survivors, listed lanes, whether the row overflows), parts [c, 5] (θ; max, sum of the tail so far;
    two places for ``lane_candidates``).
    """
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    start = logits + row * ld + lane
    first = tl.full((LANES,), _NONE, tl.float32)
    second = tl.full((LANES,), _NONE, tl.float32)
    others = tl.zeros((LANES,), tl.float32)
    block_of_first = tl.zeros((LANES,), tl.int32)
    blocks = columns // LANES
    for block in tl.range(0, blocks, num_stages=STAGES):
        x = tl.load(start + block * LANES)
        first, block_of_first, second, others = _push(
            x, block, first, block_of_first, second, others, scale, softcap, CAPPED
        )
    x = tl.load(start + blocks * LANES, mask=lane < columns - blocks * LANES, other=-float("inf"))
    first, block_of_first, second, others = _push(
        x, blocks, first, block_of_first, second, others, scale, softcap, CAPPED
    )

    low = _key(tl.min(first, 0).to(tl.int32, bitcast=True))
    high = _key(tl.max(first, 0).to(tl.int32, bitcast=True)) + 1
    low, _high, _count, _count_high = _bisect(first, low, high, tl.full((), LANES, tl.int32), K, MOST)
    theta = _float(low)

    # Each lane adds at most two terms: its maximum, and the others relative to the largest of them.
    below = first < theta
    capped = _capped(first, softcap, CAPPED)
    # Rounding may put the cap of a larger logit below that of θ; a lane listed without need costs nothing.
    several = ~below & (second >= _capped(theta, softcap, CAPPED) - (softcap * 4e-6 if CAPPED else 0.0))
    m = tl.max(tl.where(below, capped, tl.where(several, _NONE, second)), 0)
    # A lane of no or one logit holds its start value: a factor 0, through which NaN still shows.
    term = tl.where(below & (first > _NONE), tl.exp2((capped - m) * scale), 0.0)
    others *= (second > _NONE).to(tl.float32) * tl.exp2(tl.where(several, 0.0, second - m) * scale)
    tl.store(parts + row * 5, theta)
    tl.store(parts + row * 5 + 1, m)
    tl.store(parts + row * 5 + 2, tl.sum(term + tl.where(several, 0.0, others), 0))

    # Both counts in one scan: neither reaches 2¹⁶.
    packed = tl.where(several, 1 << 16, tl.where(below, 0, 1))
    total = tl.sum(packed, 0)
    singles, severals = total & 0xFFFF, total >> 16
    overflow = (singles + 2 * severals > PLACES) | (theta <= _NONE)
    tl.store(counts + row * 3, singles)
    tl.store(counts + row * 3 + 1, severals)
    tl.store(counts + row * 3 + 2, overflow.to(tl.int32))
    if not overflow:
        places = tl.cumsum(packed, 0) - packed
        single_place = places & 0xFFFF
        tl.store(values + row * PLACES + single_place, first, mask=packed == 1)
        tl.store(ids + row * PLACES + single_place, block_of_first * LANES + lane, mask=packed == 1)
        tl.store(multi + row * (PLACES // 2) + (places >> 16), lane, mask=packed > 1)


@triton.jit
def lane_candidates(
    logits, values, ids, multi, counts, parts, ld, columns, scale, softcap,
    LANES: tl.constexpr, PER_LANE: tl.constexpr, BLOCK: tl.constexpr, PLACES: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Read the listed lanes of a row, BLOCK / PER_LANE at a time; PER_LANE ≥ V / L, a power of 2."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(counts + row * 3 + 2) == 0:
        count = tl.load(counts + row * 3)
        severals = tl.load(counts + row * 3 + 1)
        theta = tl.load(parts + row * 5)
        step = tl.arange(0, BLOCK)
        m, s = tl.full((), _NONE, tl.float32), tl.full((), 0.0, tl.float32)
        for start in range(0, severals, BLOCK // PER_LANE):
            place = start + step // PER_LANE
            listed = place < severals
            lane = tl.load(multi + row * (PLACES // 2) + place, mask=listed, other=0)
            column = lane + step % PER_LANE * LANES
            inside = listed & (column < columns)
            x = tl.load(logits + row * ld + column, mask=inside, other=-float("inf"))
            survives = inside & (x >= theta)
            place = count + tl.cumsum(survives.to(tl.int32), 0) - 1
            kept = survives & (place < PLACES)
            tl.store(values + row * PLACES + place, x, mask=kept)
            tl.store(ids + row * PLACES + place, column, mask=kept)
            count += tl.sum(survives.to(tl.int32), 0)
            other_m, other_s = _max_sum(_capped(x, softcap, CAPPED), inside & ~survives, scale)
            m, s = _merge(m, s, other_m, other_s, scale)
        tl.store(counts + row * 3, count)
        tl.store(counts + row * 3 + 2, (count > PLACES).to(tl.int32))
        tl.store(parts + row * 5 + 3, m)
        tl.store(parts + row * 5 + 4, s)


@triton.jit
def select_rows(
    values, ids, counts, parts, indices, kept, lse, tail_lse, columns, K, scale, inverse_temperature, softcap,
    PLACES: tl.constexpr, WIDE: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """The K largest survivors of a row, by id, to indices and kept [c, K]; both logsumexps. WIDE: V · S ≥ 2³¹."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(counts + row * 3 + 2) == 0:
        count = tl.load(counts + row * 3)
        place = tl.arange(0, PLACES)
        valid = place < count
        x = tl.load(values + row * PLACES + place, mask=valid, other=-float("inf"))
        column = tl.load(ids + row * PLACES + place, mask=valid, other=0)

        low = _key(tl.load(parts + row * 5).to(tl.int32, bitcast=True))
        high = _key(tl.max(x, 0).to(tl.int32, bitcast=True)) + 1
        low, high, count, count_high = _bisect(x, low, high, count, K, K)
        border = _float(low)
        # More than K survivors ≥ border: those equal to it are kept up to the id that makes it K.
        level = valid & (x == border)
        last, before = columns - 1, tl.where(count > K, -1, columns - 2)
        while before + 1 < last:
            middle = (before + last) >> 1
            enough = count_high + tl.sum((level & (column <= middle)).to(tl.int32), 0) >= K
            last = tl.where(enough, middle, last)
            before = tl.where(enough, before, middle)
        chosen = (x > border) | (level & (column <= last))

        z = _capped(x, softcap, CAPPED)
        m, s = _max_sum(z, chosen, scale)
        tail_m, tail_s = _max_sum(z, valid & ~chosen, scale)
        tail_m, tail_s = _merge(tail_m, tail_s, tl.load(parts + row * 5 + 1), tl.load(parts + row * 5 + 2), scale)
        tail_m, tail_s = _merge(tail_m, tail_s, tl.load(parts + row * 5 + 3), tl.load(parts + row * 5 + 4), scale)
        _store_logs(row, lse, tail_lse, m, s, tail_m, tail_s, scale, inverse_temperature)

        # Ids are sorted with the places of their values below them; what was not chosen goes to the end.
        if WIDE:
            packed = tl.sort(tl.where(chosen, column.to(tl.int64) * PLACES + place, 0x7FFFFFFFFFFFFFFF))
        else:
            packed = tl.sort(tl.where(chosen, column * PLACES + place, 0x7FFFFFFF))
        out = place < K
        x = tl.load(values + row * PLACES + packed % PLACES, mask=out, other=0.0)
        tl.store(kept + row * K + place, x, mask=out)
        tl.store(indices + row * K + place, (packed // PLACES).to(tl.int32), mask=out)


@triton.jit
def select_whole_row(
    logits, counts, indices, kept, lse, tail_lse, ld, columns, K, scale, inverse_temperature, softcap,
    ALL: tl.constexpr, BLOCK: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """The same from all logits of a row, any K ≤ V: for rows that overflow (ALL: for every row). NaN sorts as +inf."""
    row = tl.program_id(0).to(tl.int64)
    wanted = True
    if not ALL:
        wanted = tl.load(counts + row * 3 + 2) != 0
    if wanted:
        step = tl.arange(0, BLOCK)
        start = logits + row * ld + step
        low, high = tl.full((), -0x7F800001, tl.int32), tl.full((), 0x7F800001, tl.int32)  # −inf, above +inf
        count, count_high = columns, tl.full((), 0, tl.int32)
        while (count > K) & (low + 1 < high):
            middle = (low & high) + ((low ^ high) >> 1)
            border = _float(middle)
            found = tl.zeros((BLOCK,), tl.int32)
            for first in range(0, columns, BLOCK):
                x = tl.load(start + first, mask=step < columns - first, other=-float("inf"))
                found += ((step < columns - first) & ~(x < border)).to(tl.int32)
            total = tl.sum(found, 0)
            enough = total >= K
            low = tl.where(enough, middle, low)
            count = tl.where(enough, total, count)
            high = tl.where(enough, high, middle)
            count_high = tl.where(enough, count_high, total)
        border = _float(low)
        quota = tl.where(count > K, K - count_high, columns)  # how many of those equal to the border are kept

        done, levels = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
        m, s = tl.full((), _NONE, tl.float32), tl.full((), 0.0, tl.float32)
        tail_m, tail_s = tl.full((), _NONE, tl.float32), tl.full((), 0.0, tl.float32)
        for first in range(0, columns, BLOCK):
            inside = step < columns - first
            x = tl.load(start + first, mask=inside, other=-float("inf"))
            sorts = tl.where(x == x, x, float("inf"))
            level = inside & (sorts == border)
            rank = levels + tl.cumsum(level.to(tl.int32), 0)
            chosen = (inside & (sorts > border)) | (level & (rank <= quota))
            place = row * K + done + tl.cumsum(chosen.to(tl.int32), 0) - 1
            z = _capped(x, softcap, CAPPED)
            tl.store(indices + place, first + step, mask=chosen)
            tl.store(kept + place, x, mask=chosen)
            done += tl.sum(chosen.to(tl.int32), 0)
            levels += tl.sum(level.to(tl.int32), 0)
            other_m, other_s = _max_sum(z, chosen, scale)
            m, s = _merge(m, s, other_m, other_s, scale)
            other_m, other_s = _max_sum(z, inside & ~chosen, scale)
            tail_m, tail_s = _merge(tail_m, tail_s, other_m, other_s, scale)
        _store_logs(row, lse, tail_lse, m, s, tail_m, tail_s, scale, inverse_temperature)

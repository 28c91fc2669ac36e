"""How often the magnitudes of a task vector's entries occur."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, types  # type: ignore[attr-defined]

from merging.kernels.loops import BFLOAT16, FLOAT16, FLOAT32, TILE
from merging.kernels.loops.compiling import LANES, from_float16, inner, lanes_beyond, lowest, popcount, stack_array
from merging.kernels.loops.rows import (
    MAGNITUDE,
    Array,
    Scalar,
    brain,
    halves,
    integers,
    moved,
    patterns,
    same,
    singles,
    widen,
)

_row, _before = stack_array(types.float32, TILE), stack_array(types.float32, TILE)


def histogram(
    base: int, base_kind: int, place: int, kind: int, first: int, last: int, dropped: int, counts: int
) -> int:
    """Counts the magnitudes of a task vector's entries by their bits but the last `dropped`, in `counts` [int64]."""
    row, before = carray(_row(), TILE), carray(_before(), TILE)
    bits, bins = row.view(np.uint32), integers(counts, 0, 1 << (31 - dropped))
    for start in range(first, last, TILE):
        n = min(TILE, last - start)
        widen(before, 0, base, base_kind, start, n)
        moved(row, before, place, kind, start, n)
        for i in range(n):
            bins[(bits[i] & MAGNITUDE) >> np.uint32(dropped)] += 1
    return 0


def _counting(wide: Callable[[Scalar], Scalar], beyond: Any) -> Callable[..., int]:
    """Counts a tile's entries within a band, pattern by pattern; gives the number of those above."""

    @inner
    def count(row: Array, before: Array, size: int, low: int, high: int, counts: Array) -> int:
        least, most = np.int32(low - 1), np.int32(high - 1)
        above, here = 0, 0
        while here < size:
            # behind the last whole look entries are looked at one by one
            masks = 0
            if here + LANES <= size:
                masks = beyond(row, before, here, least, most)
                above += popcount(masks >> LANES & 0xFFFFFFFF)
                inside = masks & ~(masks >> LANES) & 0xFFFFFFFF
                while inside:
                    one = here + lowest(inside)
                    delta = np.float32(wide(row[one]) - before[one])
                    counts[np.int64(delta.view(np.uint32) & MAGNITUDE) - low] += np.int32(1)
                    inside &= inside - 1
                here += LANES
            else:
                delta = np.float32(wide(row[here]) - before[here])
                key = np.int64(delta.view(np.uint32) & MAGNITUDE)
                if key >= high:
                    above += 1
                elif key >= low:
                    counts[key - low] += np.int32(1)
                here += 1
        return above

    return count


_count_singles, _count_brains, _count_halves = (
    _counting(same, lanes_beyond(FLOAT32)),
    _counting(brain, lanes_beyond(BFLOAT16)),
    _counting(from_float16, lanes_beyond(FLOAT16)),
)


def within(
    base: int,
    base_kind: int,
    rows: int,
    kinds: int,
    count: int,
    first: int,
    last: int,
    bands: int,
    rooms: int,
    above: int,
) -> int:
    """Counts, for each row, the entries whose magnitude's bits are in a band, pattern by pattern; and those above.

    Args:
        base: θ_0.
        base_kind: Its kind.
        rows: Where the addresses of θ_t are, int64 [T].
        kinds: Their kinds, int64 [T].
        count: T.
        first: Of the entries.
        last: Behind them.
        bands: For each row, the first bit pattern of its band and the one behind its last, int64 [T, 2].
        rooms: For each row, the address of how often each pattern of its band occurs, int32, to be added to, int64 [T].
        above: For each row, how many entries are above its band, to be added to, int64 [T].
    """
    p, k, room = integers(rows, 0, count), integers(kinds, 0, count), integers(rooms, 0, count)
    band, higher = integers(bands, 0, 2 * count), integers(above, 0, count)
    before = carray(_before(), TILE)
    for start in range(first, last, TILE):
        n = min(TILE, last - start)
        widen(before, 0, base, base_kind, start, n)
        for t in range(count):
            low, high = band[2 * t], band[2 * t + 1]
            counts = patterns(room[t], 0, high - low)
            if k[t] == BFLOAT16:
                higher[t] += _count_brains(halves(p[t], start, n), before, n, low, high, counts)
            elif k[t] == FLOAT16:
                higher[t] += _count_halves(halves(p[t], start, n), before, n, low, high, counts)
            else:
                higher[t] += _count_singles(singles(p[t], start, n), before, n, low, high, counts)
    return 0

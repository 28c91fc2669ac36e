"""How often the magnitudes of a task vector's entries occur."""

import numpy as np
from numba import carray, types  # type: ignore[attr-defined]

from merging.methods.loops import BRAIN, TILE
from merging.methods.loops.compiling import LANES, lanes_within, lowest, room_for
from merging.methods.loops.rows import MAGNITUDE, Scalar, brain, halves, integers, patterns, widen

_row, _before = room_for(types.float32, TILE), room_for(types.float32, TILE)


def histogram(
    base: int, base_kind: int, place: int, kind: int, first: int, last: int, dropped: int, counts: int
) -> int:
    """Counts the magnitudes of a task vector's entries by their bits but the last `dropped`, in `counts` [int64]."""
    row, before = carray(_row(), TILE), carray(_before(), TILE)
    bits, bins = row.view(np.uint32), integers(counts, 0, 1 << (31 - dropped))
    for start in range(first, last, TILE):
        n = min(TILE, last - start)
        widen(before, 0, base, base_kind, start, n)
        widen(row, 0, place, kind, start, n)
        for i in range(n):
            row[i] -= before[i]
        for i in range(n):
            bins[(bits[i] & MAGNITUDE) >> np.uint32(dropped)] += 1
    return 0


def within(
    base: int, base_kind: int, place: int, kind: int, first: int, last: int, low: int, high: int, counts: int
) -> int:
    """Counts the entries whose magnitude's bits are in [low, high), pattern by pattern; and those above.

    Args:
        base: θ_0.
        base_kind: Its kind.
        place: θ_t.
        kind: Its kind.
        first: Of the entries.
        last: Behind them.
        low: First bit pattern of the band.
        high: Behind its last.
        counts: How often each pattern of the band occurs, int32 [high − low], to be added to.

    Returns:
        How many entries are above.
    """
    row, before = carray(_row(), TILE), carray(_before(), TILE)
    bits, found = row.view(np.int32), patterns(counts, 0, high - low)
    least, most = np.int32(low - 1), np.int32(high - 1)
    above = 0
    for start in range(first, last, TILE):
        n = min(TILE, last - start)
        widen(before, 0, base, base_kind, start, n)
        if kind == BRAIN:
            stored = halves(place, start, n)
            for i in range(n):
                row[i] = brain(stored[i]) - before[i]
        else:
            widen(row, 0, place, kind, start, n)
            for i in range(n):
                row[i] -= before[i]
        higher: Scalar = np.int32(0)
        for i in range(n):
            magnitude = np.int32(bits[i] & np.int32(MAGNITUDE))
            bits[i] = magnitude
            higher = np.int32(higher + np.int32(magnitude > most))
        above += higher
        for i in range(n, (n + LANES - 1) // LANES * LANES):
            bits[i] = np.int32(-1)
        for some in range(0, n, LANES):
            inside = lanes_within(bits, some, least, most)
            while inside:
                found[bits[some + lowest(inside)] - low] += np.int32(1)
                inside &= inside - 1
    return above

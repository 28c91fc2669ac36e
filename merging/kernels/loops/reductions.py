"""Weighted sums, extremes, distances and inner products of rows."""

from collections.abc import Callable

import numpy as np
from numba import carray, types  # type: ignore[attr-defined]

from merging.kernels.loops import BFLOAT16, BLOCK, FLOAT16, FLOAT32, STRIDE, TILE
from merging.kernels.loops.compiling import LANES, from_float16, inner, inner_sums, lanes_sum, stack_array, store_fence
from merging.kernels.loops.rows import (
    MAGNITUDE,
    ZERO,
    Array,
    Scalar,
    brain,
    doubles,
    halves,
    integers,
    moved,
    same,
    singles,
    store,
    widen,
)

_work = stack_array(types.float32, TILE)


def _adding_one(wide: Callable[[Scalar], Scalar]) -> Callable[..., None]:
    """Adds one row."""

    @inner
    def add(row: Array, a: Array, factor: Scalar, count: int) -> None:
        for i in range(count):
            row[i] += factor * wide(a[i])

    return add


_sum_singles, _sum_brains, _sum_halves = lanes_sum(FLOAT32), lanes_sum(BFLOAT16), lanes_sum(FLOAT16)
_add_single, _add_brain, _add_half = _adding_one(same), _adding_one(brain), _adding_one(from_float16)


@inner
def _sum_any(row: Array, p: Array, k: Array, c: Array, start: int, n: int) -> None:
    """Adds up rows of whatever kinds, for a few entries."""
    for i in range(n):
        row[i] = ZERO
    for one in range(len(p)):
        if k[one] == FLOAT32:
            _add_single(row, singles(p[one], start, n), c[one], n)
        elif k[one] == BFLOAT16:
            _add_brain(row, halves(p[one], start, n), c[one], n)
        else:
            _add_half(row, halves(p[one], start, n), c[one], n)


def weighted_sum(rows: int, kinds: int, count: int, factors: int, out: int, kind: int, first: int, last: int) -> int:
    """Writes Σ c_i x_i over entries [first, last), added up in float32 in the order of the rows.

    Args:
        rows: Where the rows' addresses are, int64 [count].
        kinds: Their kinds, int64 [count].
        count: Number of rows.
        factors: c, float32 [count].
        out: The row to write.
        kind: Its kind.
        first: Of the entries.
        last: Behind them.
    """
    p, k, c = integers(rows, 0, count), integers(kinds, 0, count), singles(factors, 0, count)
    row, alike = carray(_work(), TILE), True
    for i in range(1, count):
        alike &= k[i] == k[0]
    for start in range(first, last, TILE):
        n = min(TILE, last - start)
        done = 0
        if alike and count > 0:
            done = n // LANES * LANES
            for i in range(0, done, LANES):
                if k[0] == FLOAT32:
                    _sum_singles(p, c, count, start + i, row, i)
                elif k[0] == BFLOAT16:
                    _sum_brains(p, c, count, start + i, row, i)
                else:
                    _sum_halves(p, c, count, start + i, row, i)
        if done < n:
            _sum_any(row[done:n], p, k, c, start + done, n - done)
        store(row, out, kind, start, n)
    store_fence()
    return 0


def largest(place: int, kind: int, first: int, last: int) -> int:
    """The largest magnitude's bits in entries [first, last), as a float32's or, of 16 bits, as its own."""
    if kind == FLOAT32:
        bits = singles(place, first, last - first).view(np.uint32)
        most = np.uint32(0)
        for i in range(last - first):
            most = max(most, bits[i] & MAGNITUDE)
        return int(most)
    numbers = halves(place, first, last - first)
    high = np.uint16(0)
    for i in range(last - first):
        high = max(high, np.uint16(numbers[i] & np.uint16(0x7FFF)))
    return int(high)


@inner_sums
def _square(row: Array, total: Array, place: int) -> None:
    """Adds a row's squares to a place."""
    added = ZERO
    for n in range(len(row)):
        added += row[n] * row[n]
    total[place] += added


def squares(
    base: int, base_kind: int, rows: int, kinds: int, count: int, first: int, last: int, work: int, sums: int
) -> int:
    """Adds ‖θ_t − θ_0‖² of every member to its place, and ‖θ_0‖² to the last; a tile's in float32, the tiles' in float64.

    Args:
        base: θ_0.
        base_kind: Its kind.
        rows: Where the addresses of θ_t are, int64 [T].
        kinds: Their kinds, int64 [T].
        count: T.
        first: Of the entries.
        last: Behind them.
        work: Working memory, float32 [2 TILE].
        sums: float64 [T + 1].
    """
    p, k, total = integers(rows, 0, count), integers(kinds, 0, count), doubles(sums, 0, count + 1)
    room = singles(work, 0, 2 * TILE)
    for start in range(first, last, TILE):
        n = min(TILE, last - start)
        before, row = room[:TILE], room[TILE : TILE + n]
        widen(before, 0, base, base_kind, start, n)
        _square(before[:n], total, count)
        for t in range(count):
            moved(row, before, p[t], k[t], start, n)
            _square(row, total, t)
    return 0


@inner_sums
def _dots(a: Array, b: Array, c: Array, x: Array, y: Array, z: Array, total: Array, place: int, width: int) -> None:
    """Adds the inner products of three rows with three to a square of so many columns, from a place on."""
    ax, ay, az, bx, by, bz, cx, cy, cz = ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO
    for n in range(len(a)):
        ax += a[n] * x[n]
        ay += a[n] * y[n]
        az += a[n] * z[n]
        bx += b[n] * x[n]
        by += b[n] * y[n]
        bz += b[n] * z[n]
        cx += c[n] * x[n]
        cy += c[n] * y[n]
        cz += c[n] * z[n]
    total[place] += ax
    total[place + 1] += ay
    total[place + 2] += az
    total[place + width] += bx
    total[place + width + 1] += by
    total[place + width + 2] += bz
    total[place + 2 * width] += cx
    total[place + 2 * width + 1] += cy
    total[place + 2 * width + 2] += cz


def products(
    base: int, base_kind: int, rows: int, kinds: int, count: int, first: int, last: int, work: int, sums: int
) -> int:
    """Adds the inner products of task vectors and base, which is the last, to the upper half of a square.

    A tile's are summed in float32, of many numbers side by side, and the tiles' in float64.

    Args:
        base: θ_0.
        base_kind: Its kind.
        rows: Where the addresses of θ_t are, int64 [T].
        kinds: Their kinds, int64 [T].
        count: T.
        first: Of the entries.
        last: Behind them.
        work: Working memory, float32 [S, STRIDE], 0; S is T + 1 rounded up to a multiple of BLOCK.
        sums: float64 [S, S].
    """
    p, k, size = integers(rows, 0, count), integers(kinds, 0, count), (count + BLOCK) // BLOCK * BLOCK
    room, total = singles(work, 0, size * STRIDE), doubles(sums, 0, size * size)
    before = room[count * STRIDE : count * STRIDE + TILE]
    for start in range(first, last, TILE):
        n = min(TILE, last - start)
        widen(before, 0, base, base_kind, start, n)
        for t in range(count):
            moved(room[t * STRIDE : t * STRIDE + n], before, p[t], k[t], start, n)
        for i in range(0, size, BLOCK):
            a, b = room[i * STRIDE : i * STRIDE + n], room[(i + 1) * STRIDE : (i + 1) * STRIDE + n]
            c = room[(i + 2) * STRIDE : (i + 2) * STRIDE + n]
            for j in range(i, size, BLOCK):
                x, y = room[j * STRIDE : j * STRIDE + n], room[(j + 1) * STRIDE : (j + 1) * STRIDE + n]
                z = room[(j + 2) * STRIDE : (j + 2) * STRIDE + n]
                _dots(a, b, c, x, y, z, total, i * size + j, size)
    return 0

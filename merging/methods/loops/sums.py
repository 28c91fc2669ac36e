"""Weighted sums, extremes and inner products of rows."""

from collections.abc import Callable

import numpy as np
from numba import carray, types  # type: ignore[attr-defined]

from merging.methods.loops import BRAIN, FULL, GROUP, STRIDE, TILE
from merging.methods.loops.compiling import from_float16, inner, inner_sums, room_for
from merging.methods.loops.rows import (
    MAGNITUDE,
    ZERO,
    Array,
    Scalar,
    brain,
    doubles,
    halves,
    integers,
    same,
    singles,
    store,
    widen,
)

_work = room_for(types.float32, TILE)


def _adding(wide: Callable[[Scalar], Scalar]) -> Callable[..., None]:
    """Adds four rows of one kind, which spares the working memory three reads and writes of four."""

    @inner
    def add(row: Array, a: Array, b: Array, c: Array, d: Array, f: Array, count: int) -> None:
        one, two, three, four = f[0], f[1], f[2], f[3]
        for i in range(count):
            row[i] = row[i] + one * wide(a[i]) + two * wide(b[i]) + three * wide(c[i]) + four * wide(d[i])

    return add


_add_singles, _add_brains, _add_halves = _adding(same), _adding(brain), _adding(from_float16)


def _adding_one(wide: Callable[[Scalar], Scalar]) -> Callable[..., None]:
    """Adds one row."""

    @inner
    def add(row: Array, a: Array, factor: Scalar, count: int) -> None:
        for i in range(count):
            row[i] += factor * wide(a[i])

    return add


_add_single, _add_brain, _add_half = _adding_one(same), _adding_one(brain), _adding_one(from_float16)


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
    row = carray(_work(), TILE)
    for start in range(first, last, TILE):
        n = min(TILE, last - start)
        for i in range(n):
            row[i] = ZERO
        one = 0
        while one < count:
            which = k[one]
            if one + GROUP <= count and which == k[one + 1] == k[one + 2] == k[one + 3]:
                f = c[one : one + GROUP]
                a, b, d, e = p[one], p[one + 1], p[one + 2], p[one + 3]
                if which == FULL:
                    _add_singles(
                        row,
                        singles(a, start, n),
                        singles(b, start, n),
                        singles(d, start, n),
                        singles(e, start, n),
                        f,
                        n,
                    )
                elif which == BRAIN:
                    _add_brains(
                        row, halves(a, start, n), halves(b, start, n), halves(d, start, n), halves(e, start, n), f, n
                    )
                else:
                    _add_halves(
                        row, halves(a, start, n), halves(b, start, n), halves(d, start, n), halves(e, start, n), f, n
                    )
                one += GROUP
                continue
            if which == FULL:
                _add_single(row, singles(p[one], start, n), c[one], n)
            elif which == BRAIN:
                _add_brain(row, halves(p[one], start, n), c[one], n)
            else:
                _add_half(row, halves(p[one], start, n), c[one], n)
            one += 1
        store(row, out, kind, start, n)
    return 0


def largest(place: int, kind: int, first: int, last: int) -> int:
    """The largest magnitude's bits in entries [first, last), as a float32's or, of 16 bits, as its own."""
    if kind == FULL:
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
def _dots(x: Array, a: Array, b: Array, c: Array, d: Array) -> tuple[Scalar, Scalar, Scalar, Scalar]:
    """Inner products of one row with four."""
    first, second, third, fourth = ZERO, ZERO, ZERO, ZERO
    for n in range(len(x)):
        first += x[n] * a[n]
        second += x[n] * b[n]
        third += x[n] * c[n]
        fourth += x[n] * d[n]
    return first, second, third, fourth


def products(
    base: int, base_kind: int, rows: int, kinds: int, count: int, first: int, last: int, work: int, sums: int
) -> int:
    """Adds the inner products of task vectors and base, which is the last, to sums [T + 1, T + 1], float64.

    A tile's are summed in float32, of many numbers side by side, and the tiles' in float64.

    Args:
        base: θ_0.
        base_kind: Its kind.
        rows: Where the addresses of θ_t are, int64 [T].
        kinds: Their kinds, int64 [T].
        count: T.
        first: Of the entries.
        last: Behind them.
        work: Working memory, float32 [T + 1 + GROUP, STRIDE], 0.
        sums: float64 [T + 1, T + 1].
    """
    p, k, size = integers(rows, 0, count), integers(kinds, 0, count), count + 1
    room, total = singles(work, 0, (size + GROUP) * STRIDE), doubles(sums, 0, size * size)
    before = room[count * STRIDE : count * STRIDE + TILE]
    for start in range(first, last, TILE):
        n = min(TILE, last - start)
        widen(before, 0, base, base_kind, start, n)
        for t in range(count):
            delta = room[t * STRIDE : t * STRIDE + n]
            widen(delta, 0, p[t], k[t], start, n)
            for i in range(n):
                delta[i] -= before[i]
        for i in range(size):
            for j in range(i, size, GROUP):
                x, y = i * STRIDE, j * STRIDE
                a, b = room[y : y + n], room[y + STRIDE : y + STRIDE + n]
                c, d = room[y + 2 * STRIDE : y + 2 * STRIDE + n], room[y + 3 * STRIDE : y + 3 * STRIDE + n]
                one, two, three, four = _dots(room[x : x + n], a, b, c, d)
                total[i * size + j] += one
                if j + 1 < size:
                    total[i * size + j + 1] += two
                if j + 2 < size:
                    total[i * size + j + 2] += three
                if j + 3 < size:
                    total[i * size + j + 3] += four
    for i in range(size):
        for j in range(i):
            total[i * size + j] = total[j * size + i]
    return 0

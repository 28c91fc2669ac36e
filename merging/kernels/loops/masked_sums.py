"""Sums of what is kept of task vectors, in one look at base and members.

Nothing that is stored is overwritten by a choice between 0 and itself, which would become a masked store, slow on many
processors; and no choice turns NaN into 0, so that what is not finite shows in what comes out.
"""

from collections.abc import Callable

import numpy as np
from numba import carray, types  # type: ignore[attr-defined]

from merging.kernels.loops import BFLOAT16, FLOAT16, FLOAT32, GROUP, STRIDE, TILE
from merging.kernels.loops.compiling import from_float16, inner, stack_array, store_fence
from merging.kernels.loops.random_bits import draw
from merging.kernels.loops.rows import (
    ZERO,
    Array,
    Scalar,
    brain,
    fetch_row,
    halves,
    integers,
    same,
    singles,
    store,
    widen,
)

ALL, SUM, MEAN = 0, 1, 2
"""What is added to the base: all that is kept, what has the elected sign, or its mean."""
ABOVE, BETWEEN, DRAWN = 0, 1, 2
"""What is kept: entries above a magnitude, those not above another one besides (both magnitudes one of two, by a random
number of the entry), or those that chance leaves."""
BASE, FIRST, SECOND, THIRD, FOURTH, END = (place * STRIDE for place in range(6))
"""Rows of the working memory: the base and the sums."""
PAIRS = TILE // 2 + 8
"""From one member's random numbers, two in each, to the next one's."""
LARGEST = np.finfo(np.float32).max
TINY, ONE = np.float32(np.finfo(np.float32).tiny), np.float32(1)

_work, _numbers = stack_array(types.float32, END), stack_array(types.uint32, GROUP * PAIRS)
_members = stack_array(types.float32, GROUP * STRIDE)
"""Of its own, so that a compiler sees that no sum is written over a member that was converted."""


def _keeping(kept: int) -> Callable[[Scalar, Scalar, Scalar, Scalar, Scalar], Scalar]:
    """What becomes of an entry, times its member's factor."""

    @inner
    def keep(delta: Scalar, factor: Scalar, low: Scalar, high: Scalar, chance: Scalar) -> Scalar:
        if kept == DRAWN:
            return delta * (factor if chance >= low else ZERO)
        size = abs(delta)
        if kept == ABOVE:
            return factor * (ZERO if size <= low else delta)
        return factor * (ZERO if (size <= low) | ((size > high) & (size <= LARGEST)) else delta)

    return keep


def _choosing(kept: int) -> Callable[[tuple[Scalar, ...], Scalar], Scalar]:
    """The magnitude that holds for an entry."""

    @inner
    def choose(bound: tuple[Scalar, Scalar, Scalar], chance: Scalar) -> Scalar:
        if kept != DRAWN:
            return bound[0] if chance < bound[2] else bound[1]
        return bound[0]

    return choose


def _adding(wide: Callable[[Scalar], Scalar], kept: int, entries: int) -> Callable[..., None]:
    """Adds `count` entries of four members to the sums.

    FIRST has their sum, or what is above 0, and SECOND what is below. THIRD and FOURTH count both. NaN is neither, and goes
    to both sums.
    """
    return _electing(wide, kept, entries == MEAN) if kept != DRAWN and entries != ALL else _all(wide, kept, entries)


def _electing(wide: Callable[[Scalar], Scalar], kept: int, counted: bool) -> Callable[..., None]:
    """The same of what is kept by its magnitude, which one comparison on either side of 0 tells.

    A task vector turns with the sign of its factor, so that what it adds is above 0 where it is.
    """
    choose = _choosing(kept)

    @inner
    def stays(value: Scalar, low: Scalar, high: Scalar) -> Scalar:
        if kept == ABOVE:
            return not value <= low
        return (not value <= low) & ((not value > high) | (value > LARGEST))

    @inner
    def add(
        work: Array,
        rows: tuple[Array, ...],
        chance: tuple[Array, ...],
        bounds: tuple[tuple[Scalar, ...], ...],
        factors: tuple[Scalar, ...],
        count: int,
    ) -> None:
        x, y, z, w = rows
        q = chance[0]
        f, g, h, j = abs(factors[0]), abs(factors[1]), abs(factors[2]), abs(factors[3])
        sign_f, sign_g = ONE if factors[0] >= ZERO else -ONE, ONE if factors[1] >= ZERO else -ONE
        sign_h, sign_j = ONE if factors[2] >= ZERO else -ONE, ONE if factors[3] >= ZERO else -ONE
        least_a, least_b, least_c, least_d, most_a, most_b, most_c, most_d = bounds
        for i in range(count):
            u = np.int32(q[i])
            low_a, low_b, low_c, low_d = choose(least_a, u), choose(least_b, u), choose(least_c, u), choose(least_d, u)
            high_a, high_b, high_c, high_d = choose(most_a, u), choose(most_b, u), choose(most_c, u), choose(most_d, u)
            before = work[BASE + i]
            a, b = sign_f * (wide(x[i]) - before), sign_g * (wide(y[i]) - before)
            c, d = sign_h * (wide(z[i]) - before), sign_j * (wide(w[i]) - before)
            up_a, up_b = stays(a, low_a, high_a), stays(b, low_b, high_b)
            up_c, up_d = stays(c, low_c, high_c), stays(d, low_d, high_d)
            down_a, down_b = stays(-a, low_a, high_a), stays(-b, low_b, high_b)
            down_c, down_d = stays(-c, low_c, high_c), stays(-d, low_d, high_d)
            above = work[FIRST + i] + f * (a if up_a else ZERO) + g * (b if up_b else ZERO)
            work[FIRST + i] = above + h * (c if up_c else ZERO) + j * (d if up_d else ZERO)
            below = work[SECOND + i] + f * (a if down_a else ZERO) + g * (b if down_b else ZERO)
            work[SECOND + i] = below + h * (c if down_c else ZERO) + j * (d if down_d else ZERO)
            if counted:
                more = work[THIRD + i] + (f if up_a else ZERO) + (g if up_b else ZERO)
                work[THIRD + i] = more + (h if up_c else ZERO) + (j if up_d else ZERO)
                fewer = work[FOURTH + i] + (f if down_a else ZERO) + (g if down_b else ZERO)
                work[FOURTH + i] = fewer + (h if down_c else ZERO) + (j if down_d else ZERO)

    return add


def _all(wide: Callable[[Scalar], Scalar], kept: int, entries: int) -> Callable[..., None]:
    """The same of whatever is kept."""
    keep, choose = _keeping(kept), _choosing(kept)

    @inner
    def add(
        work: Array,
        rows: tuple[Array, ...],
        chance: tuple[Array, ...],
        bounds: tuple[tuple[Scalar, ...], ...],
        factors: tuple[Scalar, ...],
        count: int,
    ) -> None:
        x, y, z, w = rows
        q, r, s, t = chance
        f, g, h, j = factors
        low_a, low_b, low_c, low_d, high_a, high_b, high_c, high_d = bounds
        for i in range(count):
            before = work[BASE + i]
            u_a, u_b, u_c, u_d = np.int32(q[i]), np.int32(r[i]), np.int32(s[i]), np.int32(t[i])
            a = keep(wide(x[i]) - before, f, choose(low_a, u_a), choose(high_a, u_a), u_a)
            b = keep(wide(y[i]) - before, g, choose(low_b, u_b), choose(high_b, u_b), u_b)
            c = keep(wide(z[i]) - before, h, choose(low_c, u_c), choose(high_c, u_c), u_c)
            d = keep(wide(w[i]) - before, j, choose(low_d, u_d), choose(high_d, u_d), u_d)
            if entries == ALL:
                work[FIRST + i] += a + b + (c + d)
            else:
                above = work[FIRST + i] + (ZERO if a < ZERO else a) + (ZERO if b < ZERO else b)
                work[FIRST + i] = above + (ZERO if c < ZERO else c) + (ZERO if d < ZERO else d)
                below = work[SECOND + i] + (ZERO if a > ZERO else a) + (ZERO if b > ZERO else b)
                work[SECOND + i] = below + (ZERO if c > ZERO else c) + (ZERO if d > ZERO else d)
            if entries == MEAN:
                more = work[THIRD + i] + (abs(f) if a > ZERO else ZERO) + (abs(g) if b > ZERO else ZERO)
                work[THIRD + i] = more + (abs(h) if c > ZERO else ZERO) + (abs(j) if d > ZERO else ZERO)
                fewer = work[FOURTH + i] + (abs(f) if a < ZERO else ZERO) + (abs(g) if b < ZERO else ZERO)
                work[FOURTH + i] = fewer + (abs(h) if c < ZERO else ZERO) + (abs(j) if d < ZERO else ZERO)

    return add


@inner
def _settle(work: Array, count: int, entries: int, scale: Scalar) -> None:
    """What becomes of the sums, into the first row."""
    if entries == ALL:
        for i in range(count):
            work[i] = work[BASE + i] + scale * work[FIRST + i]
    elif entries == SUM:
        for i in range(count):
            above, below = work[FIRST + i], work[SECOND + i]
            elected = above if above + below > ZERO else below
            elected = ZERO if above + below == ZERO else elected
            work[i] = work[BASE + i] + scale * elected
    else:
        for i in range(count):
            above, below, more, fewer = work[FIRST + i], work[SECOND + i], work[THIRD + i], work[FOURTH + i]
            elected = above if above + below > ZERO else below
            elected = ZERO if above + below == ZERO else elected
            agreeing = more if above + below > ZERO else fewer
            agreeing = TINY if agreeing < TINY else agreeing
            work[i] = work[BASE + i] + scale * (elected / agreeing)


@inner
def _bound(cuts: Array, levels: Array, member: int, which: int) -> tuple[Scalar, Scalar, Scalar]:
    """Two magnitudes of a member, and the level of random numbers below which the first one holds."""
    place = 4 * member + 2 * which
    return cuts[place], cuts[place + 1], np.int32(levels[2 * member + which])


def _merging(kept: int, entries: int) -> Callable[..., int]:
    """The loop of one kind of merge."""
    add_brains, add_singles = _adding(brain, kept, entries), _adding(same, kept, entries)
    add_halves = _adding(from_float16, kept, entries)

    def merge(
        base: int,
        base_kind: int,
        rows: int,
        kinds: int,
        count: int,
        out: int,
        kind: int,
        first: int,
        last: int,
        factors: int,
        cuts: int,
        levels: int,
        keys: int,
        level: int,
        offset: int,
    ) -> int:
        """Writes θ_0 + scale · f(α, τ) over entries [first, last), f a sum of what is kept of each task vector.

        Args:
            base: θ_0.
            base_kind: Its kind.
            rows: Where the addresses of θ_t are, int64 [T], T a multiple of GROUP.
            kinds: Their kinds, int64 [T].
            count: T.
            out: The row to write.
            kind: Its kind.
            first: Of the entries.
            last: Behind them.
            factors: α, and the scale, float32 [T + 1].
            cuts: For each member, magnitudes that an entry must exceed to stay, where its random number is below a level
                and where not, and those that it must not exceed, unless it is infinite [T, 2, 2], float32.
            levels: These levels, 0 … 65536 [T, 2], int64.
            keys: For each member, two numbers that its random numbers follow from [T, 2], int64; beside magnitudes the
                first ones are everybody's.
            level: Entries with a random number below it are dropped, 0 … 65536.
            offset: The number of the row's first entry, for random numbers.
        """
        p, k, c = integers(rows, 0, count), integers(kinds, 0, count), singles(factors, 0, count + 1)
        bounds, chances, seeds = (
            singles(cuts, 0, 4 * count),
            integers(levels, 0, 2 * count),
            integers(keys, 0, 2 * count),
        )
        work, numbers = carray(_work(), END), carray(_numbers(), GROUP * PAIRS)
        converted = carray(_members(), GROUP * STRIDE)
        sixteen, least = numbers.view(np.uint16), np.int32(level)
        for start in range(first, last, TILE):
            n = min(TILE, last - start)
            widen(work, BASE, base, base_kind, start, n)
            fetch_row(base, base_kind, start + TILE, min(TILE, last - start - TILE))
            for i in range(FIRST, FIRST + n):
                work[i] = ZERO
            if entries != ALL:
                for i in range(SECOND, SECOND + n):
                    work[i] = ZERO
            if entries == MEAN:
                for i in range(THIRD, THIRD + n):
                    work[i] = ZERO
                for i in range(FOURTH, FOURTH + n):
                    work[i] = ZERO
            odd = (offset + start) & 1
            if kept != DRAWN:
                key, other = np.uint32(seeds[0]), np.uint32(seeds[1])
                draw(numbers[:PAIRS], (offset + start) >> 1, (n + odd + 1) >> 1, key, other)
            for one in range(0, count, GROUP):
                a, b, d, e = one, one + 1, one + 2, one + 3
                if kept == DRAWN:
                    for m in range(GROUP):  # entries come while numbers are drawn
                        fetch_row(p[one + m], k[one + m], start, n)
                    for m in range(GROUP):
                        key, other = np.uint32(seeds[2 * (one + m)]), np.uint32(seeds[2 * (one + m) + 1])
                        drawn = numbers[m * PAIRS : (m + 1) * PAIRS]
                        draw(drawn, (offset + start) >> 1, (n + odd + 1) >> 1, key, other)
                else:
                    after, there = (one + GROUP, start) if one + GROUP < count else (0, start + TILE)
                    for m in range(GROUP):
                        fetch_row(p[after + m], k[after + m], there, min(TILE, last - there))
                q = sixteen[odd : odd + n]
                r, s, t = q, q, q
                if kept == DRAWN:
                    r, s = (
                        sixteen[2 * PAIRS + odd : 2 * PAIRS + odd + n],
                        sixteen[4 * PAIRS + odd : 4 * PAIRS + odd + n],
                    )
                    t = sixteen[6 * PAIRS + odd : 6 * PAIRS + odd + n]
                f = c[a], c[b], c[d], c[e]
                brains = k[a] == k[b] == k[d] == k[e] == BFLOAT16
                full = k[a] == k[b] == k[d] == k[e] == FLOAT32
                half = k[a] == k[b] == k[d] == k[e] == FLOAT16
                if not brains and not full and not half:
                    for m in range(GROUP):
                        widen(converted, m * STRIDE, p[one + m], k[one + m], start, n)
                if kept == DRAWN:
                    same_for_all = least, least, least
                    v = (
                        same_for_all,
                        same_for_all,
                        same_for_all,
                        same_for_all,
                        same_for_all,
                        same_for_all,
                        same_for_all,
                        same_for_all,
                    )
                else:
                    v = (
                        _bound(bounds, chances, a, 0),
                        _bound(bounds, chances, b, 0),
                        _bound(bounds, chances, d, 0),
                        _bound(bounds, chances, e, 0),
                        _bound(bounds, chances, a, 1),
                        _bound(bounds, chances, b, 1),
                        _bound(bounds, chances, d, 1),
                        _bound(bounds, chances, e, 1),
                    )
                if brains:
                    x, y = halves(p[a], start, n), halves(p[b], start, n)
                    z, w = halves(p[d], start, n), halves(p[e], start, n)
                    add_brains(work, (x, y, z, w), (q, r, s, t), v, f, n)
                elif half:
                    x, y = halves(p[a], start, n), halves(p[b], start, n)
                    z, w = halves(p[d], start, n), halves(p[e], start, n)
                    add_halves(work, (x, y, z, w), (q, r, s, t), v, f, n)
                elif full:
                    x1, y1 = singles(p[a], start, n), singles(p[b], start, n)
                    z1, w1 = singles(p[d], start, n), singles(p[e], start, n)
                    add_singles(work, (x1, y1, z1, w1), (q, r, s, t), v, f, n)
                else:
                    x1, y1 = converted[:STRIDE], converted[STRIDE : 2 * STRIDE]
                    z1, w1 = converted[2 * STRIDE : 3 * STRIDE], converted[3 * STRIDE : 4 * STRIDE]
                    add_singles(work, (x1, y1, z1, w1), (q, r, s, t), v, f, n)
            _settle(work, n, entries, c[count])
            store(work, out, kind, start, n)
        store_fence()
        return 0

    return merge


above_sum, above_mean, above_all = _merging(ABOVE, SUM), _merging(ABOVE, MEAN), _merging(ABOVE, ALL)
between_sum, between_mean, between_all = _merging(BETWEEN, SUM), _merging(BETWEEN, MEAN), _merging(BETWEEN, ALL)
drawn_sum, drawn_mean, drawn_all = _merging(DRAWN, SUM), _merging(DRAWN, MEAN), _merging(DRAWN, ALL)

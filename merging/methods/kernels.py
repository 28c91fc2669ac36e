"""Loops over stored weights on a CPU that read each number once and keep all that is between in its first cache.

Rows are told by the address of their first entry and their kind, so that one compiled loop serves any number of members and
any mixture of dtypes. Nothing here knows torch: `merging.methods.fused` asks, and imports this only when there is a merge,
because numba takes its time. What a loop gives for an entry depends neither on where it starts nor on where it stops.

All in one file: numba keeps compiled code until the file of the function changes, and looks at no other. Constants are typed
and integers cast at every step because numba reckons with 64 bits otherwise, at half the speed; and nothing is overwritten by
a choice between 0 and itself, which would become a masked store, slow on many processors.
"""

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
import numpy.typing as npt
from numba import carray, njit, types  # type: ignore[attr-defined]
from numba.extending import intrinsic

FULL, HALF = 0, 1
"""Kinds of rows: float32 and bfloat16."""
ALL, SUM, MEAN = 0, 1, 2
"""What is added to the base: all that is kept, what has the elected sign, or its mean."""
TILE = 512
"""Entries at a time: what `combine` works on takes 20 KiB, and a first cache has 32."""
LARGEST = np.finfo(np.float32).max
TINY = np.float32(np.finfo(np.float32).tiny)
ZERO = np.float32(0)
MAGNITUDE, INFINITE = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
GROUP = 4
"""Rows that are read side by side, for which a processor's prefetching is made, and added up in one go."""
STRIDE = TILE + 48
"""From row to row of the working memory: no power of two, for which caches have few places."""
BASE, FIRST, SECOND, THIRD, FOURTH, END = (place * STRIDE for place in range(GROUP, GROUP + 6))
"""Rows behind those of the members; in one array at fixed distances, they are known not to overlap."""

Scalar: TypeAlias = Any
"""A number: addresses are uint64, kinds uint8, factors float32, keys of random numbers uint32; others Python's."""
Array: TypeAlias = npt.NDArray[Any]
Loop = TypeVar("Loop", bound=Callable[..., Any])


def _compiled(loop: Loop, *also: str) -> Loop:
    """Machine code without Python's lock, kept for the next process; made anew by each where none may write.

    Args:
        loop: The function.
        also: Liberties besides that of not rounding between a product and a sum.
    """
    settings: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", *also}}
    try:
        return cast(Loop, njit(cache=True, **settings)(loop))
    except RuntimeError:  # neither beside this file nor in the user's cache directory
        return cast(Loop, njit(**settings)(loop))


def _compiled_sums(loop: Loop) -> Loop:
    """The same where sums may be taken in any order, which is that of a processor's lanes."""
    return _compiled(loop, "reassoc")


def _pointer_to(element: Any) -> Any:
    """From an address, which numba takes for a number, to what it takes for an array's begin."""

    @intrinsic
    def pointer(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.uint64), generate  # type: ignore[no-untyped-call]

    return pointer


_full_pointer, _half_pointer = _pointer_to(types.float32), _pointer_to(types.uint16)


@_compiled
def _full(place: Scalar, start: Scalar, count: Scalar) -> Array:
    """Float32 entries [start, start + count) of a row."""
    return carray(_full_pointer(place + np.uint64(4 * start)), count)


@_compiled
def _half(place: Scalar, start: Scalar, count: Scalar) -> Array:
    """The same of bfloat16, as its bits."""
    return carray(_half_pointer(place + np.uint64(2 * start)), count)


@_compiled
def _wide(half: Scalar) -> Scalar:
    """A bfloat16 number, which is the upper half of a float32."""
    return np.uint32(np.uint32(half) << np.uint32(16)).view(np.float32)


@_compiled
def _widen(work: Array, to: int, place: Scalar, kind: Scalar, start: int, count: int) -> None:
    """Copies entries to the working memory, in float32."""
    if kind == HALF:
        halves = _half(place, start, count)
        for i in range(count):
            work[to + i] = _wide(halves[i])
    else:
        values = _full(place, start, count)
        for i in range(count):
            work[to + i] = values[i]


@_compiled
def _less(row: Array, before: Array, place: Scalar, kind: Scalar, start: int, count: int) -> None:
    """One member's task vector; the base's entries are in `before`."""
    if kind == HALF:
        halves = _half(place, start, count)
        for i in range(count):
            row[i] = _wide(halves[i]) - before[i]
    else:
        values = _full(place, start, count)
        for i in range(count):
            row[i] = values[i] - before[i]


@_compiled
def _store(row: Array, out: Scalar, kind: Scalar, start: Scalar, count: Scalar) -> None:
    """Writes float32 entries to a row of either kind; to the nearest bfloat16, and the even one of two as near."""
    if kind == FULL:
        values = _full(out, start, count)
        for i in range(count):
            values[i] = row[i]
        return
    halves, bits = _half(out, start, count), row.view(np.uint32)
    for i in range(count):
        b = bits[i]
        rounded = np.uint32(b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        halves[i] = np.uint16(rounded) if (b & MAGNITUDE) <= INFINITE else np.uint16(0x7FC0)


@_compiled
def weighted_sum(places: Array, kinds: Array, factors: Array, out: Scalar, kind: Scalar, first: int, last: int) -> None:
    """Writes Σ c_i x_i over entries [first, last), added up in float32 in the order of the rows.

    Four rows of one kind at a time, which spares the working memory three reads and writes of four.
    """
    row = np.empty(TILE, np.float32)
    for start in range(first, last, TILE):
        count = min(TILE, last - start)
        row[:count] = 0
        k = 0
        while k < len(places):
            four = k + 4 <= len(places) and kinds[k] == kinds[k + 1] == kinds[k + 2] == kinds[k + 3]
            f = factors[k]
            if four:
                g, h, j = factors[k + 1], factors[k + 2], factors[k + 3]
            if four and kinds[k] == HALF:
                a, b = _half(places[k], start, count), _half(places[k + 1], start, count)
                c, d = _half(places[k + 2], start, count), _half(places[k + 3], start, count)
                for i in range(count):
                    row[i] = row[i] + f * _wide(a[i]) + g * _wide(b[i]) + h * _wide(c[i]) + j * _wide(d[i])
            elif four:
                x, y = _full(places[k], start, count), _full(places[k + 1], start, count)
                z, w = _full(places[k + 2], start, count), _full(places[k + 3], start, count)
                for i in range(count):
                    row[i] = row[i] + f * x[i] + g * y[i] + h * z[i] + j * w[i]
            elif kinds[k] == HALF:
                a = _half(places[k], start, count)
                for i in range(count):
                    row[i] += f * _wide(a[i])
            else:
                x = _full(places[k], start, count)
                for i in range(count):
                    row[i] += f * x[i]
            k += 4 if four else 1
        _store(row, out, kind, start, count)


@_compiled
def largest(place: Scalar, kind: Scalar, first: int, last: int) -> Scalar:
    """The largest magnitude's bits, as a float32's; those of Inf and NaN are 0x7F800000 and above."""
    found = np.uint32(0)
    if kind == HALF:
        halves = _half(place, first, last - first)
        most = np.uint16(0)
        for i in range(last - first):
            most = max(most, np.uint16(halves[i] & np.uint16(0x7FFF)))
        found = np.uint32(most) << np.uint32(16)
    else:
        bits = _full(place, first, last - first).view(np.uint32)
        for i in range(last - first):
            found = max(found, bits[i] & MAGNITUDE)
    return found


@_compiled_sums
def _dots(x: Array, a: Array, b: Array, c: Array, d: Array) -> tuple[Scalar, Scalar, Scalar, Scalar]:
    """Inner products of one row with four."""
    first, second, third, fourth = ZERO, ZERO, ZERO, ZERO
    for n in range(len(x)):
        first += x[n] * a[n]
        second += x[n] * b[n]
        third += x[n] * c[n]
        fourth += x[n] * d[n]
    return first, second, third, fourth


@_compiled
def products(base: Scalar, base_kind: Scalar, places: Array, kinds: Array, first: int, last: int, sums: Array) -> None:
    """Adds the inner products of task vectors and base, which is the last, to `sums` [T + 1, T + 1], float64.

    A tile's are summed in float32, of many numbers side by side, and the tiles' in float64.
    """
    rows = len(places) + 1
    work = np.zeros((rows + GROUP, STRIDE), np.float32)
    before = work[rows - 1]
    for start in range(first, last, TILE):
        count = min(TILE, last - start)
        _widen(before, 0, base, base_kind, start, count)
        for k in range(rows - 1):
            _less(work[k], before, places[k], kinds[k], start, count)
        for i in range(rows):
            for j in range(i, rows, GROUP):
                x, a, b = work[i, :count], work[j, :count], work[j + 1, :count]
                one, two, three, four = _dots(x, a, b, work[j + 2, :count], work[j + 3, :count])
                sums[i, j] += one
                if j + 1 < rows:
                    sums[i, j + 1] += two
                if j + 2 < rows:
                    sums[i, j + 2] += three
                if j + 3 < rows:
                    sums[i, j + 3] += four
    for i in range(rows):
        for j in range(i):
            sums[i, j] = sums[j, i]


@_compiled
def histogram(
    base: Scalar, base_kind: Scalar, place: Scalar, kind: Scalar, first: int, last: int, dropped: int, counts: Array
) -> None:
    """Counts the magnitudes of a task vector's entries by their bits but the last `dropped`, in `counts` [int64]."""
    row, before = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    bits = row.view(np.uint32)
    for start in range(first, last, TILE):
        count = min(TILE, last - start)
        _widen(before, 0, base, base_kind, start, count)
        _less(row, before, place, kind, start, count)
        for i in range(count):
            counts[(bits[i] & MAGNITUDE) >> np.uint32(dropped)] += 1


@_compiled
def within(
    base: Scalar,
    base_kind: Scalar,
    place: Scalar,
    kind: Scalar,
    first: int,
    last: int,
    low: int,
    high: int,
    patterns: Array,
    places: Array,
) -> tuple[int, int]:
    """Finds the entries whose magnitude's bits are in [low, high): how many there are, and how many above.

    Args:
        base: Where the base's row begins.
        base_kind: What it is.
        place: Where the member's row begins.
        kind: What it is.
        first: Of the entries.
        last: Behind them.
        low: First bit pattern of the band.
        high: Behind its last.
        patterns: For the bits of those within [last − first], int32.
        places: For where they stand [last − first], int64; not asked for if empty.
    """
    row, before = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    flags = np.zeros(TILE, np.uint8)
    bits, words = row.view(np.int32), flags.view(np.uint64)
    least, most = np.int32(low - 1), np.int32(high - 1)
    found, above = 0, 0
    for start in range(first, last, TILE):
        count = min(TILE, last - start)
        _widen(before, 0, base, base_kind, start, count)
        _less(row, before, place, kind, start, count)
        higher: Scalar = np.int32(0)
        for i in range(count):
            magnitude = np.int32(bits[i] & np.int32(MAGNITUDE))
            bits[i] = magnitude
            over = np.uint8(magnitude > most)
            higher = np.int32(higher + over)
            flags[i] = np.uint8(magnitude > least) ^ over
        above += higher
        for word in range((count + 7) // 8):
            if words[word]:  # one of eight is within
                for i in range(8 * word, min(8 * word + 8, count)):
                    patterns[found] = bits[i]
                    if len(places):
                        places[found] = start + i
                    found += flags[i]
    return found, above


@_compiled
def _subtract(work: Array, places: Array, kinds: Array, start: int, count: int) -> None:
    """The task vectors of a group of members, into the first rows; the base's entries are in BASE."""
    if kinds[0] == kinds[1] == kinds[2] == kinds[3] == HALF:
        a, b = _half(places[0], start, count), _half(places[1], start, count)
        c, d = _half(places[2], start, count), _half(places[3], start, count)
        for i in range(count):
            before = work[BASE + i]
            work[i] = _wide(a[i]) - before
            work[STRIDE + i] = _wide(b[i]) - before
            work[2 * STRIDE + i] = _wide(c[i]) - before
            work[3 * STRIDE + i] = _wide(d[i]) - before
    elif kinds[0] == kinds[1] == kinds[2] == kinds[3] == FULL:
        x, y = _full(places[0], start, count), _full(places[1], start, count)
        z, w = _full(places[2], start, count), _full(places[3], start, count)
        for i in range(count):
            before = work[BASE + i]
            work[i] = x[i] - before
            work[STRIDE + i] = y[i] - before
            work[2 * STRIDE + i] = z[i] - before
            work[3 * STRIDE + i] = w[i] - before
    else:
        for k in range(GROUP):
            _widen(work, k * STRIDE, places[k], kinds[k], start, count)
            for i in range(count):
                work[k * STRIDE + i] -= work[BASE + i]


@_compiled
def draw(drawn: Array, pair: int, count: int, key: Scalar, other: Scalar) -> None:
    """Random bits for pairs of entries, from the number `pair` of the first: the same wherever a tile starts.

    A finalizer of three multiplications (xor with what is shifted down, multiply by an odd number), which lets every bit
    of a number and of its key change every bit of what comes out with a probability near a half.
    """
    first = np.uint32(pair & 0xFFFFFFFF)
    above = np.uint32(pair >> 32)
    for i in range(count):
        x = np.uint32(first + np.uint32(i))
        turned = np.uint32(other + above + np.uint32(x < first))
        x = np.uint32(x ^ key)
        x = np.uint32((x ^ (x >> np.uint32(17))) * np.uint32(0xED5AD4BB))
        x = np.uint32(x ^ turned)
        x = np.uint32((x ^ (x >> np.uint32(11))) * np.uint32(0xAC4C1B51))
        x = np.uint32((x ^ (x >> np.uint32(15))) * np.uint32(0x31848BAB))
        drawn[i] = x ^ (x >> np.uint32(14))


@_compiled
def _drop(row: Array, drawn: Array, start: int, count: int, key: Scalar, other: Scalar, level: int) -> None:
    """Sets the entries to 0 whose random number is below a level."""
    halves, most = drawn.view(np.uint16), np.uint16(level - 1)
    draw(drawn, start >> 1, (count + (start & 1) + 1) >> 1, key, other)
    if start & 1:
        for i in range(count):
            row[i] *= np.float32(halves[i + 1] > most)
    else:
        for i in range(count):
            row[i] *= np.float32(halves[i] > most)


@_compiled
def _trim(row: Array, start: int, count: int, low: Array, low_place: int, high: Array, high_place: int) -> None:
    """Sets to 0 what is not above `low` or is above `high`, but is finite; either changes at a place."""
    i = 0
    while i < count:
        here, stop = start + i, count
        least, most = low[0 if here < low_place else 1], high[0 if here < high_place else 1]
        if i < low_place - start < stop:
            stop = low_place - start
        if i < high_place - start < stop:
            stop = high_place - start
        piece = row[i:stop]
        if most >= LARGEST:
            for n in range(stop - i):
                d = piece[n]
                piece[n] = d * np.float32((d > least) | (d < -least))
        else:
            for n in range(stop - i):
                d = piece[n]
                piece[n] = d * np.float32(((d > least) & (d <= most)) | ((d < -least) & (d >= -most)))
        i = stop


@_compiled
def _add(work: Array, count: int, factors: Array, entries: int) -> None:
    """Adds a group's rows to what has been added up: in FIRST, or what is above and below 0 in FIRST and SECOND.

    THIRD and FOURTH count them. NaN is neither, and goes to both.
    """
    f, g, h, j = factors[0], factors[1], factors[2], factors[3]
    if entries == ALL:
        for i in range(count):
            one, two = f * work[i] + g * work[STRIDE + i], h * work[2 * STRIDE + i] + j * work[3 * STRIDE + i]
            work[FIRST + i] += one + two
        return
    for i in range(count):
        a, b, c, d = f * work[i], g * work[STRIDE + i], h * work[2 * STRIDE + i], j * work[3 * STRIDE + i]
        above, below = work[FIRST + i], work[SECOND + i]
        above = above + (ZERO if a <= ZERO else a) + (ZERO if b <= ZERO else b)
        work[FIRST + i] = above + (ZERO if c <= ZERO else c) + (ZERO if d <= ZERO else d)
        below = below + (ZERO if a >= ZERO else a) + (ZERO if b >= ZERO else b)
        work[SECOND + i] = below + (ZERO if c >= ZERO else c) + (ZERO if d >= ZERO else d)
    if entries == MEAN:
        p, q, r, s = abs(f), abs(g), abs(h), abs(j)
        for i in range(count):
            a, b, c, d = f * work[i], g * work[STRIDE + i], h * work[2 * STRIDE + i], j * work[3 * STRIDE + i]
            above, below = work[THIRD + i], work[FOURTH + i]
            above = above + (p if a > ZERO else ZERO) + (q if b > ZERO else ZERO)
            work[THIRD + i] = above + (r if c > ZERO else ZERO) + (s if d > ZERO else ZERO)
            below = below + (p if a < ZERO else ZERO) + (q if b < ZERO else ZERO)
            work[FOURTH + i] = below + (r if c < ZERO else ZERO) + (s if d < ZERO else ZERO)


@_compiled
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


@_compiled
def combine(
    base: Scalar,
    base_kind: Scalar,
    places: Array,
    kinds: Array,
    out: Scalar,
    kind: Scalar,
    first: int,
    last: int,
    factors: Array,
    entries: int,
    scale: Scalar,
    cuts: Array,
    cut_places: Array,
    keys: Array,
    level: int,
    offset: int,
) -> None:
    """Writes θ_0 + scale · f(α, τ) over entries [first, last), f a sum of what is kept of each task vector.

    Args:
        base: Where the base's row begins.
        base_kind: What it is.
        places: Where the members' rows begin, a multiple of GROUP.
        kinds: What they are.
        out: Where the row to write begins.
        kind: What it is.
        first: Of the entries.
        last: Behind them.
        factors: α [T], float32.
        entries: ALL, SUM or MEAN.
        scale: float32.
        cuts: For each member, magnitudes that an entry must exceed to stay, before a place and from it on, and those that
            it must not exceed [T, 2, 2], float32; none at all for no trim.
        cut_places: These places [T, 2], int64, among the row's entries.
        keys: For each member, two numbers that its random numbers follow from [T, 2], uint32.
        level: Entries with a random number below it are dropped, 0 … 65536.
        offset: The number of the row's first entry, for random numbers.
    """
    work = np.empty(END, np.float32)
    drawn = np.empty(TILE // 2 + 1, np.uint32)
    for start in range(first, last, TILE):
        count = min(TILE, last - start)
        _widen(work, BASE, base, base_kind, start, count)
        work[FIRST:END] = 0
        for one in range(0, len(places), GROUP):
            _subtract(work, places[one : one + GROUP], kinds[one : one + GROUP], start, count)
            for k in range(one, one + GROUP):
                row = work[(k - one) * STRIDE : (k - one) * STRIDE + count]
                if level > 0:
                    _drop(row, drawn, offset + start, count, keys[k, 0], keys[k, 1], level)
                if len(cuts):
                    _trim(row, start, count, cuts[k, 0], cut_places[k, 0], cuts[k, 1], cut_places[k, 1])
            _add(work, count, factors[one : one + GROUP], entries)
        _settle(work, count, entries, scale)
        _store(work, out, kind, start, count)

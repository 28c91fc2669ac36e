"""Rows of stored weights, as the loops read and write them: an address and a kind.

Constants are typed and integers cast at every step because numba reckons with 64 bits otherwise, at half the speed.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from numba import carray, types  # type: ignore[attr-defined]

from merging.kernels.loops import BFLOAT16, FLOAT16, FLOAT32
from merging.kernels.loops.compiling import PAST, fetch, from_float16, inner, nontemporal_store, pointer_to, to_float16

ZERO, MAGNITUDE, INFINITE = np.float32(0), np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)

LINE = 64
"""Bytes that a cache takes at once."""
Scalar: TypeAlias = Any
"""A number of a type that numba infers: float32, uint32, uint16 or Python's."""
Array: TypeAlias = npt.NDArray[Any]


def _reader(element: Any, width: int) -> Callable[[int, int, int], Array]:
    """Entries [start, start + count) of a row of numbers of one type."""
    pointer = pointer_to(element)

    @inner
    def entries(place: int, start: int, count: int) -> Array:
        return carray(pointer(place + width * start), count)

    return entries


singles, doubles = _reader(types.float32, 4), _reader(types.float64, 8)
halves, patterns, integers = _reader(types.uint16, 2), _reader(types.int32, 4), _reader(types.int64, 8)


@inner
def fetch_row(place: int, kind: int, start: int, count: int) -> None:
    """Has entries brought to the first cache."""
    width = 4 if kind == FLOAT32 else 2
    for at in range(place + width * start, place + width * (start + count), LINE):
        fetch(at)


@inner
def same(value: Scalar) -> Scalar:
    """A float32 as it is."""
    return value


@inner
def brain(bits: Scalar) -> Scalar:
    """A bfloat16 number, which is the upper half of a float32."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@inner
def widen(work: Array, to: int, place: int, kind: int, start: int, count: int) -> None:
    """Copies entries to the working memory, in float32."""
    if kind == BFLOAT16:
        brains = halves(place, start, count)
        for i in range(count):
            work[to + i] = brain(brains[i])
    elif kind == FLOAT16:
        bits = halves(place, start, count)
        for i in range(count):
            work[to + i] = from_float16(bits[i])
    else:
        values = singles(place, start, count)
        for i in range(count):
            work[to + i] = values[i]


@inner
def moved(row: Array, before: Array, place: int, kind: int, start: int, count: int) -> None:
    """Writes what entries differ by from others in float32."""
    if kind == BFLOAT16:
        brains = halves(place, start, count)
        for i in range(count):
            row[i] = brain(brains[i]) - before[i]
    elif kind == FLOAT16:
        bits = halves(place, start, count)
        for i in range(count):
            row[i] = from_float16(bits[i]) - before[i]
    else:
        values = singles(place, start, count)
        for i in range(count):
            row[i] = values[i] - before[i]


@inner
def store(work: Array, out: int, kind: int, start: int, count: int) -> None:
    """Writes float32 entries to a row, rounded to the nearest number of its kind, and the even one of two as near."""
    if kind == FLOAT32:
        values = singles(out, start, count)
        to = out + 4 * start
        lead = min((-to % (4 * PAST)) // 4, count)
        for i in range(lead):
            values[i] = work[i]
        whole = lead + (count - lead) // PAST * PAST
        for i in range(lead, whole, PAST):
            nontemporal_store(to + 4 * i, work, i)
        for i in range(whole, count):
            values[i] = work[i]
        return
    rounded = halves(out, start, count)
    if kind == FLOAT16:
        for i in range(count):
            rounded[i] = to_float16(work[i])
        return
    bits = work.view(np.uint32)
    for i in range(count):
        b = bits[i]
        near = np.uint32(b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        rounded[i] = np.uint16(near) if (b & MAGNITUDE) <= INFINITE else np.uint16(0x7FC0)

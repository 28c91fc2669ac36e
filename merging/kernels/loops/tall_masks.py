"""Task vectors without the entries that matter to too few members."""

from collections.abc import Callable

import numpy as np
from numba import carray, types  # type: ignore[attr-defined]

from merging.kernels.loops import BFLOAT16, FLOAT32, STRIDE, TILE
from merging.kernels.loops.compiling import inner, stack_array, store_fence
from merging.kernels.loops.rows import ZERO, Array, Scalar, brain, halves, integers, same, singles, store, widen

BASE, WHOLE, SCALED, MASKS, END = (place * STRIDE for place in range(5))
"""Rows of the working memory: base, Σ τ, Σ α τ, and how many masks have an entry."""
ONE = np.float32(1)

_work, _member = stack_array(types.float32, END), stack_array(types.float32, TILE)


def _adding(wide: Callable[[Scalar], Scalar]) -> Callable[..., None]:
    """Adds a member to the sums."""

    @inner
    def add(work: Array, row: Array, factor: Scalar, count: int) -> None:
        for i in range(count):
            delta = wide(row[i]) - work[BASE + i]
            work[WHOLE + i] += delta
            work[SCALED + i] += factor * delta

    return add


def _counting(wide: Callable[[Scalar], Scalar]) -> Callable[..., None]:
    """Counts the entries that stand out of the other members' sum."""

    @inner
    def mark(work: Array, row: Array, threshold: Scalar, count: int) -> None:
        for i in range(count):
            delta = wide(row[i]) - work[BASE + i]
            other = abs(work[WHOLE + i] - delta)
            work[MASKS + i] += ONE if abs(delta) - threshold * other > ZERO else ZERO

    return mark


_add_brain, _add_single, _mark_brain, _mark_single = _adding(brain), _adding(same), _counting(brain), _counting(same)


def consensus(
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
) -> int:
    """Writes θ_0 + m ∘ Σ α_t τ_t over entries [first, last), m where at least k of the masks |τ_t| > λ |Σ τ − τ_t| are.

    Args:
        base: θ_0.
        base_kind: Its kind.
        rows: Where the addresses of θ_t are, int64 [T].
        kinds: Their kinds, int64 [T].
        count: T.
        out: The row to write.
        kind: Its kind.
        first: Of the entries.
        last: Behind them.
        factors: α, λ and k, float32 [T + 2].
    """
    p, k, c = integers(rows, 0, count), integers(kinds, 0, count), singles(factors, 0, count + 2)
    work, member = carray(_work(), END), carray(_member(), TILE)
    for start in range(first, last, TILE):
        n = min(TILE, last - start)
        widen(work, BASE, base, base_kind, start, n)
        for i in range(WHOLE, END):
            work[i] = ZERO
        for t in range(count):
            if k[t] == BFLOAT16:
                _add_brain(work, halves(p[t], start, n), c[t], n)
            elif k[t] == FLOAT32:
                _add_single(work, singles(p[t], start, n), c[t], n)
            else:
                widen(member, 0, p[t], k[t], start, n)
                _add_single(work, member, c[t], n)
        for t in range(count):
            if k[t] == BFLOAT16:
                _mark_brain(work, halves(p[t], start, n), c[count], n)
            elif k[t] == FLOAT32:
                _mark_single(work, singles(p[t], start, n), c[count], n)
            else:
                widen(member, 0, p[t], k[t], start, n)
                _mark_single(work, member, c[count], n)
        needed = c[count + 1]
        for i in range(n):
            mask = ONE if work[MASKS + i] >= needed else ZERO
            work[WHOLE + i] = work[BASE + i] + mask * work[SCALED + i]
        store(work[WHOLE:SCALED], out, kind, start, n)
    store_fence()
    return 0

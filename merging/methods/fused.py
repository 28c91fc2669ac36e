"""Merges of stored weights on a CPU by compiled loops (`merging.methods.kernels`), for float32 and bfloat16.

Every function has a counterpart in torch that gives the same up to the rounding of float32 and that takes what this one does
not: other dtypes, other devices, machines without numba. Which of the two merges a weight depends on its dtypes and its
device alone, so that stretches and shards of it are merged as the whole is.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

KINDS = {torch.float32: 0, torch.bfloat16: 1}
"""What a row is to the loops, by its dtype."""
ENTRIES = {"all": 0, "sum": 1, "mean": 2}
"""What is added up of task vectors: everything, what has the elected sign, or the mean of that."""
CHUNK = 1 << 19
"""Fewest entries for which another thread is worth its while."""

Integers = npt.NDArray[np.int64]
Patterns = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Bounds:
    """Magnitudes between which a member's entries stay.

    Args:
        above: What an entry must exceed, before a place and from it on.
        above_place: Index of that place among the entries at hand.
        most: What an entry must not exceed, unless it is infinite, before a place and from it on.
        most_place: Index of that place.
    """

    above: tuple[float, float]
    above_place: int = 0
    most: tuple[float, float] = (float("inf"), float("inf"))
    most_place: int = 0


@dataclass(frozen=True)
class Rule:
    """θ_0 + scale · Σ α_t m_t ∘ τ_t, or what of the sum has the elected sign: see `merging.methods.deltas`.

    Args:
        factors: α_t of every member.
        entries: Key of `ENTRIES`.
        scale: Of what is added to the base.
        bounds: Of every member; none for no trim.
        keys: For every member, two numbers that its random numbers follow from; none for no drop.
        level: Entries with a random number below it are dropped; of 65536.
        offset: Flat index of the first entry at hand in the whole weight.
    """

    factors: Sequence[float]
    entries: str
    scale: float = 1.0
    bounds: Sequence[Bounds] = ()
    keys: Sequence[tuple[int, int]] = ()
    level: int = 0
    offset: int = 0


@cache
def _loops() -> Any:
    """The compiled loops; None on a machine without numba."""
    try:
        return importlib.import_module("merging.methods.kernels")
    except ImportError:
        return None


def fits(*values: Tensor) -> bool:
    """Whether the loops take these flat tensors."""
    return all(_is_plain(value) for value in values) and _loops() is not None


def _is_plain(value: Tensor) -> bool:
    if value.device.type != "cpu" or value.dtype not in KINDS:
        return False
    return value.is_contiguous() and value.data_ptr() % value.dtype.itemsize == 0


def weighted_sum(terms: Sequence[tuple[Tensor, float]], out: Tensor) -> None:
    """Writes Σ c_i x_i, flat tensors that fit, accumulated in float32 and rounded once."""
    places, kinds = _rows([value for value, _ in terms])
    factors = np.array([factor for _, factor in terms], np.float32)
    _spread(lambda first, last: _loops().weighted_sum(places, kinds, factors, *_row(out), first, last), out.numel())


def combine(base: Tensor, values: Sequence[Tensor], out: Tensor, rule: Rule) -> None:
    """Merges the task vectors of members in one pass over flat tensors that fit.

    Args:
        base: θ_0 [n].
        values: θ_t [n] of every member.
        out: Overwritten [n].
        rule: The arithmetic.
    """
    spare = -len(values) % _loops().GROUP  # the base itself, whose task vector is 0
    places, kinds = _rows([*values, *[base] * spare])
    largest = max(map(abs, rule.factors)) if rule.entries != "all" else 1.0
    largest = largest or 1.0
    # Equal factors are exactly 1 in an election, so that opposite task vectors cancel to 0 and not to the sign of a
    # rounding error.
    factors = np.array([*(factor / largest for factor in rule.factors), *[0.0] * spare], np.float32)
    bounds = [*rule.bounds, *[Bounds((-1.0, -1.0))] * spare] if rule.bounds else []
    cuts = np.array([(bound.above, bound.most) for bound in bounds], np.float32).reshape(-1, 2, 2)
    cut_places = np.array([(bound.above_place, bound.most_place) for bound in bounds], np.int64).reshape(-1, 2)
    keys = np.array([*rule.keys, *[(0, 0)] * spare], np.uint32).reshape(-1, 2)
    scale = np.float32(rule.scale if rule.entries == "mean" else rule.scale * largest)
    arithmetic = (factors, ENTRIES[rule.entries], scale, cuts, cut_places, keys, rule.level, rule.offset)
    _spread(
        lambda first, last: _loops().combine(*_row(base), places, kinds, *_row(out), first, last, *arithmetic),
        out.numel(),
    )


def is_finite(value: Tensor) -> bool:
    """Whether a flat tensor that fits holds neither NaN nor Inf."""
    loops = _loops()
    return bool(loops.largest(*_row(value), 0, value.numel()) < loops.INFINITE)


def histogram(value: Tensor, base: Tensor, dropped: int) -> Tensor:
    """How often each bit pattern of |θ_t − θ_0| without its last `dropped` bits occurs, int64 [2^(31 − dropped)]."""
    counts = np.zeros(1 << (31 - dropped), np.int64)
    _loops().histogram(*_row(base), *_row(value), 0, base.numel(), dropped, counts)
    return torch.from_numpy(counts)


def within(
    value: Tensor, base: Tensor, band: tuple[int, int], room: Tensor, *, places: bool = False
) -> tuple[int, Patterns, Integers]:
    """The entries of |θ_t − θ_0| whose bit patterns are in a band.

    Args:
        value: θ_t, flat and fitting.
        base: θ_0.
        band: Bit patterns, from the first up to and without the second.
        room: Where the patterns go, int32 [as many as there are entries].
        places: Whether places are asked for.

    Returns:
        The number of entries above the band; patterns of those within, in memory of their own, and where they stand.
    """
    where = np.empty(base.numel() if places else 0, np.int64)
    rows = (*_row(base), *_row(value), 0, base.numel())
    found, above = _loops().within(*rows, band[0], min(band[1], 0x7FFFFFFF), room.numpy(), where)
    return above, room.numpy()[:found].copy(), where[:found].copy()


def products(base: Tensor, values: Sequence[Tensor]) -> Tensor:
    """Inner products of task vectors and base, the last, of flat tensors that fit [T + 1, T + 1], float64."""
    sums = np.zeros((len(values) + 1, len(values) + 1))
    _loops().products(*_row(base), *_rows(values), 0, base.numel(), sums)
    return torch.from_numpy(sums)


def _row(value: Tensor) -> tuple[np.uint64, np.uint8]:
    """Where a tensor's entries lie, and what they are."""
    return np.uint64(value.data_ptr()), np.uint8(KINDS[value.dtype])


def _rows(values: Sequence[Tensor]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8]]:
    return (
        np.array([value.data_ptr() for value in values], np.uint64),
        np.array([KINDS[value.dtype] for value in values], np.uint8),
    )


def _spread(work: Callable[[int, int], None], numel: int) -> None:
    """Has all of torch's threads work on ranges of the entries."""
    threads = min(torch.get_num_threads(), numel // CHUNK)
    if threads <= 1:
        work(0, numel)
        return
    for done in [_threads(threads).submit(work, first, last) for first, last in _ranges(numel, threads)]:
        done.result()


def _ranges(numel: int, count: int) -> Iterator[tuple[int, int]]:
    step = -(-numel // count)
    return ((first, min(first + step, numel)) for first in range(0, numel, step))


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="merge")

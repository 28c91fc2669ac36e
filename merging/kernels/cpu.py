"""Merges of stored weights on a CPU by compiled loops (`merging.kernels.loops`), for float32, bfloat16 and float16.

Every function has a counterpart in torch that gives the same up to the rounding of float32 and that takes what this one does
not: other dtypes, other devices, machines without LLVM or without instructions for float16. Where its loop cannot be compiled,
a function says so (False, or None) and has done nothing. Which of the two merges a weight depends on its dtypes and its device
alone, so that chunks and shards of it are merged as the whole is.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from merging.kernels.loops import BFLOAT16, BLOCK, FLOAT16, FLOAT32, GROUP, STRIDE, TILE, machine

KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
"""What a row is to the loops, by its dtype."""
ENTRIES = ("all", "sum", "mean")
"""What is added up of task vectors: everything, what has the elected sign, or the mean of that."""
CHUNK = 1 << 19
"""Fewest entries for which another thread is worth its while."""
WIDEST = 1 << 21
"""Most bit patterns of which each is counted by itself."""
INFINITE = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
"""The bits of infinity; those of NaN are above."""

INFINITY = float("inf")
LEVELS = 1 << 16
"""Distinct values of a random number."""

Integers = npt.NDArray[np.int64]
Patterns = npt.NDArray[np.int32]
Numbers = npt.NDArray[Any]


@dataclass(frozen=True)
class Bounds:
    """Magnitudes between which a member's entries stay.

    Args:
        above: What an entry must exceed, where its random number is below a level, and where not.
        above_level: That level, of 65536.
        most: What an entry must not exceed, unless it is infinite, where its random number is below a level, and where not.
        most_level: That level.
    """

    above: tuple[float, float]
    above_level: int = LEVELS
    most: tuple[float, float] = (INFINITY, INFINITY)
    most_level: int = LEVELS


@dataclass(frozen=True)
class Rule:
    """θ_0 + scale · Σ α_t m_t ∘ τ_t, or what of the sum has the elected sign: see `merging.methods.task_vectors.elementwise`.

    Args:
        factors: α_t of every member.
        entries: Key of `ENTRIES`.
        scale: Of what is added to the base.
        bounds: Of every member; none for no trim.
        keys: For every member, two numbers that its random numbers follow from; none for no drop. Beside bounds, of all
            members together: one number decides for all.
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

    def normalised(self) -> tuple[list[float], float]:
        """Factors by the largest of them, and the scale that makes up for it.

        Equal factors are exactly 1 in an election then, so that opposite task vectors cancel to 0 and not to the sign of a
        rounding error.
        """
        largest = max(map(abs, self.factors)) if self.entries != "all" else 1.0
        largest = largest or 1.0
        scale = self.scale if self.entries == "mean" else self.scale * largest
        return [factor / largest for factor in self.factors], scale


@dataclass(frozen=True)
class Masks:
    """θ_0 + m ∘ Σ α_t τ_t, m where enough of the masks |τ_t| > threshold · |Σ τ − τ_t| are: see `consensus`.

    Args:
        factors: α_t of every member.
        threshold: How far an entry must stand out of the others' sum.
        needed: Members that it must matter to.
    """

    factors: Sequence[float]
    threshold: float
    needed: int


def fits(*values: Tensor) -> bool:
    """Whether the loops take these flat tensors."""
    return all(_is_plain(value) for value in values) and machine.is_there()


def _is_plain(value: Tensor) -> bool:
    if value.device.type != "cpu" or value.dtype not in KINDS:
        return False
    return value.is_contiguous() and value.data_ptr() % value.dtype.itemsize == 0


def weighted_sum(terms: Sequence[tuple[Tensor, float]], out: Tensor) -> bool:
    """Writes Σ c_i x_i, flat tensors that fit, accumulated in float32 and rounded once."""
    rows, kinds = _rows([value for value, _ in terms])
    factors = np.array([factor for _, factor in terms], np.float32)
    inputs = (_at(rows), _at(kinds), len(terms), _at(factors))
    return _spread("reductions.weighted_sum", (*inputs, *_row(out)), out.numel())


def combine(base: Tensor, values: Sequence[Tensor], out: Tensor, rule: Rule | Masks) -> bool:
    """Merges the task vectors of members in one pass over flat tensors that fit.

    Args:
        base: θ_0 [n].
        values: θ_t [n] of every member.
        out: Overwritten [n].
        rule: The arithmetic.
    """
    if isinstance(rule, Masks):
        return _mask(base, values, out, rule)
    spare = -len(values) % GROUP  # the base itself, whose task vector is 0
    rows, kinds = _rows([*values, *[base] * spare])
    scaled, scale = rule.normalised()
    factors = np.array([*scaled, *[0.0] * spare, scale], np.float32)
    bounds = [*rule.bounds, *[Bounds((0.0, 0.0))] * spare] if rule.bounds else []
    cuts = np.maximum(np.array([(bound.above, bound.most) for bound in bounds], np.float32), 0)
    levels = np.array([(bound.above_level, bound.most_level) for bound in bounds], np.int64)
    plain = all(min(bound.most) == INFINITY for bound in bounds)
    keys = np.array([*(rule.keys or [(0, 0)] * len(values)), *[(0, 0)] * spare], np.int64)
    kept = "drawn" if not bounds else "above" if plain else "between"
    arithmetic = (_at(factors), _at(cuts), _at(levels), _at(keys), rule.level, rule.offset)
    inputs = (*_row(base), _at(rows), _at(kinds), len(rows), *_row(out))
    return _spread(f"masked_sums.{kept}_{rule.entries}", inputs, out.numel(), arithmetic)


def _mask(base: Tensor, values: Sequence[Tensor], out: Tensor, rule: Masks) -> bool:
    """The same by a rule of masks."""
    rows, kinds = _rows(values)
    factors = np.array([*rule.factors, rule.threshold, rule.needed], np.float32)
    inputs = (*_row(base), _at(rows), _at(kinds), len(rows), *_row(out))
    return _spread("tall_masks.consensus", inputs, out.numel(), (_at(factors),))


def is_finite(value: Tensor) -> bool | None:
    """Whether a flat tensor that fits holds neither NaN nor Inf."""
    run = machine.loop("reductions.largest")
    return run and run(*_row(value), 0, value.numel()) < INFINITE[value.dtype]


def histogram(value: Tensor, base: Tensor, dropped: int) -> Tensor | None:
    """How often each bit pattern of |θ_t − θ_0| without its last `dropped` bits occurs, int64 [2^(31 − dropped)]."""
    if (run := machine.loop("magnitude_counts.histogram")) is None:
        return None
    counts = np.zeros(1 << (31 - dropped), np.int64)
    run(*_row(base), *_row(value), 0, base.numel(), dropped, _at(counts))
    return torch.from_numpy(counts)


def within(
    values: Sequence[Tensor], base: Tensor, bands: Sequence[tuple[int, int]], room: Tensor
) -> list[tuple[int, Patterns, Integers]] | None:
    """The entries of every |θ_t − θ_0| whose bit patterns are in a band of its own, in one look at all.

    Args:
        values: θ_t, flat and fitting.
        base: θ_0.
        bands: Bit patterns, from the first up to and without the second.
        room: Working memory, int32 [a place for each pattern of all bands].

    Returns:
        Of each the number of entries above its band; the patterns that occur in it, ascending, and how often each does.
    """
    if (run := machine.loop("magnitude_counts.within")) is None:
        return None
    rows, kinds = _rows(values)
    ends = np.cumsum([high - low for low, high in bands])
    counts: list[Patterns] = np.split(room.zero_().numpy(), ends[:-1])
    rooms, above = np.array([_at(part) for part in counts], np.int64), np.zeros(len(values), np.int64)
    limits = np.array(bands, np.int64)
    inputs = (_at(rows), _at(kinds), len(values), 0, base.numel(), _at(limits), _at(rooms), _at(above))
    run(*_row(base), *inputs)
    # numpy lists what is true at many times the speed of numbers
    places_of = [np.flatnonzero(part != 0) for part in counts]
    return [
        (int(higher), (places + low).astype(np.int32), part[places].astype(np.int64))
        for higher, (low, _), places, part in zip(above, bands, places_of, counts, strict=True)
    ]


def squares(base: Tensor, values: Sequence[Tensor]) -> list[float] | None:
    """‖θ_t − θ_0‖² of every member, and ‖θ_0‖², of flat tensors that fit."""
    if (run := machine.loop("reductions.squares")) is None:
        return None
    rows, kinds = _rows(values)
    sums, work = np.zeros(len(values) + 1), np.zeros(2 * TILE, np.float32)
    run(*_row(base), _at(rows), _at(kinds), len(values), 0, base.numel(), _at(work), _at(sums))
    return [float(number) for number in sums]


def products(base: Tensor, values: Sequence[Tensor]) -> Tensor | None:
    """Inner products of task vectors and base, the last, of flat tensors that fit [T + 1, T + 1], float64."""
    if (run := machine.loop("reductions.products")) is None:
        return None
    count = len(values)
    size = (count + BLOCK) // BLOCK * BLOCK
    rows, kinds = _rows(values)
    sums, work = np.zeros((size, size)), np.zeros((size, STRIDE), np.float32)
    run(*_row(base), _at(rows), _at(kinds), count, 0, base.numel(), _at(work), _at(sums))
    upper = np.triu(sums)[: count + 1, : count + 1]
    return torch.from_numpy(upper + np.triu(upper, 1).T)


def _at(numbers: Numbers) -> int:
    """The address of an array, which the caller keeps."""
    return int(numbers.ctypes.data)


def _row(value: Tensor) -> tuple[int, int]:
    """Where a tensor's entries lie, and what they are."""
    return value.data_ptr(), KINDS[value.dtype]


def _rows(values: Sequence[Tensor]) -> tuple[Integers, Integers]:
    return (
        np.array([value.data_ptr() for value in values], np.int64),
        np.array([KINDS[value.dtype] for value in values], np.int64),
    )


def _spread(loop: str, before: Sequence[int], numel: int, after: Sequence[int] = ()) -> bool:
    """Has all of torch's threads run a loop on ranges of the entries, which it is told between its other arguments."""
    if (run := machine.loop(loop)) is None:
        return False
    threads = min(torch.get_num_threads(), numel // CHUNK)
    if threads <= 1:
        run(*before, 0, numel, *after)
        return True
    for done in [_threads(threads).submit(run, *before, *piece, *after) for piece in _ranges(numel, threads)]:
        done.result()
    return True


def _ranges(numel: int, count: int) -> Iterator[tuple[int, int]]:
    step = -(-numel // count)
    return ((first, min(first + step, numel)) for first in range(0, numel, step))


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="merge")

"""Elementwise arithmetic in blocks that stay in the cache: each number read once, each result written once."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from merging.kernels import cpu

CPU_ROW = 1 << 18
"""Entries in flight where one row of float32 is accumulated: a megabyte, which an ordinary core's caches
hold."""
CPU_ROWS = 1 << 20
"""Entries in flight where several rows are held at once."""
DEVICE_ROW = 1 << 22
"""Entries in flight on an accelerator, where a kernel's start costs more than its cache saves."""


class Scratch:
    """Named buffers that are used again by every block and every candidate."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def take(self, name: str, *shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """A buffer of this shape; its content is whatever the last user left."""
        size = 1
        for extent in shape:
            size *= extent
        held = self._buffers.get((name, device, dtype))
        if held is None or held.numel() < size:
            held = self._buffers[name, device, dtype] = torch.empty(size, dtype=dtype, device=device)
        return held[:size].view(shape)


def step_of(device: torch.device, rows: int = 1) -> int:
    """Entries of a range of which `rows` rows stay in the cache."""
    if device.type != "cpu":
        return DEVICE_ROW
    return CPU_ROW if rows <= 1 else max(CPU_ROWS // rows, 1 << 13)


def spans(numel: int, device: torch.device, rows: int = 1) -> Iterator[tuple[int, int]]:
    """Consecutive ranges that cover `numel` entries, so small that `rows` rows of them stay in the cache."""
    step = step_of(device, rows)
    for start in range(0, numel, step):
        yield start, min(start + step, numel)


def blocks_of_rows(matrix: Tensor, rows: int) -> Iterator[tuple[int, int]]:
    """Ranges of a matrix's rows, of which `rows` copies stay in the cache."""
    step = max(step_of(matrix.device, rows) // max(matrix.shape[1], 1), 1)
    for start in range(0, matrix.shape[0], step):
        yield start, min(start + step, matrix.shape[0])


def cut(values: Iterable[Tensor], step: int) -> Iterator[tuple[Tensor, ...]]:
    """Flat tensors of one size in ranges of `step` entries, as views; in less time than slicing each takes."""
    return zip(*(value.split(step) for value in values), strict=True)  # type: ignore[no-untyped-call]


@contextmanager
def flat(out: Tensor) -> Iterator[Tensor]:
    """A one-dimensional view of `out` to write to; by way of a copy where memory has no such view."""
    if out.is_contiguous():
        yield out.view(-1)
    else:
        staged = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        yield staged.view(-1)
        out.copy_(staged)


def weighted_sum(terms: Sequence[tuple[Tensor, float]], out: Tensor, scratch: Scratch) -> None:
    """Writes Σ c_i x_i, accumulated in float32 and rounded to the dtype of `out` once.

    Args:
        terms: Tensors x_i of the shape of `out` and their coefficients c_i; those with c_i = 0 are not read.
        out: Overwritten.
        scratch: Where rows of another dtype than float32 are accumulated.
    """
    used = [(value.reshape(-1), factor) for value, factor in terms if factor != 0]
    with flat(out) as destination:
        values = (destination, *(value for value, _ in used))
        if cpu.fits(*values) and cpu.weighted_sum(used, destination):
            return
        for piece, *parts in cut(values, step_of(destination.device)):
            direct = piece.dtype == torch.float32
            row = piece if direct else scratch.take("sum", piece.numel(), device=piece.device)
            if not used:
                row.zero_()
            for index, (term, (_, factor)) in enumerate(zip(parts, used, strict=True)):
                if index and term.dtype != torch.float32 and term.device.type == "cpu":
                    # converted first, which a CPU does in half the time of a sum over two dtypes
                    term = scratch.take("term", term.numel(), device=term.device).copy_(term)
                if index:
                    row.add_(term, alpha=factor)
                elif term.dtype == torch.float32:
                    torch.mul(term, factor, out=row)
                else:
                    row.copy_(term).mul_(factor)
            if not direct:
                piece.copy_(row)


def accumulate(total: Tensor, terms: Sequence[tuple[Tensor, float]], scratch: Scratch) -> None:
    """Writes Σ c_i x_i into a contiguous float64 tensor, x_i of the same shape and any floating dtype."""
    flat_terms = [(value.reshape(-1), factor) for value, factor in terms]
    whole = total.view(-1).zero_()
    for start, stop in spans(whole.numel(), whole.device):
        for value, factor in flat_terms:
            piece = value[start:stop]
            if piece.dtype != torch.float64:
                row = scratch.take("wide", stop - start, device=whole.device, dtype=torch.float64)
                piece = row.copy_(piece)
            whole[start:stop].add_(piece, alpha=factor)


def widened(value: Tensor, scratch: Scratch) -> Tensor:
    """The same numbers in float32; in a buffer that the next call overwrites, where they are of another dtype.

    What several sums need is converted once, and not by each, which takes a CPU longer than the sum.
    """
    if value.dtype == torch.float32:
        return value
    return scratch.take("widened", value.numel(), device=value.device).view(value.shape).copy_(value)


def difference(value: Tensor, base: Tensor, row: Tensor) -> Tensor:
    """Writes value − base into the float32 `row`; exact up to one rounding, also from half precision."""
    if value.dtype == base.dtype == torch.float32:
        return torch.sub(value, base, out=row)
    return row.copy_(value).sub_(base)


def smallest(value: Tensor, places: Sequence[int]) -> list[float]:
    """The entries of a flat float32 tensor that stand at these places, from 0, once it is sorted."""
    if value.device.type == "cpu":  # in a quarter of the time that torch takes to select one
        return [float(number) for number in np.partition(value.numpy(), places)[list(places)]]
    return [float(value.kthvalue(place + 1).values) for place in places]


def is_finite(value: Tensor) -> bool:
    """Whether there is neither NaN nor Inf; the extremes, which are found fast, show either."""
    if cpu.fits(every := value.reshape(-1)) and (answer := cpu.is_finite(every)) is not None:
        return answer
    if not value.numel() or value.dtype.itemsize == 1:  # torch knows no extremes of 8-bit floats
        return bool(value.to(torch.float32).isfinite().all())
    low, high = torch.aminmax(value)
    return bool(low.isfinite() and high.isfinite())

"""The kernels of `merging.kernels.gpu`, and how they are launched."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Entries of a program."""
LARGEST = tl.constexpr(3.4028234663852886e38)
TINY = tl.constexpr(1.1754943508222875e-38)
ENTRIES = {"all": 0, "sum": 1, "mean": 2}
"""What is added to the base: all that is kept, what has the elected sign, or its mean."""
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _row(line: tl.tensor, dtype: tl.constexpr, aligned: tl.constexpr) -> tl.tensor:
    """Where a row of the table begins."""
    place = tl.load(line).to(tl.pointer_type(dtype))
    if aligned:
        place = tl.multiple_of(place, 16)
    return place


@triton.jit
def _number(line: tl.tensor) -> tl.tensor:
    """A float32 of the table."""
    return tl.load(line).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def sum_kernel(
    table: tl.tensor,
    count: tl.tensor,
    out: tl.tensor,
    size: tl.tensor,
    dtype: tl.constexpr,
    aligned: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Σ c_i x_i in float32, rounded once."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < size
    total = tl.zeros([block], tl.float32)
    for t in range(count):
        line = table + 2 * t
        value = tl.load(_row(line, dtype, aligned) + at, mask=inside, other=0.0).to(tl.float32)
        total += _number(line + 1) * value
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _drawn(place: tl.tensor, key: tl.tensor, other: tl.tensor) -> tl.tensor:
    """Random numbers 0 … 65535 of entries by their places in the whole weight: see `random_masks`."""
    pair = place >> 1
    x = pair.to(tl.uint32) ^ key
    x = (x ^ (x >> 17)) * 0xED5AD4BB
    x = x ^ (other + (pair >> 32).to(tl.uint32))
    x = (x ^ (x >> 11)) * 0xAC4C1B51
    x = (x ^ (x >> 15)) * 0x31848BAB
    x = x ^ (x >> 14)
    return tl.where((place & 1) == 1, x >> 16, x & 0xFFFF).to(tl.int32)


@triton.jit
def combine_kernel(
    table: tl.tensor,
    count: tl.tensor,
    base: tl.tensor,
    out: tl.tensor,
    size: tl.tensor,
    scale: tl.tensor,
    level: tl.tensor,
    offset: tl.tensor,
    trimmed: tl.constexpr,
    entries: tl.constexpr,
    dtype: tl.constexpr,
    aligned: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """θ_0 + scale · f(α, τ), f a sum of what is kept of each task vector, as the loops of `loops.masked_sums` have it."""
    columns: tl.constexpr = 10 if trimmed else 4
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < size
    before = tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
    above = tl.zeros([block], tl.float32)
    below = tl.zeros([block], tl.float32)
    more = tl.zeros([block], tl.float32)
    fewer = tl.zeros([block], tl.float32)
    chance = tl.zeros([block], tl.int32)
    if trimmed:  # one number decides for all members
        chance = _drawn(offset + at, tl.load(table + 8).to(tl.uint32), tl.load(table + 9).to(tl.uint32))
    for t in range(count):
        line = table + columns * t
        factor = _number(line + 1)
        delta = tl.load(_row(line, dtype, aligned) + at, mask=inside, other=0.0).to(tl.float32) - before
        if trimmed:
            low = tl.where(chance < tl.load(line + 6).to(tl.int32), _number(line + 2), _number(line + 3))
            high = tl.where(chance < tl.load(line + 7).to(tl.int32), _number(line + 4), _number(line + 5))
            size_of = tl.abs(delta)
            kept = factor * tl.where((size_of <= low) | ((size_of > high) & (size_of <= LARGEST)), 0.0, delta)
        else:
            key, other = tl.load(line + 2).to(tl.uint32), tl.load(line + 3).to(tl.uint32)
            kept = delta * tl.where(_drawn(offset + at, key, other) >= level, factor, 0.0)
        if entries == 0:
            above += kept
        else:  # NaN goes to both
            above += tl.where(kept < 0.0, 0.0, kept)
            below += tl.where(kept > 0.0, 0.0, kept)
        if entries == 2:
            more += tl.where(kept > 0.0, tl.abs(factor), 0.0)
            fewer += tl.where(kept < 0.0, tl.abs(factor), 0.0)
    if entries == 0:
        moved = above
    else:
        both = above + below
        moved = tl.where(both == 0.0, 0.0, tl.where(both > 0.0, above, below))
        if entries == 2:
            agreeing = tl.where(both > 0.0, more, fewer)
            moved = moved / tl.where(agreeing < TINY, TINY, agreeing)
    tl.store(out + at, (before + scale * moved).to(out.dtype.element_ty), mask=inside)


def launch_sum(table: Tensor, count: int, dtype: torch.dtype, out: Tensor, *, aligned: bool) -> None:
    """Runs `sum_kernel` over all entries.

    Args:
        table: Of every row its address, and c as a float32's bits, int64 [count, 2].
        count: Number of rows.
        dtype: Of the rows.
        out: Overwritten, flat.
        aligned: Whether every row begins at a multiple of sixteen bytes.
    """
    size = out.numel()
    grid = (triton.cdiv(size, BLOCK),)
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        sum_kernel[grid](table, count, out, size, dtype=DTYPES[dtype], aligned=aligned, block=BLOCK)


def launch_combine(
    table: Tensor,
    count: int,
    dtype: torch.dtype,
    base: Tensor,
    out: Tensor,
    *,
    scale: float,
    level: int,
    offset: int,
    trimmed: bool,
    entries: str,
    aligned: bool,
) -> None:
    """Runs `combine_kernel` over all entries.

    Args:
        table: Of every member its row's address, and α as a float32's bits; then magnitudes that an entry must exceed and
            must not exceed, each where its random number is below a level and where not, these levels, and everybody's two
            keys of random numbers, int64 [count, 10]; or the two keys of its own random numbers, int64 [count, 4].
        count: Number of members.
        dtype: Of their rows.
        base: θ_0, flat.
        out: Overwritten, flat.
        scale: Of what is added to the base.
        level: Entries with a random number below it are dropped, of 65536.
        offset: The first entry's place in the whole weight, for random numbers.
        trimmed: Whether magnitudes decide what is kept, and not chance.
        entries: Key of `ENTRIES`.
        aligned: Whether every row begins at a multiple of sixteen bytes.
    """
    size = out.numel()
    chosen = {"trimmed": trimmed, "entries": ENTRIES[entries], "dtype": DTYPES[dtype], "aligned": aligned}
    grid = (triton.cdiv(size, BLOCK),)
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        combine_kernel[grid](table, count, base, out, size, scale, level, offset, **chosen, block=BLOCK)

"""How often the magnitudes of task-vector entries occur, in bins of bit patterns or, within a band of them, exactly.

A float32 magnitude's bits, read as an integer, are in the order of the magnitudes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from merging.methods import fused
from merging.methods.base import Weight
from merging.methods.blocks import Scratch, difference, spans, widened

FULL_BELOW = 1 << 14
"""Weights with no more entries than this have histograms of whole bit patterns."""
DROPPED = 15
"""Bits that the histograms of larger weights don't tell apart: bins 0.8 % wide or less, each with about a thousandth of a
model's entries."""
SAMPLED_DROPPED = 8
"""The same of a sample's: bins fine enough for a narrow band, and no more of them however large the model."""
STRIDE = 509
"""One of so many entries is sampled; a prime, so that no matrix has all of its sample in a few columns."""
INFINITE = 0x7F800000
"""Bit pattern above every finite magnitude's."""

Patterns = npt.NDArray[np.int32]
Integers = npt.NDArray[np.int64]
Band = tuple[int, int]
"""Bit patterns, from the first up to and without the second."""


@dataclass(frozen=True)
class Histogram:
    """How often each magnitude occurs in one member's task vector of one weight.

    Args:
        keys: Bit patterns of |τ| (float32) without their `dropped` last bits, ascending; int64, on the CPU.
        counts: Entries of each; int64.
        dropped: Number of bits left out of the keys.
    """

    keys: Tensor
    counts: Tensor
    dropped: int

    def within(self, band: Band) -> int:
        """Entries in a band that cuts no bin."""
        patterns = self.keys << self.dropped
        return int(self.counts[(patterns >= band[0]) & (patterns < band[1])].sum())


@dataclass(frozen=True)
class Tally:
    """The entries of one member's task vector in a band, pattern by pattern, in one stretch of a weight.

    Args:
        above: Number of entries above the band.
        keys: Bit patterns of those within, ascending [n].
        reaching: How many of those within have this pattern or a higher one [n + 1]; the last is 0.
    """

    above: int
    keys: Patterns
    reaching: Integers

    def at_least(self, key: int) -> int:
        """Entries within that have this pattern or a higher one."""
        return int(self.reaching[np.searchsorted(self.keys, np.int32(key))])


def histogram(weight: Weight, member: str, scratch: Scratch) -> Histogram:
    """A member's magnitudes, of all entries."""
    numel = weight.base.numel()
    if numel <= FULL_BELOW:
        every = [bits.clone() for _, _, bits in _magnitudes(weight, [member], scratch)]
        return _counted(torch.cat(every) if every else torch.empty(0, dtype=torch.int32), 0)
    size = 1 << (31 - DROPPED)
    base, value = weight.base.reshape(-1), weight.members[member].reshape(-1)
    if fused.fits(base, value):
        dense = fused.histogram(value, base, DROPPED)
        keys = dense.nonzero().squeeze(1)
        return Histogram(keys, dense[keys], DROPPED)
    dense = torch.zeros(size, dtype=torch.int64, device=weight.base.device)
    for _, _, bits in _magnitudes(weight, [member], scratch):
        dense += torch.bincount(bits.bitwise_right_shift_(DROPPED), minlength=size)
    dense = dense.cpu()
    keys = dense.nonzero().squeeze(1)
    return Histogram(keys, dense[keys], DROPPED)


def sampled_histograms(weight: Weight) -> dict[str, Histogram]:
    """All members' magnitudes, of every `STRIDE`th entry."""
    base = weight.base.reshape(-1)[::STRIDE].float()
    found = {}
    for member, value in weight.members.items():
        deltas = value.reshape(-1)[::STRIDE].float() - base
        found[member] = _counted(deltas.abs_().view(torch.int32) >> SAMPLED_DROPPED, SAMPLED_DROPPED)
    return found


def added(histograms: Sequence[Histogram]) -> Histogram:
    """One histogram of all, with the coarsest of their bins."""
    if len(histograms) == 1:
        return histograms[0]
    dropped = max(found.dropped for found in histograms)
    every = torch.cat([found.keys >> (dropped - found.dropped) for found in histograms])
    keys, place = every.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    counts = torch.zeros_like(keys).index_add_(0, place, torch.cat([found.counts for found in histograms]))
    return Histogram(keys, counts, dropped)


def tallies(weight: Weight, asked: Sequence[tuple[str, Band]], scratch: Scratch) -> list[Tally]:
    """For some members, each with a band, the entries in it."""
    base = weight.base.reshape(-1)
    widest = max((band[1] - band[0] for _, band in asked), default=0)
    if widest <= fused.WIDEST and fused.fits(base, *(weight.members[member].reshape(-1) for member, _ in asked)):
        found = []
        for member, band in asked:
            room = scratch.take("patterns", band[1] - band[0], device=base.device, dtype=torch.int32)
            higher, keys, counts = fused.within(weight.members[member].reshape(-1), base, band, room)
            found.append(_tally(higher, keys, counts))
        return found
    members = sorted({member for member, _ in asked})
    above = [0] * len(asked)
    within: list[list[Patterns]] = [[] for _ in asked]
    for _, member, bits in _magnitudes(weight, members, scratch):
        for number, (who, band) in enumerate(asked):
            if who == member:
                higher, _, patterns = _split(bits, band)
                above[number] += higher
                within[number].append(patterns)
    sorted_out = [np.unique(np.concatenate([np.empty(0, np.int32), *found]), return_counts=True) for found in within]
    return [_tally(higher, *counted) for higher, counted in zip(above, sorted_out, strict=True)]


def entries(weight: Weight, member: str, band: Band, scratch: Scratch) -> Integers:
    """Flat indices, in the whole weight and ascending, of the entries in a band."""
    found = [_split(bits, band)[1] + start for start, _, bits in _magnitudes(weight, [member], scratch)]
    return np.concatenate(found) + weight.start


def _magnitudes(weight: Weight, members: Sequence[str], scratch: Scratch) -> Iterator[tuple[int, str, Tensor]]:
    """Block by block, and in each member by member: its first index here, who, and bit patterns of |τ|, int32 [n].

    They are in a buffer that is overwritten next.
    """
    base = weight.base.reshape(-1)
    values = {member: weight.members[member].reshape(-1) for member in members}
    for start, stop in spans(base.numel(), base.device):
        before = widened(base[start:stop], scratch)
        row = scratch.take("bits", stop - start, device=base.device)
        for member, value in values.items():
            yield start, member, difference(value[start:stop], before, row).abs_().view(torch.int32)


def _split(bits: Tensor, band: Band) -> tuple[int, Integers, Patterns]:
    """The number of entries above a band; places and patterns of those within."""
    low, high = band
    if bits.device.type != "cpu":
        here = ((bits >= low) & (bits < high)).nonzero()[:, 0]
        return int((bits >= high).sum()), here.cpu().numpy(), bits[here].cpu().numpy()
    # numpy compares, counts and lists at several times the speed of torch on a CPU
    values: Patterns = bits.numpy()
    places = np.flatnonzero((values - np.int32(low)).view(np.uint32) < np.uint32(high - low))
    return int(np.count_nonzero(values >= np.int32(high))), places, values[places]


def _counted(keys: Tensor, dropped: int) -> Histogram:
    # numpy sorts at several times the speed of torch on a CPU
    found, counts = np.unique(keys.cpu().numpy(), return_counts=True)
    return Histogram(torch.from_numpy(found).long(), torch.from_numpy(counts), dropped)


def _tally(above: int, keys: Patterns, counts: Integers) -> Tally:
    return Tally(above, keys, np.append(counts[::-1].cumsum()[::-1], 0))

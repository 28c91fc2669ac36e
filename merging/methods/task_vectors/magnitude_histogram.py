"""How often the magnitudes of task-vector entries occur, in bins of bit patterns or, within a band of them, exactly.

A float32 magnitude's bits, read as an integer, are in the order of the magnitudes.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from merging.kernels import cpu
from merging.kernels.blockwise import Scratch, difference, spans, widened
from merging.methods.method import Weight

FULL_BELOW = 1 << 14
"""Weights with no more entries than this have histograms of whole bit patterns."""
DROPPED = 15
"""Bits that the histograms of larger weights don't tell apart: bins 0.8 % wide or less, each with about a thousandth of a
model's entries."""
SAMPLED_DROPPED = 12
"""The same of a sample's: bins fine enough for a narrow band, and no more of them however large the model."""
RUN = 32
"""Entries that are sampled side by side: a line of a cache, which costs no more to read than one of them."""
PERIOD = 1 << 14
"""Entries of which one run is sampled, at a place drawn by chance, so that no matrix has its sample in a few columns."""
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
class Sample:
    """The magnitudes of some of a member's entries, which were drawn in runs.

    What lies side by side in a weight is often alike, so that a run says less than as many entries drawn one by one: how
    much less, the squares tell.

    Args:
        keys: Bit patterns of |τ| (float32) without their last `SAMPLED_DROPPED` bits, ascending [n], int32.
        counts: Entries of each [n], int64.
        squares: By how much each adds to the sum over the runs of the squared number of entries so far, where entries come
            in descending order [n], int64.
    """

    keys: Patterns
    counts: Integers
    squares: Integers


@dataclass(frozen=True)
class BandCounts:
    """The entries of one member's task vector in a band, pattern by pattern, in one chunk of a weight.

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
    dense = cpu.histogram(value, base, DROPPED) if cpu.fits(base, value) else None
    if dense is None:
        dense = torch.zeros(size, dtype=torch.int64, device=weight.base.device)
        for _, _, bits in _magnitudes(weight, [member], scratch):
            dense += torch.bincount(bits.bitwise_right_shift_(DROPPED), minlength=size)
        dense = dense.cpu()
    keys = dense.nonzero().squeeze(1)
    return Histogram(keys, dense[keys], DROPPED)


def samples(weights: Iterable[Weight]) -> tuple[dict[str, Sample], int]:
    """All members' magnitudes, of the same runs of entries; and the number of entries that these were drawn from."""
    deltas: dict[str, list[Tensor]] = {}
    size = 0
    for weight in weights:
        base = weight.base.reshape(-1)
        size += base.numel()
        here = _drawn(weight).to(base.device)
        before = base.index_select(0, here).float()
        for member, value in weight.members.items():
            deltas.setdefault(member, []).append(value.reshape(-1).index_select(0, here).float().sub_(before))
    return {member: _sample(torch.cat(drawn)) for member, drawn in deltas.items()}, size


def _drawn(weight: Weight) -> Tensor:
    """The places of a weight's entries that are sampled, run after run."""
    chance = np.random.default_rng([crc32(weight.name.encode()), weight.start])
    starts = np.arange(0, weight.base.numel(), PERIOD)
    starts += chance.integers(PERIOD, size=len(starts))
    whole = starts[starts + RUN <= weight.base.numel()]
    return torch.from_numpy((whole[:, None] + np.arange(RUN)).reshape(-1))


def _sample(deltas: Tensor) -> Sample:
    """The magnitudes of whole runs."""
    keys = (deltas.abs_().view(torch.int32) >> SAMPLED_DROPPED).view(-1, RUN).cpu().numpy()
    # the j-th largest of a run, from 1, adds j² − (j − 1)² = 2j − 1: sorted by key and, within the keys, by j
    coded = np.sort((np.sort(keys, axis=1) * RUN + np.arange(RUN, dtype=np.int32)).reshape(-1))
    odd = 2 * (RUN - coded % RUN) - 1
    return _grouped(coded // RUN, np.ones(len(coded), np.int64), odd.astype(np.int64))


def pooled(first: Sample, second: Sample) -> Sample:
    """Both samples as one."""
    keys = np.concatenate([first.keys, second.keys])
    order = np.argsort(keys, kind="stable")  # which merges what is sorted
    counts, squares = (
        np.concatenate([first.counts, second.counts]),
        np.concatenate([first.squares, second.squares]),
    )
    return _grouped(keys[order], counts[order], squares[order])


def _grouped(keys: Patterns, counts: Integers, squares: Integers) -> Sample:
    """What equal keys, which follow each other, have together."""
    if not len(keys):
        return Sample(keys, counts, squares)
    starts = np.concatenate([[0], np.flatnonzero(keys[1:] != keys[:-1]) + 1])
    return Sample(keys[starts], np.add.reduceat(counts, starts), np.add.reduceat(squares, starts))


def added(histograms: Sequence[Histogram]) -> Histogram:
    """One histogram of all, with the coarsest of their bins."""
    if len(histograms) == 1:
        return histograms[0]
    dropped = max(one.dropped for one in histograms)
    every = torch.cat([one.keys >> (dropped - one.dropped) for one in histograms])
    keys, place = every.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    counts = torch.zeros_like(keys).index_add_(0, place, torch.cat([one.counts for one in histograms]))
    return Histogram(keys, counts, dropped)


def tallies(weight: Weight, questions: Sequence[tuple[str, Band]], scratch: Scratch) -> list[BandCounts]:
    """For some members, each with a band, the entries in it."""
    base = weight.base.reshape(-1)
    if not questions:
        return []
    widths = [band[1] - band[0] for _, band in questions]
    few = base.numel() <= FULL_BELOW  # fewer than there would be counters
    if (
        not few
        and max(widths) <= cpu.WIDEST
        and cpu.fits(base, *(weight.members[who].reshape(-1) for who, _ in questions))
    ):
        together = [questions] if sum(widths) <= cpu.WIDEST else [[question] for question in questions]
        counts = [_within(weight, some, scratch) for some in together]
        if None not in counts:
            return [_tally(*one) for some in counts for one in some or ()]
    members = sorted({member for member, _ in questions})
    above = [0] * len(questions)
    within: list[list[Patterns]] = [[] for _ in questions]
    for _, member, bits in _magnitudes(weight, members, scratch):
        for number, (who, band) in enumerate(questions):
            if who == member:
                higher, patterns = _split(bits, band)
                above[number] += higher
                within[number].append(patterns)
    sorted_out = [
        np.unique(np.concatenate([np.empty(0, np.int32), *several]), return_counts=True) for several in within
    ]
    return [_tally(higher, *counted) for higher, counted in zip(above, sorted_out, strict=True)]


def _within(
    weight: Weight, questions: Sequence[tuple[str, Band]], scratch: Scratch
) -> list[tuple[int, Patterns, Integers]] | None:
    """The same by a compiled loop, with a counter for every pattern."""
    values, bands = [weight.members[member].reshape(-1) for member, _ in questions], [band for _, band in questions]
    size = sum(high - low for low, high in bands)
    room = scratch.take("patterns", size, device=weight.base.device, dtype=torch.int32)
    return cpu.within(values, weight.base.reshape(-1), bands, room)


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


def _split(bits: Tensor, band: Band) -> tuple[int, Patterns]:
    """The number of entries above a band, and the patterns of those within."""
    low, high = band
    if bits.device.type != "cpu":
        return int((bits >= high).sum()), bits[(bits >= low) & (bits < high)].cpu().numpy()
    # numpy compares and counts at several times the speed of torch on a CPU
    values: Patterns = bits.numpy()
    within = (values - np.int32(low)).view(np.uint32) < np.uint32(high - low)
    return int(np.count_nonzero(values >= np.int32(high))), values[within]


def _counted(keys: Tensor, dropped: int) -> Histogram:
    # numpy sorts at several times the speed of torch on a CPU
    distinct, counts = np.unique(keys.cpu().numpy(), return_counts=True)
    return Histogram(torch.from_numpy(distinct).long(), torch.from_numpy(counts), dropped)


def _tally(above: int, keys: Patterns, counts: Integers) -> BandCounts:
    return BandCounts(above, keys, np.append(counts[::-1].cumsum()[::-1], 0))

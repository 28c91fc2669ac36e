"""The k largest task-vector entries of a tensor or of a whole model, by counting bit patterns, not sorting.

A float32 magnitude's bits, read as an integer, are in the order of the magnitudes. A histogram of them adds
up over the weights of a model, wherever these lie, and says in which bin the k-th largest entry is. What is
left to settle is which entries *of that bin* are kept. Where the whole model is at hand its bin's entries are
fetched and compared in full; of those that are equal, the first by weight name and flat index are kept, so
that exactly k remain. Where only a part of the model is at hand, entries of one bin count as equal.
Histograms of small weights have one bin a bit pattern, those of larger ones drop the last 15 bits (bins 0.8 %
wide or less, each with about a thousandth of a model's entries).
"""

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from merging.methods.base import Weight
from merging.methods.blocks import Scratch, difference, spans

FULL_BELOW = 1 << 14
"""Weights with no more entries than this have histograms of whole bit patterns."""
DROPPED = 15
"""Bits that the histograms of larger weights don't tell apart."""


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


Survey = Mapping[str, Mapping[str, Histogram]]
"""Weight → member → histogram."""


@dataclass(frozen=True)
class Cut:
    """Where a task vector is trimmed: entries above a magnitude stay; it is lower before a place.

    Args:
        before: Entries up to the place stay where their magnitude is above this.
        after: Entries behind it stay where their magnitude is above this.
        weight: The weight that holds the place; names before it are before it.
        index: Flat index in that weight of the last entry before the place.
    """

    before: float
    after: float
    weight: str = ""
    index: int = -1

    def apply(self, row: Tensor, weight: str, start: int) -> None:
        """Sets the entries that do not stay to 0.

        Args:
            row: Entries [start, start + n) of a task vector, float32; overwritten.
            weight: The name of the weight that they belong to.
            start: Flat index of the first.
        """
        place = row.numel() if weight < self.weight else 0
        if weight == self.weight:
            place = min(max(self.index + 1 - start, 0), row.numel())
        for piece, above in ((row[:place], self.before), (row[place:], self.after)):
            if piece.numel():
                torch.ops.aten.hardshrink.out(piece, above, out=piece)


KEEP_ALL = Cut(0.0, 0.0)


def survey(weights: Iterable[Weight]) -> dict[str, dict[str, Histogram]]:
    """Histograms of the task vectors of some weights."""
    scratch = Scratch()
    return {
        weight.name: {member: _histogram(weight, member, scratch) for member in sorted(weight.members)}
        for weight in weights
    }


def _bits(weight: Weight, member: str, start: int, stop: int, scratch: Scratch) -> Tensor:
    """Bit patterns [stop − start] of |τ|, int32, in a buffer that the next call overwrites."""
    row = scratch.take("bits", stop - start, device=weight.base.device)
    difference(weight.members[member].reshape(-1)[start:stop], weight.base.reshape(-1)[start:stop], row)
    return row.abs_().view(torch.int32)


def _histogram(weight: Weight, member: str, scratch: Scratch) -> Histogram:
    numel = weight.base.numel()
    if numel <= FULL_BELOW:
        keys, counts = _bits(weight, member, 0, numel, scratch).unique(return_counts=True)  # type: ignore[no-untyped-call]
        return Histogram(keys.long().cpu(), counts.cpu(), 0)
    size = 1 << (31 - DROPPED)
    dense = torch.zeros(size, dtype=torch.int64, device=weight.base.device)
    for start, stop in spans(numel, weight.base.device):
        bits = _bits(weight, member, start, stop, scratch).bitwise_right_shift_(DROPPED)
        dense += torch.bincount(bits, minlength=size)
    dense = dense.cpu()
    keys = dense.nonzero().squeeze(1)
    return Histogram(keys, dense[keys], DROPPED)


def _sum(histograms: Sequence[Histogram]) -> Histogram:
    """One histogram of all, with the coarsest of their bins."""
    dropped = max(histogram.dropped for histogram in histograms)
    every = torch.cat([h.keys >> (dropped - h.dropped) for h in histograms])
    keys, place = every.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    counts = torch.zeros_like(keys).index_add_(0, place, torch.cat([h.counts for h in histograms]))
    return Histogram(keys, counts, dropped)


def _magnitude(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", max(bits, 0)))[0])


def _nth(shares: Mapping[str, int], number: int) -> tuple[str, int]:
    """The weight that holds the number-th (from 1) of these entries, and its place (from 0) there."""
    for name, share in shares.items():
        if number <= share:
            return name, number - 1
        number -= share
    raise AssertionError("more entries asked for than were counted")


class Trimmer:
    """Finds the cuts of the prepared members, whatever the density; those found are remembered.

    Args:
        weights: The weights at hand.
        histograms: The survey of the whole model.
    """

    def __init__(self, weights: Sequence[Weight], histograms: Survey) -> None:
        self._weights = {weight.name: weight for weight in weights}
        self._histograms = histograms
        self._scratch = Scratch()
        self.whole = lru_cache(maxsize=4096)(self._whole)
        self.tensor = lru_cache(maxsize=1 << 17)(self._tensor)
        self._ranked = lru_cache(maxsize=None)(self._rank)

    def _whole(self, member: str, density: float) -> Cut:
        """The cut that keeps this share of a member's entries over the whole model."""
        return self._cut(tuple(sorted(self._histograms)), member, density)

    def _tensor(self, weight: str, member: str, density: float) -> Cut:
        """The cut that keeps this share of a member's entries in one weight."""
        return self._cut((weight,), member, density)

    def _rank(self, names: tuple[str, ...], member: str) -> tuple[Histogram, Tensor]:
        """The histogram over these weights, and for each of its bins the entries in it and above it."""
        histogram = _sum([self._histograms[name][member] for name in names])
        return histogram, histogram.counts.flip(0).cumsum(0).flip(0)

    def _cut(self, names: tuple[str, ...], member: str, density: float) -> Cut:
        histogram, reaching = self._ranked(names, member)
        entries = int(reaching[0]) if reaching.numel() else 0
        keep = min(max(round(density * entries), 1), entries)
        if keep == entries:
            return KEEP_ALL
        bin_ = int((reaching >= keep).sum()) - 1
        key, dropped = int(histogram.keys[bin_]), histogram.dropped
        wanted = keep - int(reaching[bin_]) + int(histogram.counts[bin_])
        if dropped and all(name in self._weights for name in names):
            found = {name: self._entries(name, member, key, dropped) for name in names}
            ranked = torch.cat([bits for _, bits in found.values()]).sort(descending=True).values
            key, dropped = int(ranked[wanted - 1]), 0
            wanted -= int((ranked > key).sum())
            shares = {name: int((bits == key).sum()) for name, (_, bits) in found.items()}
        else:
            shares = {name: self._count(name, member, key, dropped) for name in names}
        before, after = _magnitude((key << dropped) - 1), _magnitude(((key + 1) << dropped) - 1)
        name, rank = _nth(shares, wanted)
        index = int(self._entries(name, member, key, dropped)[0][rank]) if name in self._weights else -1
        return Cut(before, after, name, index)

    def _count(self, name: str, member: str, key: int, dropped: int) -> int:
        histogram = self._histograms[name][member]
        return int(histogram.counts[histogram.keys >> (dropped - histogram.dropped) == key].sum())

    def _entries(self, name: str, member: str, key: int, dropped: int) -> tuple[Tensor, Tensor]:
        """Flat indices (ascending) and bit patterns of a weight's entries in one bin; int64, on the CPU."""
        weight = self._weights[name]
        indices, patterns = [], []
        for start, stop in spans(weight.base.numel(), weight.base.device):
            bits = _bits(weight, member, start, stop, self._scratch)
            bins = bits >> dropped if dropped else bits
            # numpy compares and lists at several times the speed of torch on a CPU.
            here = (
                torch.from_numpy((bins.numpy() == key).nonzero()[0])
                if bins.device.type == "cpu"
                else (bins == key).nonzero()[:, 0]
            )
            patterns.append(bits[here].long().cpu())
            indices.append(here.cpu() + start)
        return torch.cat(indices), torch.cat(patterns)

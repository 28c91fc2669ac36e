"""The k largest task-vector entries of a tensor or of a whole model, by counting bit patterns, not sorting.

A histogram of magnitudes adds up over the weights of a model, wherever these lie, and says in which bin the k-th largest
entry is. What is left to settle is which entries *of that bin* are kept: they are counted once more by all of their bits, by
`second_pass` where the model is prepared in parts, else when a density is first asked for. Of those that are equal, as many are
kept as are wanted, by a random number of (weight, index) that is the same for all members: k remain in expectation, and no
layer, row or sharding is favoured. A bfloat16 model's task vectors have so few distinct magnitudes that a large part of all
entries are equal.

One candidate alone needs no histogram of everything: a sample of the entries names a band that holds the k-th largest but
for bad luck, `second_pass` counts the entries in it and above it, and, where luck was bad, all of them.
"""

import struct
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from merging.kernels import cpu
from merging.kernels.blockwise import Scratch
from merging.methods.method import Weight
from merging.methods.task_vectors.magnitude_histogram import (
    INFINITE,
    RUN,
    SAMPLED_DROPPED,
    Band,
    BandCounts,
    Histogram,
    Sample,
    added,
    histogram,
    pooled,
    samples,
    tallies,
)
from merging.methods.task_vectors.random_masks import LEVELS, Chance, keys, level

SPREAD = 4.0
"""Standard errors of a sample's share that its band reaches to either side."""

SEED, EVERYBODY = 0, ""
"""Of the random numbers that settle between equal entries: the same for all members, so that copies are trimmed alike."""
NOTHING = torch.empty(0, dtype=torch.int16)

Place = tuple[str, int]
"""A chunk of a weight: the weight's name, the flat index of the first entry."""
Question = tuple[str, str, Band]
"""A band to be counted by all bits: the weight's name ("" for the whole model), the member, the band."""

Missing = Mapping[str, Sequence[tuple[str, Band]]]
"""What is to be counted of a group: members, each with a band."""


@dataclass(frozen=True)
class MagnitudeStatistics:
    """What is known of the magnitudes of a model's task vectors, or of a part's.

    Args:
        histograms: Weight → member → magnitudes.
        chunked: Weights that were passed over in several chunks.
        tallies: Bands that were counted by all bits, chunk by chunk.
        sampled: Member → magnitudes of a sample of the whole model's entries; the same entries of all.
        sampled_from: Number of entries that were sampled from.
    """

    histograms: Mapping[str, Mapping[str, Histogram]] = field(default_factory=dict)
    chunked: frozenset[str] = frozenset()
    tallies: Mapping[Question, Mapping[Place, BandCounts]] = field(default_factory=dict)
    sampled: Mapping[str, Sample] = field(default_factory=dict)
    sampled_from: int = 0
    _ranked: dict[tuple[str, str], tuple[Histogram, Tensor]] = field(default_factory=dict, compare=False, repr=False)
    _settled: dict[Question, tuple[int, int, float]] = field(default_factory=dict, compare=False, repr=False)
    _missing: dict[tuple[tuple[float, ...], bool], Missing | None] = field(
        default_factory=dict, compare=False, repr=False
    )

    @property
    def members(self) -> list[str]:
        """All that were looked at."""
        return sorted({*self.sampled, *(member for histograms in self.histograms.values() for member in histograms)})

    def names(self, group: str) -> tuple[str, ...]:
        """The weights of a group."""
        return (group,) if group else tuple(sorted(self.histograms))

    def ranked(self, group: str, member: str) -> tuple[Histogram, Tensor]:
        """The histogram over a group, and for each of its bins the number of entries in it and above it."""
        if (group, member) not in self._ranked:
            total = added([self.histograms[name][member] for name in self.names(group)])
            self._ranked[group, member] = total, total.counts.flip(0).cumsum(0).flip(0)
        return self._ranked[group, member]

    def kept(self, group: str, member: str, density: float) -> int | None:
        """How many entries a share of a group is; None where it is all of them."""
        total = int(self.ranked(group, member)[0].counts.sum()) if self.histograms else self.sampled_from
        keep = min(max(round(density * total), 1), total)
        return None if keep == total else keep

    def band(self, group: str, member: str, keep: int) -> Band:
        """The bin that holds the `keep`-th largest entry of a group; the band that does most likely, if from a sample."""
        if not self.histograms:
            return _likely(self.sampled[member], keep / self.sampled_from)
        magnitudes, reaching = self.ranked(group, member)
        key = int(magnitudes.keys[int((reaching >= keep).sum()) - 1])
        return key << magnitudes.dropped, (key + 1) << magnitudes.dropped

    def is_open(self, group: str, member: str) -> bool:
        """Whether a bin's count does not say which of its entries stay."""
        several = group in self.chunked if group else bool(self.chunked)
        return not self.histograms or several or bool(self.ranked(group, member)[0].dropped)

    def misses(self, question: Question, keep: int) -> bool:
        """Whether a band was counted, and does not hold the `keep`-th largest entry."""
        counted = self.tallies.get(question, {}).values()
        above = sum(tally.above for tally in counted)
        return bool(counted) and not above < keep <= above + sum(int(tally.reaching[0]) for tally in counted)

    def missing(self, densities: Sequence[float], whole: bool) -> Missing | None:
        """What is still to be counted, so that these densities are settled; None where a band missed, and all is."""
        key = (*densities,), whole
        if key not in self._missing:
            self._missing[key] = self._open_questions(densities, whole)
        return self._missing[key]

    def _open_questions(self, densities: Sequence[float], whole: bool) -> Missing | None:
        questions: dict[str, list[tuple[str, Band]]] = {}
        for group in [""] if whole else sorted(self.chunked):
            for member in self.members:
                for density in densities:
                    keep = self.kept(group, member, density)
                    if keep is None or not self.is_open(group, member):
                        continue
                    band = self.band(group, member, keep)
                    if self.misses((group, member, band), keep):
                        return None
                    if (group, member, band) not in self.tallies and (member, band) not in questions.get(group, []):
                        questions.setdefault(group, []).append((member, band))
        return questions

    def settled(self, question: Question, keep: int) -> tuple[int, float]:
        """The `keep`-th largest entry: its bit pattern, and the share of its equals that are kept."""
        if question not in self._settled or self._settled[question][0] != keep:
            self._settled[question] = keep, *_settled(question[2], self.tallies[question], keep)
        return self._settled[question][1:]


@dataclass(frozen=True)
class Cut:
    """Where a task vector is trimmed: an entry stays where its magnitude is above a threshold, one of two by chance.

    Args:
        low: The threshold of entries whose random number, of `LEVELS`, is below `level`.
        high: Of all others.
        level: 0 … `LEVELS`.
    """

    low: float
    high: float
    level: int

    @property
    def is_tied(self) -> bool:
        """Whether chance has a say."""
        return self.low != self.high

    def apply(self, row: Tensor, numbers: Tensor) -> None:
        """Sets the entries that do not stay to 0.

        Args:
            row: Entries of a task vector, float32; overwritten.
            numbers: Their random numbers as `Trimmer.numbers` has them; not looked at unless `is_tied`.
        """
        if self is KEEP_ALL:
            return
        if not self.is_tied:
            torch.ops.aten.hardshrink.out(row, self.low, out=row)
            return
        above = torch.where(numbers < self.level - LEVELS // 2, self.low, self.high)
        row.masked_fill_(row.abs() <= above, 0.0)

    def bounds(self, outliers: "Cut | None" = None) -> cpu.Bounds:
        """The same for the compiled loops; less the entries that another cut keeps."""
        above = (self.low, self.high)
        if outliers is None:
            return cpu.Bounds(above, self.level)
        return cpu.Bounds(above, self.level, (outliers.low, outliers.high), outliers.level)


KEEP_ALL = Cut(0.0, 0.0, LEVELS)


def global_pass(weights: Iterable[Weight]) -> MagnitudeStatistics:
    """Histograms of the task vectors of some weights, or chunks of weights."""
    scratch = Scratch()
    total = MagnitudeStatistics()
    for weight in weights:
        histograms = {member: histogram(weight, member, scratch) for member in sorted(weight.members)}
        total = combine(total, MagnitudeStatistics({weight.name: histograms}))
    return total


def sample(weights: Iterable[Weight]) -> MagnitudeStatistics:
    """Histograms of a sample of the task vectors' entries in some weights, or chunks of weights, taken together."""
    drawn, size = samples(weights)
    return MagnitudeStatistics(sampled=drawn, sampled_from=size)


def combine(first: MagnitudeStatistics | None, second: MagnitudeStatistics | None) -> MagnitudeStatistics:
    """What is known of both; two chunks of one weight add up."""
    one, other = first or MagnitudeStatistics(), second or MagnitudeStatistics()
    both = one.histograms.keys() & other.histograms.keys()
    joined = {
        name: {
            member: added([one.histograms[name][member], theirs]) for member, theirs in other.histograms[name].items()
        }
        for name in both
    }
    questions = {*one.tallies, *other.tallies}
    counted = {question: {**one.tallies.get(question, {}), **other.tallies.get(question, {})} for question in questions}
    drawn = {m: pooled(one.sampled[m], other_sample) for m, other_sample in other.sampled.items() if m in one.sampled}
    return MagnitudeStatistics(
        {**one.histograms, **other.histograms, **joined},
        one.chunked | other.chunked | both,
        counted,
        {**one.sampled, **other.sampled, **drawn},
        one.sampled_from + other.sampled_from,
    )


def second_pass(
    weights: Iterable[Weight], known: MagnitudeStatistics, densities: Sequence[float], *, whole: bool
) -> MagnitudeStatistics | None:
    """The bands in which densities are reached, counted by all bits, in some weights.

    Args:
        weights: Some of the weights passed over, or chunks.
        known: Of all weights.
        densities: Shares of entries that stay.
        whole: Of the whole model, not of each weight. A weight that is looked at as a whole needs no refinement of its own.

    Returns:
        None where enough is known.
    """
    missing = known.missing(densities, whole)
    if missing is None:
        return global_pass(weights)
    if not missing:
        return None
    scratch = Scratch()
    by_question: dict[Question, dict[Place, BandCounts]] = {}
    for weight in weights:
        groups = [(group, question) for group in ("", weight.name) for question in missing.get(group, [])]
        counted = tallies(weight, [question for _, question in groups], scratch)
        for (group, (member, band)), tally in zip(groups, counted, strict=True):
            by_question.setdefault((group, member, band), {})[weight.name, weight.start] = tally
    return MagnitudeStatistics(tallies=by_question)


class Trimmer:
    """Finds the cuts of the prepared members, whatever the density; those found are remembered.

    Args:
        weights: The weights at hand.
        global_stats: Of the whole model; if of a sample, refined for the densities that will be asked for.
    """

    def __init__(self, weights: Sequence[Weight], global_stats: MagnitudeStatistics) -> None:
        self._weights = {(weight.name, weight.start): weight for weight in weights}
        self._global_stats = global_stats
        self._scratch = Scratch()
        self._chance = Chance()
        self.cut = lru_cache(maxsize=1 << 17)(self._cut)

    def keys(self, weight: Weight) -> tuple[int, int]:
        """What the random numbers that settle between equal entries of a weight follow from."""
        return keys(SEED, EVERYBODY, weight.name)

    def numbers(self, weight: Weight, start: int, size: int, cuts: Iterable[Cut]) -> Tensor:
        """Random numbers of a weight's entries, from a flat index on; none where none of the cuts asks for them."""
        if not any(cut.is_tied for cut in cuts):
            return NOTHING
        first = start - weight.start
        return self._chance.numbers(SEED, EVERYBODY, weight)[first : first + size]

    def _cut(self, member: str, density: float, weight: str = "") -> Cut:
        """The cut that keeps this share of a member's entries in a weight, or over the whole model."""
        known = self._global_stats
        keep = known.kept(weight, member, density)
        if keep is None:
            return KEEP_ALL
        low, high = band = known.band(weight, member, keep)
        if known.is_open(weight, member) and (counted := self._tallies(weight, member, band)) is not None:
            shared = (weight, member, band) in known.tallies
            low, share = known.settled((weight, member, band), keep) if shared else _settled(band, counted, keep)
            high = low + 1
        else:  # the bin's entries count as equal
            total, reaching = known.ranked(weight, member)
            within = total.within(band)
            share = (keep - int(reaching[0]) + within + total.within((0, low))) / within
        chance = level(share)
        below, above = _magnitude(low - 1), _magnitude(high - 1)
        return Cut(below if chance else above, above if chance < LEVELS else below, chance)

    def share(self, weight: str, member: str, density: float) -> int:
        """How many entries of a weight a share of it is."""
        return round(density * int(self._global_stats.histograms[weight][member].counts.sum()))

    def _tallies(self, group: str, member: str, band: Band) -> Mapping[Place, BandCounts] | None:
        """A band's entries by all bits, chunk by chunk; None where not all are known."""
        if (known := self._global_stats.tallies.get((group, member, band))) is not None:
            return known
        names = self._global_stats.names(group)
        if any(name in self._global_stats.chunked or (name, 0) not in self._weights for name in names):
            return None
        return {(name, 0): tallies(self._weights[name, 0], [(member, band)], self._scratch)[0] for name in names}


def _likely(sample: Sample, share: float) -> Band:
    """Magnitude interval that contains the k-th largest entry with high probability, k being this share of all entries."""
    reaching, squares = (values[::-1].cumsum()[::-1] for values in (sample.counts, sample.squares))
    if not len(reaching):
        return 0, INFINITE
    wanted, runs = share * reaching[0], reaching[0] / RUN
    near = max(int((reaching >= wanted).sum()) - 1, 0)
    spread = SPREAD * max(float(squares[near] - reaching[near] ** 2 / runs), 0.0) ** 0.5 + RUN
    last, over = int((reaching >= wanted + spread).sum()) - 1, int((reaching >= wanted - spread).sum())
    low = int(sample.keys[last]) << SAMPLED_DROPPED if last >= 0 else 0
    return low, int(sample.keys[over]) << SAMPLED_DROPPED if over < len(reaching) else INFINITE


def _settled(band: Band, counted: Mapping[Place, BandCounts], keep: int) -> tuple[int, float]:
    """See `MagnitudeStatistics.settled`."""
    wanted = keep - sum(tally.above for tally in counted.values())

    def at_least(key: int) -> int:
        return sum(tally.at_least(key) for tally in counted.values())

    key = band[0] + bisect_left(range(*band), True, key=lambda pattern: at_least(pattern) < wanted) - 1
    above = at_least(key + 1)
    return key, (wanted - above) / (at_least(key) - above)


def _magnitude(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", max(bits, 0)))[0])

"""Sums of a statistic's entries over a whole model, which normalisation and floors are relative to."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from merging.methods.method import Weight


@dataclass(frozen=True)
class Moment:
    """One member's sums, in float64.

    Args:
        total: Σ x.
        square: Σ x².
        count: Number of entries.
    """

    total: float = 0.0
    square: float = 0.0
    count: int = 0

    def __add__(self, other: "Moment") -> "Moment":
        return Moment(self.total + other.total, self.square + other.square, self.count + other.count)

    @property
    def mean(self) -> float:
        """Mean of the entries."""
        return self.total / max(self.count, 1)

    @property
    def norm(self) -> float:
        """Square root of the sum of squares."""
        return float(self.square**0.5)


Moments = Mapping[str, Moment]
"""Member → sums."""


def moments(weights: Iterable[Weight], kind: str) -> dict[str, Moment]:
    """Sums of the members' statistics over some weights; members without any are absent."""
    sums: dict[str, Moment] = {}
    for weight in weights:
        for member, value in weight.statistics.get(kind, {}).items():
            total = value.sum(dtype=torch.float64).item()
            square = torch.linalg.vector_norm(value, dtype=torch.float64).item() ** 2
            sums[member] = sums.get(member, Moment()) + Moment(total, square, value.numel())
    return sums


def combine_moments(first: Moments | None, second: Moments | None) -> dict[str, Moment]:
    """Sums over both sets of weights."""
    one, other = first or {}, second or {}
    return {name: one.get(name, Moment()) + other.get(name, Moment()) for name in sorted({*one, *other})}

"""What a metric is: a number of labels and of what a model said of them, with a standard error."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from merging.tasks.predictions import Floats

Labels = npt.NDArray[Any]

RESAMPLES = 200
"""Of a bootstrap."""


class Metric(Protocol):
    """A metric; greater is better.

    Outputs [N, C] are the probabilities of classes, the logits of several labels, or numbers.
    """

    @property
    def is_mean(self) -> bool:
        """Whether it is the mean of one number per example."""
        ...

    @property
    def percent(self) -> bool:
        """Whether it is a share, which is read as per cent."""
        ...

    @property
    def positive(self) -> bool:
        """Whether no value lies below 0."""
        ...

    def each(self, labels: Labels, outputs: Floats) -> Floats | None:
        """The number of each example that the metric averages [N]; None for a metric of all predictions together."""
        ...

    def measure(self, labels: Labels, outputs: Floats, seed: int) -> tuple[float, float]:
        """The value and its standard error over the choice of examples."""
        ...

    def influences(self, labels: Labels, outputs: Floats) -> Floats:
        """What each example contributes to the value [N]; see `influences`."""
        ...


@dataclass(frozen=True)
class OfEachExample:
    """A metric that is the mean of one number an example; its standard error is that of a mean.

    Args:
        values: (labels [N] or [N, C], outputs [N, C]) → [N]; greater is better.
        percent: See `Metric`.
        positive: See `Metric`.
    """

    is_mean: ClassVar[bool] = True
    values: Callable[[Labels, Floats], Floats]
    percent: bool = True
    positive: bool = True

    def each(self, labels: Labels, outputs: Floats) -> Floats | None:
        """See `Metric.each`."""
        return self.values(labels, outputs)

    def measure(self, labels: Labels, outputs: Floats, seed: int) -> tuple[float, float]:
        """The mean and s/√N; for accuracy s² = a(1 − a), the exact variance of a right or wrong answer."""
        values = self.values(labels, outputs)
        return float(values.mean()), float(values.std() / np.sqrt(len(values)))

    def influences(self, labels: Labels, outputs: Floats) -> Floats:
        """See `Metric.influences`."""
        return self.values(labels, outputs)


@dataclass(frozen=True, kw_only=True)
class OfAllExamples:
    """A metric of all predictions together; its standard error is a bootstrap's.

    Args:
        percent: See `Metric`.
        positive: See `Metric`.
    """

    is_mean: ClassVar[bool] = False
    percent: bool = True
    positive: bool = True

    def each(self, labels: Labels, outputs: Floats) -> None:
        """There is none; see `Metric.each`."""


def draws(numbers: npt.NDArray[Any], seed: int, resamples: int = RESAMPLES) -> Floats:
    """How often each of some kinds of examples is drawn in each resample [B, K] (Efron 1979).

    Examples that agree in all that a metric looks at are interchangeable, so that drawing them is drawing the numbers of each
    kind from a multinomial distribution.

    Args:
        numbers: How many examples there are of each kind [K].
        seed: Of the draw.
        resamples: B.
    """
    total = int(numbers.sum())
    drawn: Floats = np.random.default_rng(seed).multinomial(total, numbers / total, size=resamples).astype(np.float64)
    return drawn


def influences(value: Callable[[Floats], Floats], counts: Floats) -> Floats:
    """What each example contributes to a metric of all of them: θ + N ∂θ/∂w_i, w_i the weight of example i [N].

    The infinitesimal jackknife (Efron 1982). Their mean is θ, their standard deviation over √N its standard error; of two
    models the differences example by example give the standard error of the difference.

    Args:
        value: Sums over examples [B, M] → the metric of each [B]; the same for all multiples of its argument.
        counts: What each example adds to the sums [N, M].
    """
    step = 2.0**-17  # which leaves sums of whole numbers exact
    total = counts.sum(axis=0)
    value_of_all = value(total[None])
    return value_of_all + len(counts) * (value(total + step * counts) - value_of_all) / step


def ratio(over: Floats, under: Floats) -> Floats:
    """The quotient, 0 where both are 0."""
    return np.divide(over, under, out=np.zeros_like(over), where=under > 0)

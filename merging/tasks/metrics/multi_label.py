"""What predictions of several labels an example are worth: scikit-learn's metrics by name, each with a standard error.

A label is predicted where its logit is above 0, its probability above one half.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from merging.errors import TaskError
from merging.registry import Registry
from merging.tasks.metrics.metric import Labels, Metric, OfAllExamples, OfEachExample, draws, influences, ratio
from merging.tasks.predictions import Floats


@dataclass(frozen=True)
class F1(OfAllExamples):
    """F1 over all examples.

    Args:
        of_counts: (right [B, C], labelled and predicted together [B, C]) → [B].
    """

    of_counts: Callable[[Floats, Floats], Floats]

    def measure(self, labels: Labels, outputs: Floats, seed: int) -> tuple[float, float]:
        """The value, and its spread over resampled examples (Efron 1979)."""
        counts = _counts(labels, outputs)
        drawn = draws(np.ones(len(labels)), seed)
        return float(self._of(counts.sum(0, keepdims=True))[0]), float(self._of(drawn @ counts).std(ddof=1))

    def influences(self, labels: Labels, outputs: Floats) -> Floats:
        """See `Metric.influences`."""
        return influences(self._of, _counts(labels, outputs))

    def _of(self, counts: Floats) -> Floats:
        return self.of_counts(*np.split(counts, 2, axis=1))


def _counts(labels: Labels, outputs: Floats) -> Floats:
    """Right, and labelled and predicted together, of each example and class [N, 2 C]."""
    predicted = outputs > 0
    return np.concatenate([labels * predicted, labels + predicted], axis=1).astype(np.float64)


def _micro(right: Floats, both: Floats) -> Floats:
    return ratio(2 * right.sum(1), both.sum(1))


def _macro(right: Floats, both: Floats) -> Floats:
    mean: Floats = ratio(2 * right, both).mean(1)
    return mean


def _samples_f1(labels: Labels, outputs: Floats) -> Floats:
    predicted = outputs > 0
    return ratio(2 * (labels * predicted).sum(1), (labels + predicted).sum(1))


def _same(labels: Labels, outputs: Floats) -> Floats:
    return np.where(((outputs > 0) == labels).all(1), 1.0, 0.0)


def _share(labels: Labels, outputs: Floats) -> Floats:
    share: Floats = ((outputs > 0) == labels).mean(1)
    return share


def _log_probability(labels: Labels, outputs: Floats) -> Floats:
    mean: Floats = -np.logaddexp(0, np.where(labels > 0, -outputs, outputs)).mean(1)
    return mean


MULTI_LABEL: Registry[Metric] = Registry("metric of several labels", TaskError)
MULTI_LABEL.register("micro_f1", F1(_micro))
MULTI_LABEL.register("macro_f1", F1(_macro))
MULTI_LABEL.register("samples_f1", OfEachExample(_samples_f1))
MULTI_LABEL.register("subset_accuracy", OfEachExample(_same))
MULTI_LABEL.register("hamming_accuracy", OfEachExample(_share))
MULTI_LABEL.register("neg_log_loss", OfEachExample(_log_probability, percent=False, positive=False))

"""What predictions of one class an example are worth: scikit-learn's metrics by name, each with a standard error."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from merging.errors import TaskError
from merging.registry import Registry
from merging.tasks.metrics.metric import (
    RESAMPLES,
    Labels,
    Metric,
    OfAllExamples,
    OfEachExample,
    draws,
    influences,
    ratio,
)
from merging.tasks.predictions import Floats


@dataclass(frozen=True)
class ClassCounts:
    """What is counted of predictions, for B resamples of the examples at once.

    Args:
        right: Examples of each class that are predicted as such [B, C].
        labelled: Examples of each class [B, C].
        predicted: Predictions of each class [B, C].
    """

    right: Floats
    labelled: Floats
    predicted: Floats


@dataclass(frozen=True)
class OfPredictions(OfAllExamples):
    """A metric of labels and predicted classes.

    Args:
        function: scikit-learn's (labels [N], predictions [N]) → value; greater is better.
        of_counts: The same metric of each resample [B], fast enough to be asked of hundreds.
    """

    function: Callable[[Labels, Labels], Any]
    of_counts: Callable[[ClassCounts], Floats]

    def measure(self, labels: Labels, outputs: Floats, seed: int) -> tuple[float, float]:
        """The value, and its spread over resampled examples (Efron 1979)."""
        predictions = outputs.argmax(axis=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a class without examples or predictions counts as 0
            value = float(self.function(labels, predictions))
        resampled = self.of_counts(resample(labels, predictions, outputs.shape[1], RESAMPLES, seed))
        return value, float(resampled.std(ddof=1))

    def influences(self, labels: Labels, outputs: Floats) -> Floats:
        """See `Metric.influences`."""
        of_class = np.eye(outputs.shape[1])
        true, predicted = of_class[labels], of_class[outputs.argmax(axis=1)]
        counts = np.concatenate([true * predicted, true, predicted], axis=1)
        return influences(lambda sums: self.of_counts(ClassCounts(*np.split(sums, 3, axis=1))), counts)


def resample(labels: Labels, predictions: Labels, classes: int, resamples: int, seed: int) -> ClassCounts:
    """Draws examples with replacement, and counts; see `draws`.

    Args:
        labels: Class indices [N].
        predictions: Class indices [N].
        classes: C.
        resamples: B.
        seed: Of the draw.
    """
    pairs, numbers = np.unique(np.stack([labels, predictions]), axis=1, return_counts=True)
    drawn = draws(numbers, seed, resamples)
    of_label, of_prediction = np.eye(classes)[pairs[0]], np.eye(classes)[pairs[1]]
    return ClassCounts(drawn @ (of_label * of_prediction), drawn @ of_label, drawn @ of_prediction)


def _f1(counts: ClassCounts) -> Floats:
    return ratio(2 * counts.right, counts.labelled + counts.predicted)


def _macro_f1(counts: ClassCounts) -> Floats:
    seen = (counts.labelled + counts.predicted > 0).sum(axis=1)
    mean: Floats = _f1(counts).sum(axis=1) / seen
    return mean


def _weighted_f1(counts: ClassCounts) -> Floats:
    mean: Floats = (_f1(counts) * counts.labelled).sum(axis=1) / counts.labelled.sum(axis=1)
    return mean


def _micro_f1(counts: ClassCounts) -> Floats:
    share: Floats = counts.right.sum(axis=1) / counts.labelled.sum(axis=1)
    return share


def _balanced_accuracy(counts: ClassCounts) -> Floats:
    mean: Floats = ratio(counts.right, counts.labelled).sum(axis=1) / (counts.labelled > 0).sum(axis=1)
    return mean


def _matthews(counts: ClassCounts) -> Floats:
    """The R_K statistic (Gorodkin 2004)."""
    total = counts.labelled.sum(axis=1)
    over = counts.right.sum(axis=1) * total - (counts.labelled * counts.predicted).sum(axis=1)
    spreads = [total**2 - np.square(margin).sum(axis=1) for margin in (counts.labelled, counts.predicted)]
    return ratio(over, np.sqrt(spreads[0] * spreads[1]))


def _right(labels: Labels, probabilities: Floats) -> Floats:
    return np.where(probabilities.argmax(axis=1) == labels, 1.0, 0.0)


def _log_probability(labels: Labels, probabilities: Floats) -> Floats:
    chosen = probabilities[np.arange(len(labels)), labels]
    logarithms: Floats = np.log(np.maximum(chosen, np.finfo(np.float64).tiny))
    return logarithms


def _scikit(name: str, **arguments: Any) -> Callable[[Labels, Labels], float]:
    """scikit-learn's metric of this name; the library, which takes a second to import, waits until it is used."""

    def function(labels: Labels, predictions: Labels) -> float:
        import sklearn.metrics

        return float(getattr(sklearn.metrics, name)(labels, predictions, **arguments))

    return function


METRICS: Registry[Metric] = Registry("metric", TaskError)
METRICS.register("accuracy", OfEachExample(_right))
METRICS.register("neg_log_loss", OfEachExample(_log_probability, percent=False, positive=False))
METRICS.register("macro_f1", OfPredictions(_scikit("f1_score", average="macro", zero_division=0.0), _macro_f1))
METRICS.register("micro_f1", OfPredictions(_scikit("f1_score", average="micro", zero_division=0.0), _micro_f1))
METRICS.register("weighted_f1", OfPredictions(_scikit("f1_score", average="weighted", zero_division=0.0), _weighted_f1))
METRICS.register("balanced_accuracy", OfPredictions(_scikit("balanced_accuracy_score"), _balanced_accuracy))
METRICS.register("matthews", OfPredictions(_scikit("matthews_corrcoef"), _matthews, positive=False))

"""Predictions of classifiers, whatever they classify: one class an example, from log-probabilities."""

from typing import Any

import numpy as np
import numpy.typing as npt

from merging.tasks.metrics import Floats, Labels, each, measure
from merging.tasks.predictions import Predictions


def classified(metric: str, labels: Labels, log_probabilities: Floats, seconds: float = 0.0) -> Predictions:
    """What a classifier's log-probabilities are worth, example by example.

    The surrogate is p_y, the probability of the true class: smooth where right and wrong are not.

    Args:
        metric: A name in `merging.tasks.metrics.METRICS`.
        labels: Class indices [N].
        log_probabilities: [N, C].
        seconds: Wall time that it took.
    """
    log_true: Floats = log_probabilities[np.arange(len(labels)), labels]
    probabilities = np.exp(log_probabilities)
    averaged = each(metric, labels, probabilities)
    # 0 · log 0 is 0
    terms = np.multiply(probabilities, log_probabilities, out=np.zeros_like(probabilities), where=probabilities > 0)
    return Predictions(
        values=np.exp(log_true) if averaged is None else averaged,
        surrogates=np.exp(log_true),
        losses=-log_true,
        entropies=-terms.sum(axis=1),
        payload={"labels": labels, "log_probabilities": log_probabilities},
        seconds=seconds,
    )


def measured(metric: str, predictions: Predictions) -> tuple[float, float]:
    """A metric of a classifier's predictions and its standard error; see `merging.tasks.metrics.measure`."""
    labels: npt.NDArray[Any] = predictions.payload["labels"]
    log_probabilities: npt.NDArray[Any] = predictions.payload["log_probabilities"]
    return measure(metric, labels, np.exp(log_probabilities))

"""What predicted numbers are worth: SciPy's correlations and mean errors by name, each with a standard error."""

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from merging.errors import TaskError
from merging.registry import Registry
from merging.tasks.metrics.metric import Labels, Metric, OfAllExamples, OfEachExample, draws
from merging.tasks.predictions import Floats


@dataclass(frozen=True)
class Correlation(OfAllExamples):
    """SciPy's correlation of labels and predictions, mean over outputs.

    A constant correlates with nothing: 0.

    Args:
        kind: Pearson's, or Spearman's, of ranks.
    """

    kind: Literal["pearson", "spearman"]

    def measure(self, labels: Labels, outputs: Floats, seed: int) -> tuple[float, float]:
        """The value, and its spread over resampled examples (Efron 1979); of Spearman's with the ranks among all."""
        from scipy.stats import pearsonr, rankdata, spearmanr

        function: Any = pearsonr if self.kind == "pearson" else spearmanr
        values = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a constant counts as 0
            for column in range(labels.shape[1]):
                few = len(labels) < 2
                correlation = np.nan if few else float(function(labels[:, column], outputs[:, column])[0])
                values.append(correlation if np.isfinite(correlation) else 0.0)
        pair = (labels, outputs) if self.kind == "pearson" else (rankdata(labels, axis=0), rankdata(outputs, axis=0))
        return float(np.mean(values)), float(_resampled(*pair, seed=seed).std(ddof=1))


def _resampled(labels: Labels, outputs: Floats, *, seed: int) -> Floats:
    """Pearson's correlation of each resample, mean over outputs [B]."""
    drawn = draws(np.ones(len(labels)), seed) / len(labels)
    # moments of differences from the mean, which do not cancel
    x, y = labels - labels.mean(0), outputs - outputs.mean(0)
    covariance = drawn @ (x * y) - (drawn @ x) * (drawn @ y)
    spreads = [drawn @ (z * z) - (drawn @ z) ** 2 for z in (x, y)]
    under = np.sqrt(np.maximum(spreads[0], 0) * np.maximum(spreads[1], 0))
    mean: Floats = np.divide(covariance, under, out=np.zeros_like(under), where=under > 0).mean(1)
    return mean


def _squared(labels: Labels, outputs: Floats) -> Floats:
    mean: Floats = -np.square(labels - outputs).mean(1)
    return mean


def _absolute(labels: Labels, outputs: Floats) -> Floats:
    mean: Floats = -np.abs(labels - outputs).mean(1)
    return mean


REGRESSION: Registry[Metric] = Registry("metric of numbers", TaskError)
REGRESSION.register("pearson", Correlation("pearson", positive=False))
REGRESSION.register("spearman", Correlation("spearman", positive=False))
REGRESSION.register("neg_squared_error", OfEachExample(_squared, percent=False, positive=False))
REGRESSION.register("neg_absolute_error", OfEachExample(_absolute, percent=False, positive=False))

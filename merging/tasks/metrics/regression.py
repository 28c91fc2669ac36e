"""What predicted numbers are worth: SciPy's correlations and mean errors by name, each with a standard error."""

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from merging.errors import TaskError
from merging.registry import Registry
from merging.tasks.metrics.metric import Labels, Metric, OfAllExamples, OfEachExample, draws, influences
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
        from scipy.stats import pearsonr, spearmanr

        function: Any = pearsonr if self.kind == "pearson" else spearmanr
        values = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a constant counts as 0
            for column in range(labels.shape[1]):
                few = len(labels) < 2
                correlation = np.nan if few else float(function(labels[:, column], outputs[:, column])[0])
                values.append(correlation if np.isfinite(correlation) else 0.0)
        moments = self._moments(labels, outputs)
        drawn = draws(np.ones(len(labels)), seed)
        return float(np.mean(values)), float(_correlations(drawn @ moments).std(ddof=1))

    def influences(self, labels: Labels, outputs: Floats) -> Floats:
        """See `Metric.influences`; of Spearman's with the ranks among all."""
        return influences(_correlations, self._moments(labels, outputs))

    def _moments(self, labels: Labels, outputs: Floats) -> Floats:
        """What each example adds to the moments that Pearson's correlation is made of [N, 6 C]."""
        if self.kind == "spearman":
            from scipy.stats import rankdata

            labels, outputs = rankdata(labels, axis=0), rankdata(outputs, axis=0)
        # of differences from the mean, which do not cancel; a constant's are 0
        x, y = (np.where(np.ptp(z, axis=0) > 0, z - z.mean(0), 0.0) for z in (labels, outputs))
        return np.concatenate([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)


def _correlations(moments: Floats) -> Floats:
    """Pearson's correlation, mean over outputs, of sums of moments [B, 6 C] → [B]."""
    number, *sums = np.split(moments, 6, axis=1)
    x, y, xx, yy, xy = (each / number for each in sums)
    covariance = xy - x * y
    under = np.sqrt(np.maximum(xx - x * x, 0) * np.maximum(yy - y * y, 0))
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

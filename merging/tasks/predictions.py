"""What a classifier said of single examples: what scores are made of, and what pairs two candidates."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from merging.tasks.metrics import Floats, Labels, each, measure


@dataclass(frozen=True)
class Outcomes:
    """What a model said of some examples, in the order in which they were asked for.

    Args:
        labels: Class indices [N].
        log_probabilities: [N, C].
        seconds: Wall time that it took.
    """

    labels: Labels
    log_probabilities: Floats
    seconds: float = 0.0

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def join(cls, parts: Sequence["Outcomes"]) -> "Outcomes":
        """Several, one after another."""
        return cls(
            np.concatenate([part.labels for part in parts]),
            np.concatenate([part.log_probabilities for part in parts]),
            sum(part.seconds for part in parts),
        )

    def take(self, places: npt.NDArray[np.int64]) -> "Outcomes":
        """Those at some places of this order; they count no seconds."""
        return Outcomes(self.labels[places], self.log_probabilities[places])

    @property
    def log_chosen(self) -> Floats:
        """Logarithm of p_y of every example [N]."""
        chosen: Floats = self.log_probabilities[np.arange(len(self)), self.labels]
        return chosen

    @property
    def chosen(self) -> Floats:
        """p_y, the probability of the true class, of every example [N]: smooth where right and wrong are not."""
        return np.exp(self.log_chosen)

    @property
    def entropy(self) -> float:
        """Mean entropy of the predictions, in nats; it asks for no labels."""
        probabilities = np.exp(self.log_probabilities)
        # 0 · log 0 is 0
        terms = np.multiply(
            probabilities, self.log_probabilities, out=np.zeros_like(probabilities), where=probabilities > 0
        )
        return float(-terms.sum(axis=1).mean())

    def measure(self, metric: str) -> tuple[float, float]:
        """A metric and its standard error; see `merging.tasks.metrics.measure`."""
        return measure(metric, self.labels, np.exp(self.log_probabilities))

    def values(self, metric: str) -> Floats:
        """One number an example [N], greater is better: what the metric averages, or p_y where it averages nothing."""
        found = each(metric, self.labels, np.exp(self.log_probabilities))
        return self.chosen if found is None else found

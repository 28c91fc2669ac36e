"""What predictions are worth: metrics by name, for each kind of label."""

from collections.abc import Mapping

from merging.registry import Registry
from merging.tasks.likelihood import Likelihood
from merging.tasks.metrics.metric import Labels, Metric
from merging.tasks.metrics.multi_label import MULTI_LABEL
from merging.tasks.metrics.regression import REGRESSION
from merging.tasks.metrics.single_label import METRICS
from merging.tasks.predictions import Floats

__all__ = ["METRICS", "METRICS_OF", "MULTI_LABEL", "REGRESSION", "Floats", "Labels", "Metric"]

METRICS_OF: Mapping[Likelihood, Registry[Metric]] = {
    "categorical": METRICS,
    "bernoulli": MULTI_LABEL,
    "gaussian": REGRESSION,
}
"""The metrics that fit what a head's logits are parameters of; the first of each is the default."""

"""One class per example, whatever is classified: settings, predictions and scores of classifiers."""

import time
from abc import abstractmethod
from collections.abc import Iterable
from typing import Annotated, Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import AfterValidator, Field
from torch import nn
from torch.nn.functional import log_softmax

from merging.errors import TaskError
from merging.tasks.file_task import E, FileTask
from merging.tasks.metrics import METRICS, Floats, Labels, each, is_mean, measure
from merging.tasks.predictions import Predictions
from merging.tasks.task import Batch, Score, Split, score_of


def _known(name: str) -> str:
    try:
        METRICS[name]
    except TaskError as error:
        raise ValueError(str(error)) from error
    return name


def _each_once(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError("two classes have the same name")
    return names


Metric = Annotated[str, AfterValidator(_known)]
"""A name in `METRICS`."""
ClassNames = Annotated[list[str], Field(min_length=2), AfterValidator(_each_once)]
"""Names of a head's classes, in its order."""


class _Labelled(Protocol):
    label: str | None
    data: Any


S = TypeVar("S", bound=_Labelled)


def labels_where_judged(settings: S) -> S:
    """Settings whose examples have labels, or none but calibration data; for `model_validator`."""
    if settings.label is None and set(settings.data) != {"train"}:
        raise ValueError("`label: null` is for calibration data, a train split alone: nothing is judged without labels")
    return settings


class Classifier(FileTask[E]):
    """A task whose examples have one class each; see `Task`."""

    @abstractmethod
    def evaluation_batches(
        self, split: Split, places: npt.NDArray[np.int64]
    ) -> Iterable[tuple[Batch, npt.NDArray[np.int64]]]:
        """Examples by their places in the split [N], in batches, each with the ranks of its examples among these."""

    def predict(
        self, model: nn.Module, split: Split, positions: npt.NDArray[np.int64], *, precision: str = "float32"
    ) -> Predictions:
        """See `Task.predict`. Loss and metric are computed in float64 from the model's logits."""
        started = time.perf_counter()
        device = next(model.parameters()).device
        parts, labels, ranks = [], [], []
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            for batch, own in self.evaluation_batches(split, self.order(split)[positions]):
                parts.append(self.logits(model, batch.to(device)).double())
                labels.append(batch.labels)
                ranks.append(own)
        back = np.argsort(np.concatenate(ranks))
        logits = torch.cat(parts).cpu()[back]
        if wrong := int((~logits.isfinite().all(dim=1)).sum()):
            raise self.error(f"the model gave NaN or Inf for {wrong} of {len(logits)} {split} examples")
        true = torch.cat(labels)[back].numpy()
        seconds = time.perf_counter() - started
        return classified(self.settings.metric, true, log_softmax(logits, dim=1).numpy(), seconds)

    def score(self, predictions: Predictions) -> Score:
        """See `Task.score`."""
        metric = self.settings.metric
        return score_of(predictions, metric, measured=None if is_mean(metric) else measured(metric, predictions))


def classified(metric: str, labels: Labels, log_probabilities: Floats, seconds: float = 0.0) -> Predictions:
    """What a classifier's log-probabilities are worth, example by example.

    The surrogate is p_y, the probability of the true class: smooth where right and wrong are not.

    Args:
        metric: A name in `METRICS`.
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

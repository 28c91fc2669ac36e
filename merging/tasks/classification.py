"""What a head says of a whole example, whatever is classified: one class, several labels, or numbers; settings and scores."""

import time
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from merging.errors import TaskError
from merging.io import addresses, storage
from merging.registry import did_you_mean
from merging.tasks.file_task import E, FileTask
from merging.tasks.head import problem_type
from merging.tasks.labels import output_names
from merging.tasks.likelihood import Likelihood, entropies, losses, surrogates
from merging.tasks.metrics import METRICS, METRICS_OF, MULTI_LABEL, REGRESSION, Labels
from merging.tasks.predictions import Floats, Predictions
from merging.tasks.task import SPLITS, Batch, Score, Split, TaskSettings, score_of

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
LIKELIHOODS: Mapping[str, Likelihood] = {
    "single_label_classification": "categorical",
    "multi_label_classification": "bernoulli",
    "regression": "gaussian",
}
"""transformers' `problem_type` → what logits are parameters of."""


def _known(name: str) -> str:
    known = sorted({name for metrics in METRICS_OF.values() for name in metrics})
    if name not in known:
        raise ValueError(f"unknown metric '{name}'. {did_you_mean(name, known)}")
    return name


def _each_once(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError("two classes have the same name")
    return names


Metric = Annotated[str, AfterValidator(_known)]
"""A metric's name, of whatever kind of label."""
ClassNames = Annotated[list[str], Field(min_length=1), AfterValidator(_each_once)]
"""Names of a head's outputs, in its order."""
LABEL = (
    "Column of the label: a class's name, or its position in the head; of several labels a list of these, or of true and "
    "false; of a regression a number. Or a list of columns, one for each of the head's outputs. null for unlabelled "
    "calibration data."
)
METRIC = (
    f"What is maximised. Of one class: {', '.join(METRICS)}; of several labels: {', '.join(MULTI_LABEL)}; of numbers: "
    f"{', '.join(REGRESSION)}. Default: the first of these."
)
PROBLEM_TYPE = (
    "Of the head: single_label_classification, multi_label_classification (each label yes or no by itself), regression. "
    "Default: its configuration's, else regression for one output and one class for several."
)


class ClassifierSettings(TaskSettings):
    """What tasks have in common whose examples are judged as a whole."""

    label: str | Annotated[list[str], Field(min_length=1)] | None = Field("label", description=LABEL)
    labels: ClassNames | None = Field(
        None, description="Names of the classes in the head's order; default: the head's `id2label`."
    )
    problem_type: ProblemType | None = Field(None, description=PROBLEM_TYPE)
    metric: Metric | None = Field(None, description=METRIC)

    @property
    def judged_by(self) -> str:
        """The metric's name; where head and file leave it open, that of one class."""
        return self.metric or next(iter(METRICS_OF[LIKELIHOODS[self.problem_type or "single_label_classification"]]))

    @property
    def is_labelled(self) -> bool:
        """See `TaskSettings.is_labelled`."""
        return self.label is not None

    @property
    def is_percent(self) -> bool:
        """Whether the metric is a share, which a name says for every kind of label."""
        return all(known[self.judged_by].percent for known in METRICS_OF.values() if self.judged_by in known)


class _Labelled(Protocol):
    label: str | list[str] | None
    data: Any


S = TypeVar("S", bound=_Labelled)


def labels_where_judged(settings: S) -> S:
    """Settings whose examples have labels, or none but calibration data; for `model_validator`."""
    if settings.label is None and set(settings.data) != {"train"}:
        raise ValueError("`label: null` is for calibration data, a train split alone: nothing is judged without labels")
    return settings


class Classifier(FileTask[E]):
    """A task whose examples each have one class, several labels, or numbers; see `Task`."""

    @classmethod
    def data_classes(cls, settings: Any) -> list[str]:
        """See `FileTask.data_classes`: of tables their labels or columns of labels, of folders their names."""
        from merging.tasks.labelled_texts import read_table  # with pandas, which takes a second

        if settings.labels is not None:
            return list(settings.labels)
        if isinstance(settings.label, list):
            return list(settings.label)
        paths = [settings.data["train"]] if isinstance(settings.data["train"], str) else settings.data["train"]
        folders = [path for path in paths if storage.is_dir(path)]
        labels = [
            name for path in folders for name in storage.list_dir(path) if storage.is_dir(addresses.join(path, name))
        ]
        if tables := [path for path in paths if path not in folders]:
            labels += read_table(tables, [settings.label])[settings.label].tolist()
        where = f"{', '.join(paths)}: column '{settings.label}'" if tables else ", ".join(folders)
        return output_names(labels, LIKELIHOODS[settings.problem_type or "single_label_classification"], where)

    @abstractmethod
    def evaluation_batches(
        self, split: Split, places: npt.NDArray[np.int64]
    ) -> Iterable[tuple[Batch, npt.NDArray[np.int64]]]:
        """Examples by their places in the split [N], in batches, each with the ranks of its examples among these."""

    @abstractmethod
    def labels_of(self, split: Split) -> Labels:
        """A split's labels, [N] or [N, C]."""

    @cached_property
    def outputs(self) -> Likelihood:
        """What the head's logits are parameters of, by the settings or the head.

        Raises:
            TaskError: The head has none, or one output of which several classes are asked.
        """
        try:
            own = self.settings.problem_type or problem_type(self.head, self.base)
        except TaskError as error:
            raise self.error(str(error)) from error
        count = len(self.classes)
        if own is None:
            own = "regression" if count == 1 else "single_label_classification"
        if own not in LIKELIHOODS:
            raise self.error(
                f"`problem_type` in the config.json of {self.head} is {str(own)[:100]!r}: one of {', '.join(LIKELIHOODS)}"
            )
        if own == "single_label_classification" and count < 2:
            raise self.error(
                f"the head of {self.head} has one output, which is no choice among classes: name `problem_type`, regression or "
                "multi_label_classification"
            )
        return LIKELIHOODS[own]

    def likelihood(self, model: nn.Module) -> Likelihood:
        """See `Task.likelihood`."""
        return self.outputs

    @cached_property
    def metric(self) -> str:
        """The metric's name.

        Raises:
            TaskError: It does not fit the head.
        """
        known = METRICS_OF[self.outputs]
        name = self.settings.metric or next(iter(known))
        if name not in known:
            kind = {"categorical": "one class an example", "bernoulli": "several labels", "gaussian": "numbers"}
            raise self.error(
                f"`metric: {name}` does not fit the head of {self.head}, which gives {kind[self.outputs]} (`problem_type`): "
                f"name one of {', '.join(known)}"
            )
        return str(name)

    @property
    def judged_by(self) -> str:
        """The metric's name, which head and settings decide together."""
        return self.metric

    @property
    def can_be_negative(self) -> bool:
        """See `Task.can_be_negative`."""
        return not METRICS_OF[self.outputs][self.metric].positive

    @cached_property
    def spread(self) -> float:
        """The standard deviation of a regression's labels, on validation where there is that split; 1 of all others."""
        if self.outputs != "gaussian":
            return 1.0
        split: Split = "validation" if "validation" in self.settings.data else self._first_split
        deviation = float(np.std(self.labels_of(split), axis=0).mean())
        return deviation if np.isfinite(deviation) and deviation > 0 else 1.0

    @property
    def _first_split(self) -> Split:
        return next(split for split in SPLITS if split in self.settings.data)

    def surrogates(self, model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
        """See `Task.surrogates`."""
        return surrogates(self.outputs, logits, labels, self.spread)

    def predict(
        self, model: nn.Module, split: Split, positions: npt.NDArray[np.int64], *, precision: str = "float32"
    ) -> Predictions:
        """See `Task.predict`. Loss and metric are computed in float64 from the model's logits."""
        started = time.perf_counter()
        device = next(model.parameters()).device
        parts, ranks = [], []
        places = self.order(split)[positions]
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            for batch, own in self.evaluation_batches(split, places):
                parts.append(self.logits(model, batch.to(device)).double())
                ranks.append(own)
        back = np.argsort(np.concatenate(ranks))
        logits = torch.cat(parts).cpu()[back]
        if logits.shape[1] != len(self.classes):
            raise self.error(
                f"the model gives {logits.shape[1]} numbers for an example, the head names {len(self.classes)}"
            )
        if wrong := int((~logits.isfinite().all(dim=1)).sum()):
            raise self.error(f"the model gave NaN or Inf for {wrong} of {len(logits)} {split} examples")
        labels = self.labels_of(split)[places]
        return judged(self.metric, labels, logits, self.outputs, self.spread, time.perf_counter() - started)

    def score(self, predictions: Predictions) -> Score:
        """See `Task.score`."""
        return scored(self.metric, predictions, self.outputs)

    def influences(self, predictions: Predictions) -> Floats:
        """See `Task.influences`."""
        payload = predictions.payload
        return METRICS_OF[self.outputs][self.metric].influences(
            payload["labels"], payload["outputs"].astype(np.float64)
        )


def batch_labels(labels: Labels) -> Tensor:
    """Labels as batches have them: class indices int64 [N], or float32 [N, C]."""
    return torch.from_numpy(labels if labels.ndim == 1 else labels.astype(np.float32))


def judged(
    metric: str,
    labels: Labels,
    logits: Tensor,
    likelihood: Likelihood = "categorical",
    spread: float = 1.0,
    seconds: float = 0.0,
) -> Predictions:
    """What a head's logits are worth, example by example.

    Args:
        metric: A name among the likelihood's metrics.
        labels: Class indices [N], or 0 and 1, or numbers [N, C].
        logits: [N, C], float64.
        likelihood: What they are parameters of.
        spread: See `merging.tasks.likelihood.surrogates`.
        seconds: Wall time that it took.
    """
    true = torch.from_numpy(labels)
    smooth = surrogates(likelihood, logits, true, spread).numpy()
    entropy = entropies(likelihood, logits)
    outputs = (logits.softmax(-1) if likelihood == "categorical" else logits).numpy()
    averaged = METRICS_OF[likelihood][metric].each(labels, outputs)
    return Predictions(
        values=smooth if averaged is None else averaged,
        surrogates=smooth,
        losses=losses(likelihood, logits, true).numpy(),
        entropies=None if entropy is None else entropy.numpy(),
        payload={"labels": labels, "outputs": outputs},
        seconds=seconds,
    )


def scored(metric: str, predictions: Predictions, likelihood: Likelihood = "categorical") -> Score:
    """The score of what `judged` gave; a metric of all predictions together has a bootstrap's standard error."""
    scorer = METRICS_OF[likelihood][metric]
    labels: npt.NDArray[Any] = predictions.payload["labels"]
    outputs: npt.NDArray[Any] = predictions.payload["outputs"]
    return score_of(predictions, metric, measured=None if scorer.is_mean else scorer.measure(labels, outputs, 0))

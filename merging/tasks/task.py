"""What a task is: data in splits, a head, and a score. Only the files beside this one know what kind of task it is."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from merging.checkpoints.models.parameter_names import Loading
from merging.errors import TaskError
from merging.registry import Registry
from merging.tasks.likelihood import Likelihood, surrogates
from merging.tasks.predictions import Floats, Predictions

Split = Literal["train", "validation", "test"]
IGNORED = -100
"""The label of a position where there is nothing to predict."""
UNKNOWN = -1
"""The label of a position where there is something to predict, and no data say what."""
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class TaskSettings(BaseModel):
    """What every kind of task is told in the campaign file."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    role: Literal["seen", "unseen"] = Field(
        "seen",
        description="unseen: data that belong to no member (out of domain). It is measured and shown apart; no statistic, no "
        "training and no objective but `unseen`, or its own name, looks at it.",
    )

    @property
    def judged_by(self) -> str:
        """The metric's name, also where the file leaves it to the kind of task."""
        return str(getattr(self, "metric", "score"))

    @property
    def is_labelled(self) -> bool:
        """Whether examples have labels."""
        return True

    @property
    def is_percent(self) -> bool:
        """Whether scores are shares, which are read as per cent."""
        return False


@dataclass(frozen=True)
class Batch:
    """Some examples, ready for the model.

    Args:
        inputs: Keyword arguments of the model's `forward`, without labels.
        labels: Class indices [N] or [N, S]; `IGNORED` where there is nothing to predict, `UNKNOWN` at positions whose
            label is not known. Of several labels at once 0 and 1,
            of a regression numbers, both in floating point and in the shape of the logits; NaN where there is none.
        indices: Positions of the examples in their split [N].
        mask: Which positions are real tokens [N, S]; None where every position counts.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    indices: Tensor
    mask: Tensor | None = None

    @property
    def is_sequential(self) -> bool:
        """Whether there is a label at every position, and not what belongs to the whole example."""
        return self.labels.dim() > 1 and not self.labels.is_floating_point()

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device."""
        return Batch(
            {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()},
            self.labels.to(device, non_blocking=True),
            self.indices,
            None if self.mask is None else self.mask.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class Score:
    """What came of evaluating a model on a task.

    Args:
        value: The task's metric; greater is better.
        standard_error: Of `value`, over the choice of examples; NaN where the evaluator gives none.
        examples: How many examples it was measured on.
        metric: The metric's name.
        loss: Mean loss; NaN where the task has none.
        expected_error: 1 − the mean surrogate, a smooth stand-in for the error rate; NaN where the task has none.
        seconds: Wall time of the evaluation.
        entropy: Mean entropy of the predictions, in nats; NaN where the task has none.
        is_mean: Whether `value` is the mean of one number per example, which paired tests and estimates build on.
    """

    value: float
    standard_error: float
    examples: int
    metric: str
    loss: float = float("nan")
    expected_error: float = float("nan")
    seconds: float = 0.0
    entropy: float = float("nan")
    is_mean: bool = False

    def as_dict(self) -> dict[str, Any]:
        """JSON-like values."""
        return asdict(self)


class Task(ABC):
    """A task, bound to its data and to the checkpoint whose head it is evaluated with.

    Args:
        name: Its name in the campaign.
        settings: What the campaign file says of it.
        head: Path of the checkpoint that brings the task's head, configuration and preprocessor.
    """

    base: str = ""
    """The base that `head` belongs to, where that is an adapter."""
    kind: ClassVar[str]
    has_logits: ClassVar[bool] = True
    """Whether `logits` and `batches` work: what Fisher, Gram and representations are computed from."""
    one_label: ClassVar[bool] = True
    """Whether an example has one label, and logits one row of classes for it; else one for every token."""
    is_generative: ClassVar[bool] = False
    """Whether its models write text: every output is a distribution over a vocabulary."""
    has_predictions: ClassVar[bool] = False
    """Whether `predict` and `score` work: what measures a candidate step by step."""
    runs_foreign_code: ClassVar[bool] = False
    """Whether models are handed to a user's function, which may change them."""
    has_surrogates: ClassVar[bool] = True
    """Whether its scores have an expected error."""

    def __init__(self, name: str, settings: Any, head: str) -> None:
        self.name = name
        self.settings = settings
        self.head = head

    @abstractmethod
    def check(self) -> list[str]:
        """Opens the data and the head's configuration, and looks for what would fail later.

        Returns:
            Notes for the user that are no errors.

        Raises:
            TaskError: Data, columns, labels or splits are missing or unusable.
        """

    @abstractmethod
    def load_model(self) -> nn.Module:
        """The head's checkpoint as a live model in evaluation mode, float32, on the CPU."""

    def blank_model(self) -> tuple[nn.Module, Loading] | None:
        """The model without weights, on no device, and what its checkpoint brings to it; None where nothing is known of it.

        Raises:
            TaskError: The checkpoint is of another architecture, or lacks some of the model's weights.
        """
        return None

    def load_skeleton(self, merged: Collection[str], dtype: torch.dtype = torch.float32) -> nn.Module:
        """`load_model` for a caller who overwrites most of it, so that only the rest need be read.

        Args:
            merged: Names of the checkpoint's tensors whose values do not matter; they may hold NaN.
            dtype: Of its weights, but for those that transformers keeps in float32.
        """
        return self.load_model().to(dtype)

    @abstractmethod
    def size(self, split: Split) -> int:
        """Number of examples in a split; 0 where the task has none."""

    def has_split(self, split: Split) -> bool:
        """Whether it can be measured on a split."""
        return self.size(split) > 0

    def missing_splits(self) -> list[str]:
        """Those of the notes of `check` that say which splits there are not, and what follows."""
        return []

    @property
    def has_ensembles(self) -> bool:
        """Whether several models can be measured as one, by their logits."""
        return self.has_logits

    @property
    def is_below_zero(self) -> bool:
        """Whether all its scores are: they have no ratio that grows with them."""
        return False

    @property
    def judged_by(self) -> str:
        """The metric's name."""
        return str(self.settings.judged_by)

    @property
    def can_be_negative(self) -> bool:
        """Whether some of its scores may be below zero."""
        return True

    @abstractmethod
    def data_fingerprint(self, split: Split) -> str:
        """Content hash of a split's examples and of how they are prepared for the model."""

    def score_fingerprint(self, split: Split) -> str | None:
        """Content hash of all that predictions of a split depend on besides the model's weights.

        None where that is not known, as of code that is the user's own: nothing is taken from a cache of scores then.
        """
        return None

    def measure(
        self, model: nn.Module, split: Split, *, limit: int | None = None, precision: str = "float32"
    ) -> tuple[Score, Predictions | None]:
        """Measures a model on a split.

        Args:
            model: A model as `load_model` gives it, its weights perhaps replaced, on any device.
            split: Which examples.
            limit: At most this many examples, the same ones at every call.
            precision: `float32`, or `bfloat16` for autocast.

        Returns:
            The score, and the predictions that it was made from where the kind gives any.

        Raises:
            TaskError: The evaluator failed or gave no finite number.
        """
        predictions = self.predict(model, split, np.arange(self.size(split))[:limit], precision=precision)
        return self.score(predictions), predictions

    def evaluate(
        self, model: nn.Module, split: Split, *, limit: int | None = None, precision: str = "float32"
    ) -> Score:
        """The score alone; see `measure`."""
        return self.measure(model, split, limit=limit, precision=precision)[0]

    def predict(
        self, model: nn.Module, split: Split, positions: npt.NDArray[np.int64], *, precision: str = "float32"
    ) -> Predictions:
        """What a model says of single examples.

        Args:
            model: As for `measure`.
            split: Which examples.
            positions: Their places in the split's fixed shuffled order [N], the one that `limit` counts in.
            precision: As for `measure`.

        Raises:
            TaskError: This kind of task is measured whole, or the model gave no finite number.
        """
        raise TaskError(
            f"task '{self.name}' ({self.kind}) gives no predictions of single examples: it is measured whole"
        )

    def score(self, predictions: Predictions) -> Score:
        """The score over these examples."""
        raise TaskError(
            f"task '{self.name}' ({self.kind}) gives no predictions of single examples: it is measured whole"
        )

    def influences(self, predictions: Predictions) -> Floats | None:
        """What each example contributes to the score [N]: its differences between two models pair them.

        Their mean is the score, their standard deviation over √N its standard error (`metrics.metric.influences`).

        Returns:
            Of a metric that is a mean its values; None where the kind has none for another.
        """
        return predictions.values if self.score(predictions).is_mean else None

    def batches(self, split: Split, start: int, stop: int, batch_size: int) -> Iterator[Batch]:
        """Examples [start, stop) of a split's fixed shuffled order, in batches on the CPU."""
        raise TaskError(f"task '{self.name}' ({self.kind}) has no batches to compute statistics from")

    def batch(self, split: Split, places: npt.NDArray[np.int64]) -> Batch:
        """Any examples by their places in a split's fixed shuffled order [N], as one batch on the CPU."""
        raise TaskError(f"task '{self.name}' ({self.kind}) has no batches to train on")

    def with_all_targets(self, batch: Batch) -> Batch:
        """A batch that has a target at every real token, where the kind of task can have one there."""
        return batch

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Unnormalised log-probabilities [N, C] or [N, S, C], matching `batch.labels`."""
        raise TaskError(f"task '{self.name}' ({self.kind}) has no logits to compute statistics from")

    def likelihood(self, model: nn.Module) -> Likelihood:
        """What the logits are parameters of: by default as `transformers` reads it from the model's configuration."""
        config = getattr(model, "config", None)
        problem = getattr(config, "problem_type", None)
        if problem == "multi_label_classification":
            return "bernoulli"
        one_output = getattr(config, "num_labels", None) == 1 and type(model).__name__.endswith("Classification")
        return "gaussian" if problem == "regression" or (problem is None and one_output) else "categorical"

    def surrogates(self, model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
        """What `Predictions.surrogates` are made of, differentiable.

        Args:
            model: Gave the logits.
            logits: [N, C].
            labels: As in a batch, with none missing.

        Returns:
            [N].
        """
        return surrogates(self.likelihood(model), logits, labels)

    def representation(self, model: nn.Module, batch: Batch) -> Tensor:
        """Last hidden states [N, S, D] of the backbone, before any head."""
        raise TaskError(f"task '{self.name}' ({self.kind}) has no representations")


def score_of(predictions: Predictions, metric: str, *, measured: tuple[float, float] | None = None) -> Score:
    """The score of predictions: the mean of their values, or what a metric of all of them together gives.

    Args:
        predictions: At least one.
        metric: The metric's name.
        measured: Value and standard error of a metric that is no mean over examples.
    """
    values = predictions.values
    value, error = measured or (float(values.mean()), float(values.std() / np.sqrt(len(values))))
    return Score(
        value=value,
        standard_error=error,
        examples=len(predictions),
        metric=metric,
        loss=_mean(predictions.losses),
        expected_error=1.0 - _mean(predictions.surrogates),
        seconds=predictions.seconds,
        entropy=_mean(predictions.entropies),
        is_mean=measured is None,
    )


def _mean(values: Floats | None) -> float:
    return float("nan") if values is None else float(values.mean())


TASKS: Registry[tuple[type[Task], type[TaskSettings]]] = Registry("kind of task", TaskError)


def register(task: type[Task], settings: type[TaskSettings]) -> None:
    """Makes a kind of task known by its name, with the model of its settings."""
    TASKS.register(task.kind, (task, settings))

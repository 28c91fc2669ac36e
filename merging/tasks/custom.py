"""A task whose score the user's own function gives."""

import inspect
import math
import os
import re
import time
from collections.abc import Callable, Collection
from functools import cached_property
from numbers import Real
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, PrivateAttr, field_validator
from torch import nn

from merging.checkpoints.models.parameter_names import Loading
from merging.errors import TaskError
from merging.io import hashing
from merging.registry import did_you_mean
from merging.tasks.environment import hidden, references, resolved, secret_in
from merging.tasks.head import blank_model, class_of, configuration, load_model
from merging.tasks.predictions import Floats, Predictions
from merging.tasks.task import Score, Split, Task, TaskSettings, register, score_of
from merging.tasks.user_functions import FUNCTION, code_of, load_function

MOST_EXAMPLES = 1 << 53
"""Above it, floating point does not count."""


class CustomSettings(TaskSettings):
    """A score that a function of your own gives: `function(model, checkpoint, split, limit, **arguments)`.

    It gets the live model, the path of the head's checkpoint (for its tokenizer), the split's name, and the
    number of examples to stop at (or None). It returns a number, greater is better, or a mapping with `value`
    and, where known, `standard_error` and `examples`; or with `values`, one number per example in an order that is the
    same at every call, whose mean is the score: models are then compared example by example.

    A function that writes into the model's weights is refused: let it do so in a copy (`copy.deepcopy(model)`). What else it
    changes (`model.half()`, `model.train()`, hooks) is undone before the next candidate, by building the model anew.
    """

    kind: Literal["custom"] = Field("custom", description="custom: any model and any data that your function reads.")
    evaluator: str = Field(
        pattern=FUNCTION,
        description="The function, as `module:function` on Python's path or in the working directory.",
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict,
        description="Further keyword arguments of the function. `${NAME}` stands for an environment variable: it is looked up "
        "where the function is called, and what it holds is never saved. Secrets written out are refused.",
    )
    metric: str = Field("score", min_length=1, description="What the function's number is called in tables.")
    percent: bool = Field(False, description="Whether the number is a share, which tables show × 100.")
    model_class: str | None = Field(
        None,
        description="Class in `transformers` that loads the checkpoint; by default the one that its configuration names, with "
        "all of its heads. All of a model's weights must be in its checkpoint: a head is never random.",
    )
    examples: dict[Split, int] = Field(
        default_factory=dict,
        description="Split → number of examples, for tables and budgets; a split that is left out where others are named does "
        "not exist. Without any, validation and test are measured whole.",
    )

    @property
    def is_percent(self) -> bool:
        """See `TaskSettings.is_percent`."""
        return self.percent

    _directory: str = PrivateAttr(default_factory=os.getcwd)  # travels to the workers, which may have another

    @field_validator("arguments")
    @classmethod
    def _no_secrets(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        if (place := secret_in(arguments)) is not None:
            variable = re.sub(r"\W", "_", place).upper() or "SECRET"
            raise ValueError(
                f"'{place}' looks like a secret, which would be saved with the campaign: write ${{{variable}}} instead, and "
                f"set {variable} in the environment",
            )
        return arguments


class Custom(Task):
    """A task scored by the user's function; see `Task`."""

    kind: ClassVar[str] = "custom"
    runs_foreign_code: ClassVar[bool] = True
    has_logits: ClassVar[bool] = False
    has_surrogates: ClassVar[bool] = False

    def __init__(self, name: str, settings: CustomSettings, head: str) -> None:
        super().__init__(name, settings, head)
        self.settings: CustomSettings = settings

    def check(self) -> list[str]:
        """Imports the function and tries its arguments on its signature; see `Task.check`."""
        import transformers

        try:
            inspect.signature(self._function).bind(None, self.head, "validation", None, **self._arguments())
        except TypeError as error:
            raise self._error(
                f"{self.settings.evaluator} cannot be called as function(model, checkpoint, split, limit, "
                f"**arguments) with the arguments {sorted(self.settings.arguments)}: {error}"
            ) from error
        if not hasattr(getattr(transformers, self.model_class, None), "from_pretrained"):
            autos = [name for name in dir(transformers) if name.startswith("AutoModel")]
            hint = did_you_mean(self.model_class, autos)
            raise self._error(f"transformers has no model class '{self.model_class}'. {hint}")
        return [f"task '{self.name}' is scored by {self.settings.evaluator}: no statistics can be computed for it"]

    @cached_property
    def model_class(self) -> str:
        """Name of the class in `transformers` that loads the head's checkpoint.

        Raises:
            TaskError: The checkpoint has no configuration.
        """
        if self.settings.model_class is not None:
            return self.settings.model_class
        try:
            return class_of(configuration(self.head, self.base))
        except TaskError as error:
            raise self._error(str(error)) from error

    def load_model(self) -> nn.Module:
        """The head's checkpoint as `model_class`; see `Task.load_model`."""
        return self.load_skeleton(())

    def load_skeleton(self, merged: Collection[str], dtype: torch.dtype = torch.float32) -> nn.Module:
        """See `Task.load_skeleton`."""
        return load_model(self.head, self.model_class, base=self.base, hollow=merged, dtype=dtype)

    def blank_model(self) -> tuple[nn.Module, Loading]:
        """See `Task.blank_model`."""
        try:
            return blank_model(self.head, self.model_class, self.base)
        except TaskError as error:
            raise self._error(f"{error} (`model_class`)") from error

    def size(self, split: Split) -> int:
        """What the settings say of it, for only the function knows its data."""
        return self.settings.examples.get(split, 0)

    def has_split(self, split: Split) -> bool:
        """Every split, unless the settings name some; see `Task.has_split`."""
        return not self.settings.examples or self.size(split) > 0

    def data_fingerprint(self, split: Split) -> str:
        """Content hash of the function's module, the settings and the split; not of files it opens.

        Comments and the layout of the code make no difference.
        """
        return hashing.fingerprint(
            [code_of(self._function), self.settings.model_dump(mode="json", exclude={"role"}), split]
        )

    def measure(
        self, model: nn.Module, split: Split, *, limit: int | None = None, precision: str = "float32"
    ) -> tuple[Score, Predictions | None]:
        """Calls the function; see `Task.measure`."""
        function, arguments = self._function, self._arguments()
        started = time.perf_counter()
        device = next(model.parameters()).device
        try:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                result = function(model, self.head, split, limit, **arguments)
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            raise self._error(f"{self.settings.evaluator} failed: {type(error).__name__}: {error}") from error
        fields = result if isinstance(result, dict) else {"value": result}
        if unknown := fields.keys() - {"value", "standard_error", "examples", "values"}:
            raise self._error(
                f"{self.settings.evaluator} returned {sorted(map(str, unknown))}: it may return a number, "
                "or a mapping with value, standard_error and examples, or with values"
            )
        if "values" in fields:
            if len(fields) > 1:
                raise self._error(f"{self.settings.evaluator} returned `values` and more: their mean is the score")
            predictions = Predictions(self._values(fields["values"], split), seconds=time.perf_counter() - started)
            return score_of(predictions, self.settings.metric), predictions
        size = self.size(split)
        value = self._number(fields.get("value"), "value")
        if not math.isfinite(value):
            raise self._error(f"{self.settings.evaluator} gave {value} on {split}: a score must be finite")
        error_of_it = self._number(fields.get("standard_error", math.nan), "standard_error")
        if error_of_it < 0 or math.isinf(error_of_it):
            raise self._error(f"{self.settings.evaluator} gave {error_of_it} as standard_error: it is 0 or more")
        examples = self._number(fields.get("examples", min(limit, size) if limit else size), "examples")
        if not 0 <= examples <= MOST_EXAMPLES or examples != int(examples):
            raise self._error(
                f"{self.settings.evaluator} gave {examples:g} as examples: a number of examples is needed"
            )
        score = Score(
            value=value,
            standard_error=error_of_it,
            examples=int(examples),
            metric=self.settings.metric,
            seconds=time.perf_counter() - started,
        )
        return score, None

    def _arguments(self) -> dict[str, Any]:
        """The function's arguments, with what environment variables hold."""
        try:
            return dict(resolved(self.settings.arguments))
        except KeyError as name:
            raise self._error(
                f"arguments: the environment variable {name.args[0]} is not set here: set it, and on a cluster for every node"
            ) from None

    @cached_property
    def _function(self) -> Callable[..., Any]:
        try:
            return load_function(self.settings.evaluator, self.settings._directory)
        except TaskError as error:
            raise self._error(str(error)) from error

    def influences(self, predictions: Predictions) -> Floats:
        """See `Task.influences`: what the function gave of each example."""
        return predictions.values

    def _values(self, values: Any, split: Split) -> npt.NDArray[np.float64]:
        """One finite number per example, out of what the function returned."""
        try:
            array = np.asarray(values.tolist() if isinstance(values, torch.Tensor) else values, np.float64)
        except (TypeError, ValueError) as error:
            raise self._error(f"{self.settings.evaluator} returned `values` that are no numbers: {error}") from error
        if array.ndim != 1 or not len(array):
            raise self._error(f"{self.settings.evaluator} returned `values` of shape {array.shape}: one per example")
        if not np.isfinite(array).all():
            raise self._error(f"{self.settings.evaluator} gave NaN or Inf among its values on {split}")
        return array

    def _number(self, value: Any, what: str) -> float:
        """A number out of what the function returned, also out of a NumPy or torch scalar."""
        if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex() and not value.is_meta:
            return float(value)
        if isinstance(value, Real) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError:
                raise self._error(
                    f"{self.settings.evaluator} returned a number as {what} that no float holds"
                ) from None
        raise self._error(f"{self.settings.evaluator} returned {repr(value)[:300]} as {what}: a number is needed")

    def _error(self, message: str) -> TaskError:
        return TaskError(f"task '{self.name}': {hidden(message, references(self.settings.arguments))}")


register(Custom, CustomSettings)

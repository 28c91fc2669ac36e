"""Tasks whose examples are read from files, and whose head a class of transformers loads."""

from abc import abstractmethod
from collections.abc import Collection, Iterator, Sequence, Sized
from functools import cached_property
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from merging.checkpoints.models.parameter_names import Loading
from merging.errors import TaskError
from merging.io import hashing
from merging.tasks.head import (
    blank_model,
    class_names,
    configuration_fingerprint,
    load_model,
    load_tokenizer,
    token_limit,
    tokenizer_fingerprint,
)
from merging.tasks.task import Batch, Split, Task

E = TypeVar("E", bound=Sized)
LACKING: dict[Split, str] = {
    "train": "no statistics can be computed for it",
    "test": "its winner is known on validation only",
}
"""What follows where a task has no such split."""


class FileTask(Task, Generic[E]):
    """A task on examples from files; see `Task`.

    A kind says how files become examples (`read`) and how examples become a batch (`make_batch`).
    """

    has_predictions: ClassVar[bool] = True
    model_class: ClassVar[str]
    """Name of the class in `transformers` that loads the head."""

    def __init__(self, name: str, settings: Any, head: str) -> None:
        super().__init__(name, settings, head)
        self._splits: dict[Split, E] = {}

    @abstractmethod
    def read(self, paths: Sequence[str]) -> E:
        """The examples of these files.

        Raises:
            TaskError: A file is missing or unusable; the message names it and the first bad row.
        """

    @abstractmethod
    def make_batch(self, split: Split, places: npt.NDArray[np.int64]) -> Batch:
        """Examples by their places in the split [N], with their labels."""

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
            raise self.error(str(error)) from error

    def size(self, split: Split) -> int:
        """See `Task.size`."""
        return len(self.split(split)) if split in self.settings.data else 0

    def batches(self, split: Split, start: int, stop: int, batch_size: int) -> Iterator[Batch]:
        """See `Task.batches`."""
        order = self.order(split)[start:stop]
        for first in range(0, len(order), batch_size):
            yield self.make_batch(split, order[first : first + batch_size])

    def batch(self, split: Split, places: npt.NDArray[np.int64]) -> Batch:
        """See `Task.batch`."""
        return self.make_batch(split, self.order(split)[places])

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """See `Task.logits`."""
        logits: Tensor = model(**_in_dtype_of(model, batch)).logits
        return logits

    def representation(self, model: nn.Module, batch: Batch) -> Tensor:
        """See `Task.representation`."""
        backbone: Any = model.base_model
        states: Tensor = backbone(**_in_dtype_of(model, batch)).last_hidden_state
        return states

    def score_fingerprint(self, split: Split) -> str | None:
        """Of settings, data and the head's configuration; None of a kind that is defined elsewhere; see `Task`."""
        if not type(self).__module__.startswith("merging.tasks."):
            return None
        settings = self.settings.model_dump(mode="json", exclude={"data", "role"})
        head = configuration_fingerprint(self.head, self.base)
        return hashing.fingerprint([self.data_fingerprint(split), settings, self.judged_by, head])

    def split(self, split: Split) -> E:
        """A split's examples, read once.

        Raises:
            TaskError: The settings name no such split, or its files are unusable.
        """
        if split not in self._splits:
            if split not in self.settings.data:
                raise self.error(f"`data` names no {split} split: add one")
            paths = self.settings.data[split]
            try:
                self._splits[split] = self.read([paths] if isinstance(paths, str) else paths)
            except TaskError as error:
                raise self.error(f"{split}: {error}") from error
        return self._splits[split]

    def order(self, split: Split) -> npt.NDArray[np.int64]:
        """The fixed order that `limit` and `batches` count in [N]: shuffled, for files may be sorted by label."""
        return np.random.default_rng(0).permutation(len(self.split(split)))

    @classmethod
    def data_classes(cls, settings: Any) -> list[str]:
        """Classes that a new head needs for the train split: those of `labels`, else those in the data, sorted.

        Numbered classes are named by their numbers, from 0 to the highest. Empty where heads have no classes.

        Args:
            settings: The task's.

        Raises:
            TaskError: The data are unusable.
        """
        return []

    @cached_property
    def classes(self) -> Sequence[str]:
        """Names of the head's classes, in its order.

        Raises:
            TaskError: The head has none, or other ones than `labels` names.
        """
        suffix = self.model_class.removeprefix("AutoModel")
        try:
            return class_names(self.head, self.settings.labels, self.base, suffix=suffix)
        except TaskError as error:
            raise self.error(str(error)) from error

    def missing_splits(self) -> list[str]:
        """See `Task.missing_splits`."""
        return [
            f"task '{self.name}' has no {split} split: {what}"
            for split, what in LACKING.items()
            if split not in self.settings.data
        ]

    def error(self, message: str) -> TaskError:
        """An error of this task."""
        return TaskError(f"task '{self.name}': {message}")


class TextTask(FileTask[E]):
    """A task whose examples a tokenizer reads; see `Task`."""

    def score_fingerprint(self, split: Split) -> str | None:
        """Of the tokenizer's files, too; see `Task.score_fingerprint`."""
        own = super().score_fingerprint(split)
        return None if own is None else hashing.fingerprint([own, tokenizer_fingerprint(self.head, self.base)])

    @cached_property
    def tokenizer(self) -> Any:
        """The head's tokenizer.

        Raises:
            TaskError: It is missing, damaged, or knows no words.
        """
        tokenizer = load_tokenizer(self.head, self.base)
        # padding on the left would move texts to other positions; XLNet has no absolute ones, and classifies by the last
        if not type(tokenizer).__name__.startswith("XLNet"):
            tokenizer.padding_side = "right"
        return tokenizer

    @cached_property
    def max_length(self) -> int:
        """Tokens of an example: neither tokenizer nor model reads more than their limits.

        Raises:
            TaskError: The tokenizer's limit is none, or its tokens lie beyond the model's embedding.
        """
        wanted: int = self.settings.max_length
        return min(wanted, token_limit(self.head, self.tokenizer, self.blank_model()[0]))


def _in_dtype_of(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """A batch's inputs, numbers such as pixels in the model's dtype."""
    dtype = next(model.parameters()).dtype
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.inputs.items()}


def longest_first(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Places in batches of at most `size`, the longest first, so that batches need little padding."""
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    return [order[first : first + size] for first in range(0, len(order), size)]

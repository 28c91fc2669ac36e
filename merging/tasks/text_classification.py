"""Texts, or pairs of texts, in classes."""

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from merging.checkpoints.adapters.adapter import is_adapter
from merging.checkpoints.models.parameter_names import Loading
from merging.errors import TaskError
from merging.io import hashing
from merging.tasks.classification import classified, measured
from merging.tasks.head import (
    blank_model,
    class_names,
    has_tokenizer,
    load_model,
    load_tokenizer,
    token_limit,
    tokenizer_identity,
)
from merging.tasks.metrics import METRICS, is_mean
from merging.tasks.predictions import Predictions
from merging.tasks.task import SPLITS, Batch, Score, Split, Task, TaskSettings, register, score_of

if TYPE_CHECKING:
    from merging.tasks.labelled_texts import Examples

MODEL_CLASS = "AutoModelForSequenceClassification"


class TextClassificationSettings(TaskSettings):
    """Texts, or pairs of texts, in classes."""

    kind: Literal["text_classification"] = Field(
        "text_classification",
        description="text_classification, also where no kind is named; or another of those below.",
    )
    data: dict[Split, str | Annotated[list[str], Field(min_length=1)]] = Field(
        min_length=1,
        description="Split (train, validation, test) → file or list of files: Parquet, CSV or JSON lines, "
        "local or at any fsspec address. Train feeds statistics, validation the search, test the last table.",
    )
    text: str = Field("text", description="Column of the text.")
    text_pair: str | None = Field(None, description="Column of a second text, for tasks on pairs.")
    label: str | None = Field(
        "label",
        description="Column of the label: a class's name, or its position in the head; null for unlabelled calibration data.",
    )
    labels: list[str] | None = Field(
        None,
        min_length=2,
        description="Names of the classes in the head's order; default: the head's `id2label`.",
    )
    metric: str = Field("accuracy", description=f"What is maximised: {', '.join(METRICS)}.")
    max_length: int = Field(128, ge=2, description="Tokens that a text is cut to.")
    batch_size: int = Field(64, ge=1, description="Examples per step of evaluation; does not change the score.")

    @field_validator("labels")
    @classmethod
    def _each_class_once(cls, names: list[str] | None) -> list[str] | None:
        if names and len(set(names)) < len(names):
            raise ValueError("two classes have the same name")
        return names

    @model_validator(mode="after")
    def _columns_of_their_own(self) -> "TextClassificationSettings":
        columns = [name for name in (self.text, self.text_pair, self.label) if name is not None]
        if len(set(columns)) < len(columns):
            raise ValueError("`text`, `text_pair` and `label` name columns, each another one")
        return self

    @model_validator(mode="after")
    def _labels_where_judged(self) -> "TextClassificationSettings":
        if self.label is None and set(self.data) != {"train"}:
            raise ValueError(
                "`label: null` is for calibration data, a train split alone: nothing is judged without labels"
            )
        return self

    @field_validator("metric")
    @classmethod
    def _known_metric(cls, name: str) -> str:
        try:
            METRICS[name]
        except TaskError as error:
            raise ValueError(str(error)) from error
        return name


class TextClassification(Task):
    """A text classification task; see `Task`."""

    kind: ClassVar[str] = "text_classification"
    has_predictions: ClassVar[bool] = True

    def __init__(self, name: str, settings: TextClassificationSettings, head: str) -> None:
        super().__init__(name, settings, head)
        self.settings: TextClassificationSettings = settings
        self._examples: dict[Split, Examples] = {}
        self._evaluation: dict[tuple[Split, bytes], list[tuple[Batch, npt.NDArray[np.int64]]]] = {}

    def check(self) -> list[str]:
        """Reads all splits, the head's classes and its tokenizer; see `Task.check`."""
        problems: list[str] = []
        if "validation" not in self.settings.data and set(self.settings.data) != {"train"}:
            problems.append("`data` names no validation split, which candidates are scored on: add one")
        with _collected(problems):
            _ = self._tokenizer
        with _collected(problems):
            _ = self._classes
            with _collected(problems):
                _ = self._max_length
            for split in self.settings.data:
                with _collected(problems):
                    self._split(split)
        if problems:
            prefix = str(self._error(""))
            lines = "".join(f"\n  - {problem.removeprefix(prefix)}" for problem in problems)
            raise self._error(f"{len(problems)} thing{'s' if len(problems) > 1 else ''} to mend:{lines}")
        return self._notes()

    def load_model(self) -> nn.Module:
        """The head's checkpoint as `AutoModelForSequenceClassification`; see `Task.load_model`."""
        return self.load_skeleton(())

    def load_skeleton(self, merged: Collection[str]) -> nn.Module:
        """See `Task.load_skeleton`."""
        model = load_model(self.head, MODEL_CLASS, base=self.base, hollow=merged)
        config: Any = model.config
        if config.pad_token_id is None:
            config.pad_token_id = self._tokenizer.pad_token_id
        return model

    def blank_model(self) -> tuple[nn.Module, Loading]:
        """See `Task.blank_model`."""
        return blank_model(self.head, MODEL_CLASS, self.base)

    def size(self, split: Split) -> int:
        """See `Task.size`."""
        return len(self._split(split)) if split in self.settings.data else 0

    def data_fingerprint(self, split: Split) -> str:
        """Content hash of texts, class indices, the length they are cut to, and the tokenizer."""
        examples = self._split(split)
        prepared = [
            examples.texts,
            examples.labels.tolist(),
            self._max_length,
            tokenizer_identity(self._tokenizer),
        ]
        return hashing.fingerprint(prepared)

    def predict(
        self, model: nn.Module, split: Split, positions: npt.NDArray[np.int64], *, precision: str = "float32"
    ) -> Predictions:
        """See `Task.predict`. Loss and metric are computed in float64 from the model's logits."""
        started = time.perf_counter()
        device = next(model.parameters()).device
        parts, batches = [], self._evaluation_batches(split, positions)
        with (
            torch.inference_mode(),
            torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"),
        ):
            for batch, _ in batches:
                parts.append(self.logits(model, batch.to(device)).double())
        logits = torch.cat(parts).cpu()
        if wrong := int((~logits.isfinite().all(dim=1)).sum()):
            raise self._error(f"the model gave NaN or Inf for {wrong} of {len(logits)} {split} examples")
        back = np.argsort(np.concatenate([places for _, places in batches]))
        labels = self._split(split).labels[self._order(split)[positions]]
        log_probabilities = log_softmax(logits, dim=1).numpy()[back]
        return classified(self.settings.metric, labels, log_probabilities, time.perf_counter() - started)

    def score(self, predictions: Predictions) -> Score:
        """See `Task.score`."""
        metric = self.settings.metric
        return score_of(predictions, metric, measured=None if is_mean(metric) else measured(metric, predictions))

    def batches(self, split: Split, start: int, stop: int, batch_size: int) -> Iterator[Batch]:
        """See `Task.batches`."""
        order = self._order(split)[start:stop]
        for first in range(0, len(order), batch_size):
            positions = order[first : first + batch_size]
            yield self._batch(split, positions, self._tokens(split, positions))

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Unnormalised log-probabilities [N, C]."""
        logits: Tensor = model(**batch.inputs).logits
        return logits

    def representation(self, model: nn.Module, batch: Batch) -> Tensor:
        """The backbone's last hidden states [N, S, D]."""
        backbone: Any = model.base_model
        states: Tensor = backbone(**batch.inputs).last_hidden_state
        return states

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizer = load_tokenizer(self.head, self.base)
        if not type(tokenizer).__name__.startswith(
            "XLNet"
        ):  # which classifies by the last place, and has no absolute ones
            tokenizer.padding_side = "right"  # padding on the left would move texts to other positions
        return tokenizer

    @cached_property
    def _max_length(self) -> int:
        """Tokens that a text is cut to: neither tokenizer nor model reads more than their limits."""
        return min(self.settings.max_length, token_limit(self.head, self._tokenizer, self.blank_model()[0]))

    @cached_property
    def _classes(self) -> Sequence[str]:
        """Names of the head's classes, in its order."""
        try:
            return class_names(self.head, self.settings.labels, self.base)
        except TaskError as error:
            raise self._error(str(error)) from error

    def _split(self, split: Split) -> "Examples":
        """A split's examples, read once."""
        if split not in self._examples:
            if split not in self.settings.data:
                raise self._error(f"`data` names no {split} split: add one")
            paths = self.settings.data[split]
            from merging.tasks.labelled_texts import Columns, read_examples  # with pandas, which takes a second

            columns = Columns(self.settings.text, self.settings.text_pair, self.settings.label)
            classes = self._classes
            try:
                read = read_examples([paths] if isinstance(paths, str) else paths, columns, classes)
            except TaskError as error:
                raise self._error(f"{split}: {error}") from error
            self._examples[split] = read
        return self._examples[split]

    def _order(self, split: Split) -> npt.NDArray[np.int64]:
        """The fixed order that `limit` and `batches` count in: shuffled, for files may be sorted by label."""
        return np.random.default_rng(0).permutation(len(self._split(split)))

    def _evaluation_batches(
        self, split: Split, positions: npt.NDArray[np.int64]
    ) -> list[tuple[Batch, npt.NDArray[np.int64]]]:
        """Examples tokenised once, longest first so that batches need little padding, and each one's place asked for."""
        key = (split, positions.tobytes())
        if key not in self._evaluation:
            order = self._order(split)[positions]
            rows = self._tokens(split, order)
            longest_first = np.argsort([-len(row["input_ids"]) for row in rows], kind="stable")
            size = self.settings.batch_size
            chunks = [longest_first[first : first + size] for first in range(0, len(rows), size)]
            self._evaluation[key] = [
                (self._batch(split, order[chunk], [rows[i] for i in chunk]), chunk) for chunk in chunks
            ]
        return self._evaluation[key]

    def _tokens(self, split: Split, positions: npt.NDArray[np.int64]) -> list[dict[str, list[int]]]:
        """What the tokenizer makes of examples, one by one."""
        texts = [[column[i] for i in positions] for column in self._split(split).texts]
        tokens = self._tokenizer(*texts, truncation=True, max_length=self._max_length)
        return [{name: tokens[name][row] for name in tokens} for row in range(len(positions))]

    def _batch(self, split: Split, positions: npt.NDArray[np.int64], rows: list[dict[str, list[int]]]) -> Batch:
        inputs: dict[str, Tensor] = dict(self._tokenizer.pad(rows, return_tensors="pt"))
        return Batch(
            inputs=inputs,
            labels=torch.from_numpy(self._split(split).labels[positions]),
            indices=torch.from_numpy(positions),
            mask=inputs["attention_mask"].bool(),
        )

    def _notes(self) -> list[str]:
        """A length that is not reached, missing splits, and texts that stand in two splits."""
        notes = []
        if self._max_length < self.settings.max_length:
            notes.append(
                f"task '{self.name}': texts are cut to {self._max_length} tokens, the limit of tokenizer and model"
            )
        if not has_tokenizer(self.head) and not is_adapter(self.head):
            notes.append(f"task '{self.name}': {self.head} has no tokenizer, and the base's is used")
        if "train" not in self.settings.data:
            notes.append(f"task '{self.name}' has no train split: no statistics can be computed for it")
        if "test" not in self.settings.data:
            notes.append(f"task '{self.name}' has no test split: its winner is known on validation only")
        texts = {
            split: set(zip(*self._split(split).texts, strict=True)) for split in SPLITS if split in self.settings.data
        }
        for split in ("validation", "test"):
            if both := texts.get("train", set()) & texts.get(split, set()):
                notes.append(f"task '{self.name}': {len(both)} texts of {split} also stand in train")
        return notes

    def _error(self, message: str) -> TaskError:
        return TaskError(f"task '{self.name}': {message}")


@contextmanager
def _collected(problems: list[str]) -> Iterator[None]:
    """Keeps a task's error for a list of all of them."""
    try:
        yield
    except TaskError as error:
        problems.append(str(error))


register(TextClassification, TextClassificationSettings)

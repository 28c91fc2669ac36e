"""Texts, or pairs of texts: in classes, with several labels, or with numbers."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from merging.checkpoints.adapters.adapter import is_adapter
from merging.errors import TaskError
from merging.io import hashing
from merging.tasks.classification import Classifier, ClassifierSettings, batch_labels, labels_where_judged
from merging.tasks.file_task import TextTask, longest_first
from merging.tasks.head import (
    has_tokenizer,
    tokenizer_identity,
)
from merging.tasks.labels import label_columns
from merging.tasks.metrics import Labels
from merging.tasks.task import SPLITS, Batch, Split, register

if TYPE_CHECKING:
    from merging.tasks.labelled_texts import Examples


class TextClassificationSettings(ClassifierSettings):
    """Texts, or pairs of texts: one class each, several labels, or numbers (a regression)."""

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
    max_length: int = Field(128, ge=2, description="Tokens that a text is cut to.")
    batch_size: int = Field(64, ge=1, description="Examples per step of evaluation; does not change the score.")

    @model_validator(mode="after")
    def _columns_of_their_own(self) -> "TextClassificationSettings":
        columns = [*filter(None, (self.text, self.text_pair)), *label_columns(self.label)]
        if len(set(columns)) < len(columns):
            raise ValueError("`text`, `text_pair` and `label` name columns, each another one")
        return self

    _labels_where_judged = model_validator(mode="after")(labels_where_judged)


class TextClassification(Classifier["Examples"], TextTask["Examples"]):
    """A text classification task; see `Task`."""

    kind: ClassVar[str] = "text_classification"
    model_class: ClassVar[str] = "AutoModelForSequenceClassification"

    def __init__(self, name: str, settings: TextClassificationSettings, head: str) -> None:
        super().__init__(name, settings, head)
        self.settings: TextClassificationSettings = settings
        self._evaluation: dict[tuple[Split, bytes], list[tuple[Batch, npt.NDArray[np.int64]]]] = {}

    def check(self) -> list[str]:
        """Reads all splits, the head's classes and its tokenizer; see `Task.check`."""
        problems: list[str] = []
        if "validation" not in self.settings.data and set(self.settings.data) != {"train"}:
            problems.append("`data` names no validation split, which candidates are scored on: add one")
        with _collected(problems):
            _ = self.tokenizer
        with _collected(problems):
            _ = self.metric
            with _collected(problems):
                _ = self.max_length
            for split in self.settings.data:
                with _collected(problems):
                    self.split(split)
        for split in self.settings.data if not problems else ():
            with _collected(problems):
                self._check_tokens(split)
        if problems:
            prefix = str(self.error(""))
            lines = "".join(f"\n  - {problem.removeprefix(prefix)}" for problem in problems)
            raise self.error(f"{len(problems)} thing{'s' if len(problems) > 1 else ''} to mend:{lines}")
        return self._notes()

    def load_skeleton(self, merged: Collection[str], dtype: torch.dtype = torch.float32) -> nn.Module:
        """See `Task.load_skeleton`."""
        model = super().load_skeleton(merged, dtype)
        config: Any = model.config
        if config.pad_token_id is None:
            config.pad_token_id = self.tokenizer.pad_token_id
        return model

    def data_fingerprint(self, split: Split) -> str:
        """Content hash of texts, class indices, the length they are cut to, and the tokenizer."""
        examples = self.split(split)
        prepared = [
            examples.texts,
            examples.labels.tolist() if np.isfinite(examples.labels).all() else None,
            self.max_length,
            tokenizer_identity(self.tokenizer),
        ]
        # of one class as ever, so that statistics that were computed keep their names
        others = [] if self.outputs == "categorical" else [self.outputs, self.spread]
        return hashing.fingerprint([*prepared, *others])

    def read(self, paths: Sequence[str]) -> "Examples":
        """See `FileTask.read`."""
        from merging.tasks.labelled_texts import Columns, read_examples  # with pandas, which takes a second

        columns = Columns(self.settings.text, self.settings.text_pair, self.settings.label)
        return read_examples(paths, columns, self.classes, self.outputs)

    def labels_of(self, split: Split) -> Labels:
        """See `Classifier.labels_of`."""
        return self.split(split).labels

    def make_batch(self, split: Split, places: npt.NDArray[np.int64]) -> Batch:
        """See `FileTask.make_batch`."""
        return self._batch(split, places, self._tokens(split, places))

    def evaluation_batches(
        self, split: Split, places: npt.NDArray[np.int64]
    ) -> list[tuple[Batch, npt.NDArray[np.int64]]]:
        """Examples tokenised once, longest first so that batches need little padding."""
        key = (split, places.tobytes())
        if key not in self._evaluation:
            rows = self._tokens(split, places)
            chunks = longest_first([len(row["input_ids"]) for row in rows], self.settings.batch_size)
            self._evaluation[key] = [
                (self._batch(split, places[chunk], [rows[i] for i in chunk]), np.array(chunk)) for chunk in chunks
            ]
        return self._evaluation[key]

    def _check_tokens(self, split: Split) -> None:
        """Whether every text has a token, which no tokenizer that adds special ones leaves to the text.

        Raises:
            TaskError: The split is unusable, or some text has none.
        """
        examples = self.split(split)
        if self.tokenizer.num_special_tokens_to_add() or not len(examples):
            return
        rows = self.tokenizer(*examples.texts)["input_ids"]
        empty = [name for name, ids in zip(examples.names, rows, strict=True) if not ids]
        if empty:
            more = f" (and {len(empty) - 1} more)" if empty[1:] else ""
            raise self.error(
                f"{split}: {empty[0]}: column '{self.settings.text}' holds no token{more}: remove those rows"
            )

    def _tokens(self, split: Split, positions: npt.NDArray[np.int64]) -> list[dict[str, list[int]]]:
        """What the tokenizer makes of examples, one by one."""
        texts = [[column[i] for i in positions] for column in self.split(split).texts]
        tokens = self.tokenizer(*texts, truncation=True, max_length=self.max_length)
        return [{name: tokens[name][row] for name in tokens} for row in range(len(positions))]

    def _batch(self, split: Split, positions: npt.NDArray[np.int64], rows: list[dict[str, list[int]]]) -> Batch:
        inputs: dict[str, Tensor] = dict(self.tokenizer.pad(rows, return_tensors="pt"))
        return Batch(
            inputs=inputs,
            labels=batch_labels(self.labels_of(split)[positions]),
            indices=torch.from_numpy(positions),
            mask=inputs["attention_mask"].bool(),
        )

    def _notes(self) -> list[str]:
        """A length that is not reached, missing splits, and texts that stand in two splits."""
        notes = []
        if self.max_length < self.settings.max_length:
            notes.append(
                f"task '{self.name}': texts are cut to {self.max_length} tokens, the limit of tokenizer and model"
            )
        if not has_tokenizer(self.head) and not is_adapter(self.head):
            notes.append(f"task '{self.name}': {self.head} has no tokenizer, and the base's is used")
        notes += self.missing_splits()
        texts = {
            split: set(zip(*self.split(split).texts, strict=True)) for split in SPLITS if split in self.settings.data
        }
        for split in ("validation", "test"):
            if both := texts.get("train", set()) & texts.get(split, set()):
                notes.append(f"task '{self.name}': {len(both)} texts of {split} also stand in train")
        return notes


@contextmanager
def _collected(problems: list[str]) -> Iterator[None]:
    """Keeps a task's error for a list of all of them."""
    try:
        yield
    except TaskError as error:
        problems.append(str(error))


register(TextClassification, TextClassificationSettings)

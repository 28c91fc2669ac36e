"""Words with tags: named entities, parts of speech."""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import nn
from torch.nn.functional import log_softmax

from merging.errors import StorageError, TaskError
from merging.io import hashing, storage
from merging.io.documents import is_text
from merging.tasks.classification import ClassNames
from merging.tasks.file_task import TextTask, longest_first
from merging.tasks.head import tokenizer_identity
from merging.tasks.labels import quoted
from merging.tasks.metrics.metric import influences, ratio
from merging.tasks.predictions import Floats, Predictions
from merging.tasks.tagging.spans import SpanCounts, count, f1
from merging.tasks.task import IGNORED, UNKNOWN, Batch, Score, Split, TaskSettings, register, score_of

CONLL = (".conll", ".bio", ".iob", ".iob2", ".txt")


class TokenClassificationSettings(TaskSettings):
    """Words with tags. The first sub-word of a word carries its tag."""

    kind: Literal["token_classification"] = Field("token_classification", description="token_classification.")
    data: dict[Split, str | Annotated[list[str], Field(min_length=1)]] = Field(
        min_length=1,
        description="Split (train, validation, test) → file or list of files: Parquet or JSON lines with lists, or CoNLL "
        "columns (.conll, .bio, .iob2, .txt; the word first, the tag last, a blank line between sentences).",
    )
    words: str = Field("words", description="Column of the list of words.")
    tags: str | None = Field(
        "tags",
        description="Column of the list of tags: names, or positions in the head. null for unlabelled calibration data.",
    )
    labels: ClassNames | None = Field(
        None, description="Names of the tags in the head's order; default: the head's `id2label`."
    )
    metric: Literal["entity_f1", "token_accuracy"] = Field(
        "entity_f1",
        description="entity_f1 (micro F1 over spans, as seqeval counts them), or token_accuracy (over words).",
    )
    max_length: int = Field(256, ge=2, description="Tokens that a sentence is cut to; tags beyond are not predicted.")
    batch_size: int = Field(32, ge=1, description="Sentences per step of evaluation; does not change the score.")

    @model_validator(mode="after")
    def _tags_where_judged(self) -> "TokenClassificationSettings":
        if self.tags is None and set(self.data) != {"train"}:
            raise ValueError(
                "`tags: null` is for calibration data, a train split alone: nothing is judged without tags"
            )
        return self

    @property
    def is_labelled(self) -> bool:
        """See `TaskSettings.is_labelled`."""
        return self.tags is not None

    @property
    def is_percent(self) -> bool:
        """Both metrics are shares."""
        return True


@dataclass(frozen=True)
class _Sentence:
    """Words, their tags, and what the sentence is called in messages."""

    words: tuple[str, ...]
    tags: tuple[int, ...]
    name: str


@dataclass(frozen=True)
class _Row:
    """A sentence as a file has it; of one without tags there are none.

    Args:
        place: Where it stands, for messages.
        lines: The line of each word; of tables none.
    """

    place: str
    words: Sequence[Any]
    tags: Sequence[Any] | None
    lines: Sequence[int] = ()

    def at(self, word: int) -> str:
        """Where a word stands, for messages."""
        return f"line {self.lines[word]}, {self.place}" if self.lines else self.place


class TokenClassification(TextTask[list[_Sentence]]):
    """A token classification task; see `Task`."""

    kind: ClassVar[str] = "token_classification"
    model_class: ClassVar[str] = "AutoModelForTokenClassification"
    one_label: ClassVar[bool] = False
    can_be_negative: ClassVar[bool] = False

    def __init__(self, name: str, settings: TokenClassificationSettings, head: str) -> None:
        super().__init__(name, settings, head)
        self.settings: TokenClassificationSettings = settings
        self._encoded: dict[tuple[Split, int], tuple[list[int], list[int]]] = {}

    @classmethod
    def data_classes(cls, settings: Any) -> list[str]:
        """See `FileTask.data_classes`."""
        from merging.tasks.labels import classes_among  # with pandas, which takes a second

        if settings.labels is not None:
            return list(settings.labels)
        paths = [settings.data["train"]] if isinstance(settings.data["train"], str) else settings.data["train"]
        tags = [tag for path in paths for row in _rows(path, settings) for tag in row.tags or ()]
        return classes_among(tags, ", ".join(paths))

    def check(self) -> list[str]:
        """Reads all splits, the head's tags and its tokenizer; see `Task.check`."""
        if len(self.classes) < 2:
            raise self.error(f"the head of {self.head} has one output: there is no tag to choose")
        self.blank_model()
        cut = 0
        for split in self.settings.data:
            for place, sentence in enumerate(self.split(split)):
                _, labels = self._tokens(split, place)
                cut += sum(label != IGNORED for label in labels) < len(sentence.tags)
        notes = [f"task '{self.name}': {cut} sentences are cut to {self.max_length} tokens"] if cut else []
        return notes + self.missing_splits()

    def data_fingerprint(self, split: Split) -> str:
        """Content hash of words and tags, the length they are cut to, the metric and the tokenizer."""
        sentences = [[sentence.words, sentence.tags] for sentence in self.split(split)]
        prepared = [sentences, self.max_length, self.settings.metric, tokenizer_identity(self.tokenizer)]
        return hashing.fingerprint(prepared)

    def predict(
        self, model: nn.Module, split: Split, positions: npt.NDArray[np.int64], *, precision: str = "float32"
    ) -> Predictions:
        """See `Task.predict`. The surrogate is the mean probability of the true tags, the loss their mean −log p."""
        started = time.perf_counter()
        device = next(model.parameters()).device
        places = self.order(split)[positions]
        log_true, entropies = np.zeros((2, len(places)))
        chances = np.zeros(len(places))
        tags: list[tuple[list[int], list[int]]] = [([], [])] * len(places)
        lengths = [len(self._tokens(split, int(place))[0]) for place in places]
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            for chunk in longest_first(lengths, self.settings.batch_size):
                batch = self.make_batch(split, places[chunk]).to(device)
                log_p = log_softmax(self.logits(model, batch).double(), dim=-1).cpu()
                for place, row, labels in zip(chunk, log_p, batch.labels.cpu(), strict=True):
                    true, own = labels[labels != IGNORED], row[labels != IGNORED]
                    if not own.isfinite().all():
                        raise self.error(f"the model gave NaN or Inf for a sentence of {split}")
                    of_true = own.gather(1, true[:, None])[:, 0]
                    log_true[place], chances[place] = float(of_true.mean()), float(of_true.exp().mean())
                    entropies[place] = float(-(own.exp() * own).sum(-1).mean())
                    tags[place] = true.tolist(), own.argmax(-1).tolist()
        right = np.array([sum(map(int.__eq__, *pair)) for pair in tags], np.float64)
        words = np.array([len(true) for true, _ in tags], np.float64)
        counts = count(*([[self.classes[tag] for tag in pair[side]] for pair in tags] for side in (0, 1)))
        return Predictions(
            values=chances if self.settings.metric == "entity_f1" else right / words,
            surrogates=chances,
            losses=-log_true,
            entropies=entropies,
            payload={
                "right": right,
                "words": words,
                **{f"spans_{name}": value for name, value in vars(counts).items()},
            },
            seconds=time.perf_counter() - started,
        )

    def score(self, predictions: Predictions) -> Score:
        """See `Task.score`."""
        payload = {name: np.asarray(value, np.float64) for name, value in predictions.payload.items()}
        if self.settings.metric == "entity_f1":
            counts = SpanCounts(payload["spans_right"], payload["spans_predicted"], payload["spans_true"])
            return score_of(predictions, "entity_f1", measured=f1(counts))
        right, words = payload["right"], payload["words"]
        value = right.sum() / words.sum()
        # delta method, for a ratio of means over sentences
        error = (right - value * words).std() / words.mean() / np.sqrt(len(words))
        return score_of(predictions, "token_accuracy", measured=(float(value), float(error)))

    def influences(self, predictions: Predictions) -> Floats:
        """See `Task.influences`."""
        payload = {name: np.asarray(value, np.float64) for name, value in predictions.payload.items()}
        over, under = payload["right"], payload["words"]
        if self.settings.metric == "entity_f1":
            over, under = 2 * payload["spans_right"], payload["spans_predicted"] + payload["spans_true"]
        return influences(lambda sums: ratio(sums[:, 0], sums[:, 1]), np.stack([over, under], axis=1))

    @cached_property
    def tokenizer(self) -> Any:
        """The head's tokenizer, which says which word a token is of; see `TextTask.tokenizer`."""
        tokenizer = super().tokenizer
        if not tokenizer.is_fast:
            raise self.error("the tokenizer does not say which word a token is of: save it with its tokenizer.json")
        return tokenizer

    def read(self, paths: Sequence[str]) -> list[_Sentence]:
        """See `FileTask.read`."""
        return [sentence for path in paths for sentence in _read(path, self.settings, self.classes)]

    def _tokens(self, split: Split, place: int) -> tuple[list[int], list[int]]:
        """Token ids of a sentence, and its tags at first sub-words."""
        if (split, place) not in self._encoded:
            sentence = self.split(split)[place]
            encoding = self.tokenizer(
                [list(sentence.words)], is_split_into_words=True, truncation=True, max_length=self.max_length
            )
            words = encoding.word_ids(0)
            first = [word is not None and word not in words[:at] for at, word in enumerate(words)]
            labels = [sentence.tags[word] if new else IGNORED for word, new in zip(words, first, strict=True)]
            if all(label == IGNORED for label in labels):
                raise self.error(f"{split}: {sentence.name} has no word that the tokenizer reads: remove it")
            self._encoded[split, place] = list(encoding["input_ids"][0]), labels
        return self._encoded[split, place]

    def make_batch(self, split: Split, places: npt.NDArray[np.int64]) -> Batch:
        """See `FileTask.make_batch`; labels [N, S] hold the tags, at first sub-words."""
        rows = [self._tokens(split, int(place)) for place in places]
        inputs = dict(self.tokenizer.pad([{"input_ids": ids} for ids, _ in rows], return_tensors="pt"))
        mask = inputs["attention_mask"].bool()
        labels = torch.full(mask.shape, IGNORED)
        for row, real, (_, tags) in zip(labels, mask, rows, strict=True):
            row[real] = torch.tensor(tags)
        return Batch(inputs, labels, torch.from_numpy(places), mask)


def _read(path: str, settings: TokenClassificationSettings, classes: Sequence[str]) -> list[_Sentence]:
    """A file's sentences; the first bad one is named."""
    positions: dict[Any, int] = {name: place for place, name in enumerate(classes)}
    positions |= {place: place for place in range(len(classes)) if place not in positions}
    sentences = []
    for row in _rows(path, settings):
        words, tags = row.words, [UNKNOWN] * len(row.words) if row.tags is None else row.tags
        if not words or len(words) != len(tags):
            raise TaskError(f"{path}, {row.place}: {len(words)} words and {len(tags)} tags")
        for number, word in enumerate(words):
            if not is_text(word) or not word:
                raise TaskError(f"{path}, {row.at(number)}: {repr(word)[:100]} is no word")
        for number, tag in enumerate(row.tags or ()):
            if not _is_tag(tag) or tag not in positions:
                raise TaskError(
                    f"{path}, {row.at(number)}: the tag {repr(tag)[:100]} is none of the head's ({', '.join(classes)}); "
                    "`labels` names them in the head's order"
                )
        numbers = tuple(UNKNOWN if row.tags is None else positions[tag] for tag in tags)
        sentences.append(_Sentence(tuple(words), numbers, f"{path}, {row.place}"))
    if not sentences:
        raise TaskError(f"{path}: there are no sentences")
    return sentences


def _rows(path: str, settings: TokenClassificationSettings) -> Iterator[_Row]:
    """Words and tags of a file's sentences."""
    return _conll(path, settings.is_labelled) if path.lower().endswith(CONLL) else _table(path, settings)


def _table(path: str, settings: TokenClassificationSettings) -> Iterator[_Row]:
    from merging.tasks.labelled_texts import read_table  # with pandas, which takes a second

    columns = [settings.words] if settings.tags is None else [settings.words, settings.tags]
    frame = read_table([path], columns)
    place = f"column{'s' * (len(columns) > 1)} {quoted(columns)}"
    for number, values in enumerate(zip(*(frame[name] for name in columns), strict=True), start=1):
        for name, value in zip(columns, values, strict=True):
            if isinstance(value, str | Mapping) or not hasattr(value, "__len__"):
                raise TaskError(f"{path}, row {number}: column '{name}' holds {repr(value)[:100]}: a list is needed")
        words, *tags = ([one.item() if isinstance(one, np.generic) else one for one in value] for value in values)
        yield _Row(f"{place}, sentence {number}", words, tags[0] if tags else None)


def _is_tag(value: object) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _conll(path: str, has_tags: bool) -> Iterator[_Row]:
    try:
        text = storage.read_text(path)
    except StorageError as error:
        raise TaskError(str(error)) from error
    rows: list[tuple[str, str, int]] = []
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    sentences = 0
    for number, line in enumerate([*lines, ""], start=1):
        # words may hold other blanks, even line separators, and any blank where columns are apart by tabs
        stripped = line.strip(" \t")
        columns = re.split("\t+" if "\t" in stripped else " +", stripped) if stripped else []
        if columns and columns[0] == "-DOCSTART-":
            continue
        if columns and len(columns) < 2 and has_tags:
            raise TaskError(f"{path}, line {number}: {line!r} has no tag: a word, blanks and a tag are needed")
        if columns:
            rows.append((columns[0], columns[-1], number))
        elif rows:
            sentences += 1
            words, tags, places = zip(*rows, strict=True)
            yield _Row(f"sentence {sentences}", words, tags if has_tags else None, places)
            rows = []


register(TokenClassification, TokenClassificationSettings)

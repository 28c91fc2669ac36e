"""Words with tags: named entities, parts of speech."""

import re
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from merging.checkpoints.models.parameter_names import Loading
from merging.errors import StorageError, TaskError
from merging.io import hashing, storage
from merging.io.documents import is_text
from merging.tasks.head import blank_model, class_names, load_model, load_tokenizer, tokenizer_identity
from merging.tasks.language.prompts import longest_first
from merging.tasks.predictions import Predictions
from merging.tasks.tagging.spans import Counts, count, f1
from merging.tasks.task import Batch, Score, Split, Task, TaskSettings, register, score_of

MODEL_CLASS = "AutoModelForTokenClassification"
IGNORED = -100
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
    tags: str = Field("tags", description="Column of the list of tags: names, or positions in the head.")
    labels: list[str] | None = Field(
        None, min_length=2, description="Names of the tags in the head's order; default: the head's `id2label`."
    )
    metric: Literal["entity_f1", "token_accuracy"] = Field(
        "entity_f1",
        description="entity_f1 (micro F1 over spans, as seqeval counts them), or token_accuracy (over words).",
    )
    max_length: int = Field(256, ge=2, description="Tokens that a sentence is cut to; tags beyond are not predicted.")
    batch_size: int = Field(32, ge=1, description="Sentences per step of evaluation; does not change the score.")


@dataclass(frozen=True)
class _Sentence:
    words: tuple[str, ...]
    tags: tuple[int, ...]


class TokenClassification(Task):
    """A token classification task; see `Task`."""

    kind: ClassVar[str] = "token_classification"
    has_predictions: ClassVar[bool] = True
    one_label: ClassVar[bool] = False

    def __init__(self, name: str, settings: TokenClassificationSettings, head: str) -> None:
        super().__init__(name, settings, head)
        self.settings: TokenClassificationSettings = settings
        self._sentences: dict[Split, list[_Sentence]] = {}
        self._encoded: dict[tuple[Split, int], tuple[list[int], list[int]]] = {}

    def check(self) -> list[str]:
        """Reads all splits, the head's tags and its tokenizer; see `Task.check`."""
        _ = self._classes
        self.blank_model()
        cut = 0
        for split in self.settings.data:
            for place, sentence in enumerate(self._split(split)):
                _, labels = self._tokens(split, place)
                cut += sum(label != IGNORED for label in labels) < len(sentence.tags)
        notes = [f"task '{self.name}': {cut} sentences are cut to {self._max_length} tokens"] if cut else []
        lacking = {"train": "no statistics can be computed for it", "test": "its winner is known on validation only"}
        return notes + [
            f"task '{self.name}' has no {split} split: {lack}"
            for split, lack in lacking.items()
            if split not in self.settings.data
        ]

    def load_model(self) -> nn.Module:
        """The head's checkpoint as `AutoModelForTokenClassification`; see `Task.load_model`."""
        return self.load_skeleton(())

    def load_skeleton(self, merged: Collection[str]) -> nn.Module:
        """See `Task.load_skeleton`."""
        return load_model(self.head, MODEL_CLASS, base=self.base, hollow=merged)

    def blank_model(self) -> tuple[nn.Module, Loading]:
        """See `Task.blank_model`."""
        return blank_model(self.head, MODEL_CLASS, self.base)

    def size(self, split: Split) -> int:
        """See `Task.size`."""
        return len(self._split(split)) if split in self.settings.data else 0

    def data_fingerprint(self, split: Split) -> str:
        """Content hash of words and tags, the length they are cut to, the metric and the tokenizer."""
        sentences = [[sentence.words, sentence.tags] for sentence in self._split(split)]
        prepared = [sentences, self._max_length, self.settings.metric, tokenizer_identity(self._tokenizer)]
        return hashing.fingerprint(prepared)

    def predict(
        self, model: nn.Module, split: Split, positions: npt.NDArray[np.int64], *, precision: str = "float32"
    ) -> Predictions:
        """See `Task.predict`. The surrogate is the mean probability of the true tags, the loss their mean −log p."""
        started = time.perf_counter()
        device = next(model.parameters()).device
        places = self._order(split)[positions]
        log_true, entropies = np.zeros((2, len(places)))
        chances = np.zeros(len(places))
        tags: list[tuple[list[int], list[int]]] = [([], [])] * len(places)
        lengths = [len(self._tokens(split, int(place))[0]) for place in places]
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            for chunk in longest_first(lengths, self.settings.batch_size):
                batch = self._batch(split, places[chunk]).to(device)
                log_p = log_softmax(self.logits(model, batch).double(), dim=-1).cpu()
                for place, row, labels in zip(chunk, log_p, batch.labels.cpu(), strict=True):
                    true, own = labels[labels != IGNORED], row[labels != IGNORED]
                    if not own.isfinite().all():
                        raise self._error(f"the model gave NaN or Inf for a sentence of {split}")
                    of_true = own.gather(1, true[:, None])[:, 0]
                    log_true[place], chances[place] = float(of_true.mean()), float(of_true.exp().mean())
                    entropies[place] = float(-(own.exp() * own).sum(-1).mean())
                    tags[place] = true.tolist(), own.argmax(-1).tolist()
        right = np.array([sum(map(int.__eq__, *pair)) for pair in tags], np.float64)
        words = np.array([len(true) for true, _ in tags], np.float64)
        counts = count(*([[self._classes[tag] for tag in pair[side]] for pair in tags] for side in (0, 1)))
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
            counts = Counts(payload["spans_right"], payload["spans_predicted"], payload["spans_true"])
            return score_of(predictions, "entity_f1", measured=f1(counts))
        right, words = payload["right"], payload["words"]
        value = right.sum() / words.sum()
        # delta method, for a ratio of means over sentences
        error = (right - value * words).std() / words.mean() / np.sqrt(len(words))
        return score_of(predictions, "token_accuracy", measured=(float(value), float(error)))

    def batches(self, split: Split, start: int, stop: int, batch_size: int) -> Iterator[Batch]:
        """See `Task.batches`; labels [N, S] hold the tags, at first sub-words."""
        order = self._order(split)[start:stop]
        for first in range(0, len(order), batch_size):
            yield self._batch(split, order[first : first + batch_size])

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Unnormalised log-probabilities [N, S, C]."""
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
        if not tokenizer.is_fast:
            raise self._error("the tokenizer does not say which word a token is of: save it with its tokenizer.json")
        return tokenizer

    @property
    def _max_length(self) -> int:
        return min(self.settings.max_length, int(self._tokenizer.model_max_length))

    @cached_property
    def _classes(self) -> Sequence[str]:
        try:
            return class_names(self.head, self.settings.labels, self.base, suffix="ForTokenClassification")
        except TaskError as error:
            raise self._error(str(error)) from error

    def _order(self, split: Split) -> npt.NDArray[np.int64]:
        """The fixed order that `limit` and `batches` count in."""
        return np.random.default_rng(0).permutation(len(self._split(split)))

    def _split(self, split: Split) -> list[_Sentence]:
        """A split's sentences, read once."""
        if split not in self._sentences:
            if split not in self.settings.data:
                raise self._error(f"`data` names no {split} split: add one")
            paths = self.settings.data[split]
            try:
                self._sentences[split] = [
                    sentence
                    for path in ([paths] if isinstance(paths, str) else paths)
                    for sentence in _read(path, self.settings, self._classes)
                ]
            except TaskError as error:
                raise self._error(f"{split}: {error}") from error
        return self._sentences[split]

    def _tokens(self, split: Split, place: int) -> tuple[list[int], list[int]]:
        """Token ids of a sentence, and its tags at first sub-words."""
        if (split, place) not in self._encoded:
            sentence = self._split(split)[place]
            encoding = self._tokenizer(
                [list(sentence.words)], is_split_into_words=True, truncation=True, max_length=self._max_length
            )
            words = encoding.word_ids(0)
            first = [word is not None and word not in words[:at] for at, word in enumerate(words)]
            labels = [sentence.tags[word] if new else IGNORED for word, new in zip(words, first, strict=True)]
            if all(label == IGNORED for label in labels):
                raise self._error(f"{split}: sentence {place + 1} has no word that the tokenizer reads: remove it")
            self._encoded[split, place] = list(encoding["input_ids"][0]), labels
        return self._encoded[split, place]

    def _batch(self, split: Split, places: npt.NDArray[np.int64]) -> Batch:
        rows = [self._tokens(split, int(place)) for place in places]
        inputs = dict(self._tokenizer.pad([{"input_ids": ids} for ids, _ in rows], return_tensors="pt"))
        mask = inputs["attention_mask"].bool()
        labels = torch.full(mask.shape, IGNORED)
        for row, real, (_, tags) in zip(labels, mask, rows, strict=True):
            row[real] = torch.tensor(tags)
        return Batch(inputs, labels, torch.from_numpy(places), mask)

    def _error(self, message: str) -> TaskError:
        return TaskError(f"task '{self.name}': {message}")


def _read(path: str, settings: TokenClassificationSettings, classes: Sequence[str]) -> list[_Sentence]:
    """A file's sentences; the first bad one is named."""
    rows = _conll(path) if path.lower().endswith(CONLL) else _table(path, settings)
    positions: dict[Any, int] = {name: place for place, name in enumerate(classes)}
    positions |= {place: place for place in range(len(classes)) if place not in positions}
    sentences = []
    for number, (words, tags) in enumerate(rows, start=1):
        if not words or len(words) != len(tags):
            raise TaskError(f"{path}, sentence {number}: {len(words)} words and {len(tags)} tags")
        if strange := [word for word in words if not is_text(word) or not word]:
            raise TaskError(f"{path}, sentence {number}: {repr(strange[0])[:100]} is no word")
        if outside := [tag for tag in tags if not _is_tag(tag) or tag not in positions]:
            raise TaskError(
                f"{path}, sentence {number}: the tag {repr(outside[0])[:100]} is none of the head's ({', '.join(classes)}); "
                "`labels` names them in the head's order"
            )
        sentences.append(_Sentence(tuple(words), tuple(positions[tag] for tag in tags)))
    if not sentences:
        raise TaskError(f"{path}: there are no sentences")
    return sentences


def _table(path: str, settings: TokenClassificationSettings) -> Iterator[tuple[list[Any], list[Any]]]:
    from merging.tasks.labelled_texts import read_table  # with pandas, which takes a second

    frame = read_table([path], [settings.words, settings.tags])
    for number, (words, tags) in enumerate(zip(frame[settings.words], frame[settings.tags], strict=True), start=1):
        for name, value in ((settings.words, words), (settings.tags, tags)):
            if isinstance(value, str | Mapping) or not hasattr(value, "__len__"):
                raise TaskError(f"{path}, row {number}: column '{name}' holds {repr(value)[:100]}: a list is needed")
        yield list(words), [tag.item() if isinstance(tag, np.generic) else tag for tag in tags]


def _is_tag(value: object) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _conll(path: str) -> Iterator[tuple[list[Any], list[Any]]]:
    try:
        text = storage.read_text(path)
    except StorageError as error:
        raise TaskError(str(error)) from error
    words: list[Any] = []
    tags: list[Any] = []
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    for number, line in enumerate([*lines, ""], start=1):
        # words may hold other blanks, even line separators, and any blank where columns are apart by tabs
        stripped = line.strip(" \t")
        columns = re.split("\t+" if "\t" in stripped else " +", stripped) if stripped else []
        if columns and columns[0] == "-DOCSTART-":
            continue
        if columns and len(columns) < 2:
            raise TaskError(f"{path}, line {number}: {line!r} has no tag: a word, blanks and a tag are needed")
        if columns:
            words.append(columns[0])
            tags.append(columns[-1])
        elif words:
            yield words, tags
            words, tags = [], []


register(TokenClassification, TokenClassificationSettings)

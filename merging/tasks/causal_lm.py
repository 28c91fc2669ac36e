"""Causal language models: judged by likelihood, by multiple choice, or by what they generate."""

import inspect
import re
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from merging.checkpoints.parameter_names import Loading
from merging.errors import TaskError
from merging.io import storage
from merging.tasks.answers import GRADES, extracted
from merging.tasks.head import blank_model, load_model, load_tokenizer, tokenizer_identity
from merging.tasks.predictions import Floats, Predictions
from merging.tasks.prompts import Encoded, encode, longest_first, render
from merging.tasks.task import Batch, Score, Split, Task, TaskSettings, register, score_of

MODEL_CLASS = "AutoModelForCausalLM"
IGNORED = -100

Likelihood: TypeAlias = Literal["log_likelihood", "neg_perplexity"]
Choice: TypeAlias = Literal["accuracy", "accuracy_norm", "accuracy_unconditional"]
Generated: TypeAlias = Literal["exact_match", "contains", "number"]
LIKELIHOODS: tuple[str, ...] = ("log_likelihood", "neg_perplexity")
CHOICES: tuple[str, ...] = ("accuracy", "accuracy_norm", "accuracy_unconditional")


class CausalLMSettings(TaskSettings):
    """Language modelling: the likelihood of completions or texts, multiple choice, or generation.

    Columns `prompt` and `completion`; or `text` alone, all of whose tokens are predicted; or `choices` (a list of completions)
    with `label` (the right one, as its position or as its text). Statistics may be computed on prompts alone
    (`completion: null`): each member completes them itself, greedily.
    """

    kind: Literal["causal_lm"] = Field("causal_lm", description="causal_lm: a causal language model.")
    data: dict[Split, str | Annotated[list[str], Field(min_length=1)]] = Field(
        min_length=1, description="Split (train, validation, test) → file or list of files: Parquet, CSV or JSON lines."
    )
    prompt: str | None = Field(
        "prompt", description="Column of the prompt; not used where `text` or `template` is given."
    )
    completion: str | None = Field(
        "completion",
        description="Column of the completion, the only part that is scored; null: members complete prompts.",
    )
    text: str | None = Field(None, description="Column of a plain text, all of which is scored.")
    template: str | None = Field(None, description="Jinja template of the prompt over an example's columns.")
    choices: str | None = Field(None, description="Column of a list of completions to choose from.")
    label: str = Field("label", description="Column of the right choice: its position, or its text.")
    chat: bool = Field(False, description="Put the checkpoint's chat template around prompt and completion.")
    delimiter: str = Field(" ", description="Put between prompt and completion where neither has a blank there.")
    end: bool = Field(False, description="Whether the end-of-text token belongs to completions.")
    metric: Likelihood | Choice | Generated | None = Field(
        None,
        description="log_likelihood (mean over examples, nats per token), neg_perplexity; with `choices`: accuracy, "
        "accuracy_norm (by length in bytes), accuracy_unconditional (less the likelihood without prompt); of greedy "
        "generation: exact_match, contains, number. Default: accuracy with `choices`, else log_likelihood.",
    )
    extract: str | None = Field(
        None, description="Regular expression; its last match (first group) in what is generated is what counts."
    )
    max_new_tokens: int = Field(64, ge=1, description="Tokens that are generated at most.")
    max_length: int = Field(
        1024, ge=2, description="Tokens of prompt and completion; what is longer loses its beginning."
    )
    batch_size: int = Field(16, ge=1, description="Sequences a step of evaluation.")

    @field_validator("extract")
    @classmethod
    def _is_pattern(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"no regular expression: {error}") from error
        return pattern

    @model_validator(mode="after")
    def _columns_and_metric(self) -> "CausalLMSettings":
        if self.text is not None and (self.template is not None or self.choices is not None or self.chat):
            raise ValueError("`text` is all of an example: it goes with neither `template`, `choices` nor `chat`")
        if self.text is None and self.template is None and self.prompt is None:
            raise ValueError("name `text`, `prompt` or `template`")
        if (self.choices is not None) != (self.judged_by in CHOICES):
            raise ValueError(
                f"`metric: {self.judged_by}` {'needs' if self.choices is None else 'does not go with'} `choices`"
            )
        if self.text is not None and self.judged_by not in LIKELIHOODS:
            raise ValueError(f"`text` has no reference to judge by: `metric` is {' or '.join(LIKELIHOODS)}")
        if self.is_unanswered and set(self.data) != {"train"}:
            raise ValueError(
                "`completion: null` is for statistics on a train split: nothing is judged without completions"
            )
        if self.extract is not None and self.judged_by not in GRADES:
            raise ValueError(f"`extract` goes with {', '.join(GRADES)}")
        return self

    @property
    def is_unanswered(self) -> bool:
        """Whether there are prompts alone."""
        return self.text is None and self.choices is None and self.completion is None

    @property
    def judged_by(self) -> str:
        """The metric's name."""
        return self.metric or ("accuracy" if self.choices is not None else "log_likelihood")


@dataclass(frozen=True)
class _Example:
    """An example: its prompt, its completions, and which of them is right."""

    prompt: str
    completions: tuple[str, ...]
    right: int = 0


class CausalLM(Task):
    """A language modelling task; see `Task`."""

    kind: ClassVar[str] = "causal_lm"
    has_predictions: ClassVar[bool] = True

    def __init__(self, name: str, settings: CausalLMSettings, head: str) -> None:
        super().__init__(name, settings, head)
        self.settings: CausalLMSettings = settings
        self._examples: dict[Split, list[_Example]] = {}

    @property
    def is_below_zero(self) -> bool:
        """Of log-likelihoods and negative perplexities; see `Task.is_below_zero`."""
        return self.settings.judged_by in LIKELIHOODS

    def check(self) -> list[str]:
        """Reads all splits, encodes every example, and looks at the head; see `Task.check`."""
        self.blank_model()
        notes = []
        for split in self.settings.data:
            for row, example in enumerate(self._split(split), start=1):
                for number in range(len(example.completions)):
                    try:
                        self._encoded(example, number)
                    except TaskError as error:
                        raise self._error(f"{split}, row {row}: {error}") from error
        for split, lack in (
            ("train", "no statistics can be computed for it"),
            ("test", "its winner is known on validation"),
        ):
            if split not in self.settings.data:
                notes.append(f"task '{self.name}' has no {split} split: {lack}")
        return notes

    def load_model(self) -> nn.Module:
        """The head's checkpoint as `AutoModelForCausalLM`; see `Task.load_model`."""
        return self.load_skeleton(())

    def load_skeleton(self, merged: Collection[str]) -> nn.Module:
        """See `Task.load_skeleton`."""
        model: Any = load_model(self.head, MODEL_CLASS, base=self.base, hollow=merged)
        model.config.use_cache = False
        return model  # type: ignore[no-any-return]

    def blank_model(self) -> tuple[nn.Module, Loading]:
        """See `Task.blank_model`."""
        return blank_model(self.head, MODEL_CLASS, self.base)

    def size(self, split: Split) -> int:
        """See `Task.size`."""
        return len(self._split(split)) if split in self.settings.data else 0

    def data_fingerprint(self, split: Split) -> str:
        """Content hash of the examples, of how they are encoded and judged, and of the tokenizer."""
        examples = [[example.prompt, example.completions, example.right] for example in self._split(split)]
        settings = self.settings.model_dump(mode="json", exclude={"data", "batch_size"})
        return storage.fingerprint([examples, settings, tokenizer_identity(self._tokenizer)])

    def predict(
        self, model: nn.Module, split: Split, positions: npt.NDArray[np.int64], *, precision: str = "float32"
    ) -> Predictions:
        """See `Task.predict`."""
        started = time.perf_counter()
        examples = [self._split(split)[place] for place in self._order(split)[positions]]
        device = next(model.parameters()).device
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            if self.settings.choices is not None:
                predictions = self._chosen(model, examples)
            elif self.settings.judged_by in GRADES:
                predictions = self._graded(model, examples)
            else:
                predictions = self._likelihoods(model, examples)
        if not np.isfinite(predictions.losses).all():  # type: ignore[arg-type]
            raise self._error(f"the model gave NaN or Inf for some of {len(examples)} {split} examples")
        return Predictions(**(vars(predictions) | {"seconds": time.perf_counter() - started}))

    def score(self, predictions: Predictions) -> Score:
        """See `Task.score`."""
        metric = self.settings.judged_by
        if metric != "neg_perplexity":
            return score_of(predictions, metric)
        sums, counts = (np.asarray(predictions.payload[name], np.float64) for name in ("sums", "tokens"))
        mean = -sums.sum() / counts.sum()
        # delta method, for a ratio of means over examples
        spread = (-sums - mean * counts).std() / counts.mean() / np.sqrt(len(counts))
        return score_of(predictions, metric, measured=(-float(np.exp(mean)), float(np.exp(mean) * spread)))

    def batches(self, split: Split, start: int, stop: int, batch_size: int) -> Iterator[Batch]:
        """Prompts with their right completions, whose tokens are the labels; see `Task.batches`."""
        order = self._order(split)[start:stop]
        for first in range(0, len(order), batch_size):
            places = order[first : first + batch_size]
            examples = self._answered(split, places)
            yield self._batch([self._encoded(example, example.right) for example in examples], places)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits of the label positions alone [N, K, V]: what is before them is not multiplied with the vocabulary."""
        keep = batch.labels.shape[1]
        arguments = _arguments(model)
        inputs = dict(batch.inputs)
        if "position_ids" in arguments:
            inputs["position_ids"] = (batch.inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        if "logits_to_keep" in arguments:
            inputs["logits_to_keep"] = keep  # type: ignore[assignment]
        logits: Tensor = model(**inputs).logits
        return logits[:, -keep:]

    def representation(self, model: nn.Module, batch: Batch) -> Tensor:
        """The backbone's last hidden states [N, S, D]."""
        backbone: Any = model.base_model
        inputs = dict(batch.inputs)
        if "position_ids" in _arguments(backbone):
            inputs["position_ids"] = (batch.inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        states: Tensor = backbone(**inputs).last_hidden_state
        return states

    def _likelihoods(self, model: nn.Module, examples: Sequence[_Example]) -> Predictions:
        """Of each example's completion: mean log-likelihood per token."""
        sums, tokens, entropies = self._scored(model, [self._encoded(example, 0) for example in examples])
        means = sums / tokens
        return Predictions(means, np.exp(means), -means, entropies, {"sums": sums, "tokens": tokens})

    def _chosen(self, model: nn.Module, examples: Sequence[_Example]) -> Predictions:
        """Of each example's choices: whether the right one is likeliest, and the softmax over their likelihoods."""
        encoded = [self._encoded(example, n) for example in examples for n in range(len(example.completions))]
        sums, _, _ = self._scored(model, encoded)
        if self.settings.judged_by == "accuracy_norm":
            sums = sums / np.array([max(1, sequence.length) for sequence in encoded])
        elif self.settings.judged_by == "accuracy_unconditional":
            alone = [
                self._encoded(_Example("", example.completions), n)
                for example in examples
                for n in range(len(example.completions))
            ]
            sums = sums - self._scored(model, alone)[0]
        values, chances, entropies, first = [], [], [], 0
        for example in examples:
            logits = sums[first : first + len(example.completions)]
            first += len(example.completions)
            chance = np.exp(logits - logits.max())
            chance /= chance.sum()
            values.append(float(logits.argmax() == example.right))
            chances.append(chance[example.right])
            entropies.append(-(chance * np.log(np.maximum(chance, np.finfo(float).tiny))).sum())
        right = np.array(chances)
        return Predictions(np.array(values), right, -np.log(np.maximum(right, 1e-300)), np.array(entropies))

    def _graded(self, model: Any, examples: Sequence[_Example]) -> Predictions:
        """What is generated, graded; the surrogate is the reference's mean probability per token."""
        grade, settings = GRADES[self.settings.judged_by], self.settings
        pattern = None if settings.extract is None else re.compile(settings.extract)
        sums, tokens, entropies = self._scored(model, [self._encoded(example, 0) for example in examples])
        values = np.zeros(len(examples))
        for place, text in self._generate(model, examples):
            answer = text if pattern is None else extracted(pattern, text)
            values[place] = grade(answer, examples[place].completions[0])
        return Predictions(values, np.exp(sums / tokens), -sums / tokens, entropies)

    def _generate(self, model: Any, examples: Sequence[_Example]) -> Iterator[tuple[int, str]]:
        """Greedy completions of the examples' prompts, each with its example's place."""
        device = next(model.parameters()).device
        prompts = []
        for example in examples:
            encoded = self._encoded(_Example(example.prompt, example.completions or (".",)), 0)
            prompts.append(encoded.ids[: encoded.start])
        for places in longest_first([len(ids) for ids in prompts], self.settings.batch_size):
            ids, mask = _padded([prompts[place] for place in places], self._tokenizer.pad_token_id)
            with torch.inference_mode():
                answer = model.generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    max_new_tokens=self.settings.max_new_tokens,
                    do_sample=False,
                    num_beams=1,
                    use_cache=True,
                    pad_token_id=self._tokenizer.pad_token_id,
                )
            texts = self._tokenizer.batch_decode(answer[:, ids.shape[1] :], skip_special_tokens=True)
            yield from zip(places, texts, strict=True)

    def _answered(self, split: Split, places: npt.NDArray[np.int64]) -> list[_Example]:
        """Examples with their completions; those that have none are completed by the head's own checkpoint, once."""
        examples = self._split(split)
        open_ones = [int(place) for place in places if not examples[place].completions]
        if open_ones:
            completed = self._generate(self._own_model, [examples[place] for place in open_ones])
            for number, text in completed:
                place = open_ones[number]
                examples[place] = _Example(examples[place].prompt, (text or self._tokenizer.eos_token,))
        return [examples[place] for place in places]

    @cached_property
    def _own_model(self) -> nn.Module:
        return self.load_model()

    def _scored(self, model: nn.Module, encoded: Sequence[Encoded]) -> tuple[Floats, Floats, Floats]:
        """Of each sequence's completion: summed log-likelihood, number of tokens, mean entropy per token; float64 [M]."""
        device = next(model.parameters()).device
        sums, tokens, entropies = (np.zeros(len(encoded)) for _ in range(3))
        for places in longest_first([len(sequence.ids) for sequence in encoded], self.settings.batch_size):
            batch = self._batch([encoded[place] for place in places], np.array(places)).to(device)
            for place, logits, labels in zip(places, self.logits(model, batch), batch.labels, strict=True):
                targets = labels != IGNORED
                log_p = log_softmax(logits[targets].float(), dim=-1)
                sums[place] = log_p.gather(1, labels[targets, None]).double().sum()
                tokens[place] = targets.sum()
                entropies[place] = -(log_p.exp() * log_p).sum(-1).nan_to_num().double().mean()
        return sums, tokens, entropies

    def _batch(self, encoded: Sequence[Encoded], places: npt.NDArray[np.int64]) -> Batch:
        """Sequences without their last token, padded on the left, so that all completions end side by side."""
        ids, mask = _padded([sequence.ids[:-1] for sequence in encoded], self._tokenizer.pad_token_id)
        keep = max(sequence.targets for sequence in encoded)
        labels = torch.full((len(encoded), keep), IGNORED)
        for row, sequence in zip(labels, encoded, strict=True):
            row[keep - sequence.targets :] = torch.tensor(sequence.ids[sequence.start :])
        return Batch({"input_ids": ids, "attention_mask": mask}, labels, torch.from_numpy(places), mask.bool())

    def _encoded(self, example: _Example, number: int) -> Encoded:
        """An example with one of its completions as token ids."""
        settings = self.settings
        return encode(
            self._tokenizer,
            example.prompt,
            example.completions[number],
            settings.max_length,
            delimiter=settings.delimiter,
            chat=settings.chat and bool(example.prompt),
            ends=settings.end,
        )

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizer = load_tokenizer(self.head, self.base)
        if tokenizer.pad_token_id is None:
            raise self._error("the tokenizer has neither a padding nor an end-of-text token: give it one")
        return tokenizer

    def _order(self, split: Split) -> npt.NDArray[np.int64]:
        """The fixed order that `limit` and `batches` count in."""
        return np.random.default_rng(0).permutation(len(self._split(split)))

    def _split(self, split: Split) -> list[_Example]:
        """A split's examples, read once."""
        if split not in self._examples:
            if split not in self.settings.data:
                raise self._error(f"`data` names no {split} split: add one")
            paths = self.settings.data[split]
            try:
                self._examples[split] = _read([paths] if isinstance(paths, str) else paths, self.settings)
            except TaskError as error:
                raise self._error(f"{split}: {error}") from error
        return self._examples[split]

    def _error(self, message: str) -> TaskError:
        return TaskError(f"task '{self.name}': {message}")


def _read(paths: Sequence[str], settings: CausalLMSettings) -> list[_Example]:
    """Examples from files; the first bad row is named."""
    from merging.tasks.labelled_texts import read_table, text_problems  # with pandas, which takes a second

    texts = [settings.text] if settings.text is not None else []
    if settings.text is None and settings.choices is None and settings.completion is not None:
        texts.append(settings.completion)
    if settings.text is None and settings.template is None and settings.prompt is not None:
        texts.append(settings.prompt)
    columns = [*texts, *([settings.choices, settings.label] if settings.choices is not None else [])]
    named = _template_columns(settings.template)
    frame = read_table(paths, list(dict.fromkeys([*columns, *named])), texts)
    if problems := [problem for column in texts for problem in text_problems(frame[column], column)]:
        raise TaskError(f"{', '.join(paths)}: {'; '.join(problems)}")
    examples = []
    for number, row in enumerate(frame.to_dict("records"), start=1):
        try:
            examples.append(_example({str(key): value for key, value in row.items()}, settings))
        except TaskError as error:
            raise TaskError(f"{', '.join(paths)}, row {number}: {error}") from error
    return examples


def _example(row: Mapping[str, Any], settings: CausalLMSettings) -> _Example:
    if settings.text is not None:
        return _Example("", (row[settings.text],))
    prompt = render(settings.template, row) if settings.template is not None else row[settings.prompt or ""]
    if settings.choices is None:
        return _Example(prompt, () if settings.completion is None else (row[settings.completion],))
    choices = row[settings.choices]
    if isinstance(choices, str) or not hasattr(choices, "__len__") or len(choices) < 2:
        raise TaskError(f"column '{settings.choices}' holds {choices!r}: a list of at least two texts is needed")
    options = tuple(str(choice) for choice in choices)
    label = row[settings.label]
    if isinstance(label, str):
        if label not in options:
            raise TaskError(f"column '{settings.label}' holds {label!r}, which is none of the choices")
        return _Example(prompt, options, options.index(label))
    if isinstance(label, bool) or label != label or int(label) != label or not 0 <= label < len(options):
        raise TaskError(f"column '{settings.label}' holds {label!r}: a position from 0 to {len(options) - 1} is needed")
    return _Example(prompt, options, int(label))


def _template_columns(template: str | None) -> list[str]:
    """The columns that a template names.

    Raises:
        TaskError: It is no Jinja template.
    """
    if template is None:
        return []
    from jinja2 import Environment, TemplateError, meta

    try:
        return sorted(meta.find_undeclared_variables(Environment(autoescape=False).parse(template)))
    except TemplateError as error:
        raise TaskError(f"`template`: {error}") from error


def _padded(rows: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Token ids and their mask [N, S], padded on the left."""
    width = max(len(row) for row in rows)
    ids, mask = torch.full((len(rows), width), padding), torch.zeros(len(rows), width, dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, width - len(row) :] = torch.tensor(row)
        mask[place, width - len(row) :] = 1
    return ids, mask


def _arguments(model: nn.Module) -> Collection[str]:
    """Names of a model's arguments."""
    return inspect.signature(model.forward).parameters


register(CausalLM, CausalLMSettings)

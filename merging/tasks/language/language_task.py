"""Completions of prompts, whatever kind of language model gives them: their likelihood, a choice among them, generation."""

import inspect
import time
from abc import abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from merging.errors import TaskError
from merging.io import hashing
from merging.tasks.file_task import TextTask, longest_first
from merging.tasks.head import generation_config, tokenizer_identity
from merging.tasks.language.answers import GRADES, Grade, corpus_score, extracted
from merging.tasks.language.examples import Example, read_examples
from merging.tasks.language.language_settings import LIKELIHOODS
from merging.tasks.language.text_engine import TextEngine
from merging.tasks.metrics.metric import influences
from merging.tasks.predictions import Floats, Predictions
from merging.tasks.task import IGNORED, Batch, Score, Split, score_of
from merging.tasks.user_functions import code_of, load_function


class Encoding(Protocol):
    """A prompt and one completion as the model reads them."""

    @property
    def size(self) -> int:
        """Tokens in all."""
        ...

    @property
    def is_cut(self) -> bool:
        """Whether the example has more tokens."""
        ...


class LanguageTask(TextTask[list[Example]]):
    """A task on prompts and completions; see `Task`."""

    one_label: ClassVar[bool] = False
    is_generative: ClassVar[bool] = True

    @abstractmethod
    def encoded(self, example: Example, number: int) -> Any:
        """An example with one of its completions as token ids: an `Encoding`.

        Raises:
            TaskError: The completion has no token, or is too long.
        """

    @property
    @abstractmethod
    def prompt_length(self) -> int:
        """Tokens of a prompt, at most, that leave the model room for a completion.

        Raises:
            TaskError: There is no room for `max_new_tokens`.
        """

    @abstractmethod
    def prompt_ids(self, example: Example) -> tuple[Sequence[int], bool]:
        """What a completion of an example's prompt is generated from, and whether the prompt was cut to `prompt_length`.

        Raises:
            TaskError: There is nothing to begin with.
        """

    @abstractmethod
    def joined(self, encoded: Sequence[Any], places: npt.NDArray[np.int64]) -> Batch:
        """Encodings side by side, the tokens of completions as labels [N, K]."""

    @abstractmethod
    def pad_prompts(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and mask [N, S] to generate from."""

    def check(self) -> list[str]:
        """Reads all splits, encodes every example, and looks at the head; see `Task.check`."""
        self.blank_model()
        _ = self.grade
        if self.settings.generates or self.settings.is_unanswered:
            _ = self.prompt_length
        cut: list[str] = []
        for split in self.settings.data:
            for example in self.split(split):
                try:
                    encoded = [self.encoded(example, number) for number in range(len(example.completions))]
                    long = any(one.is_cut for one in encoded)
                    if self.settings.judged_by == "accuracy_unconditional":
                        self.encoded(Example("", example.completions), 0)
                    if self.settings.generates or self.settings.is_unanswered:
                        long |= self.prompt_ids(example)[1]
                except TaskError as error:
                    raise self.error(f"{split}: {example.name}: {error}") from error
                cut += [example.name] if long else []
        if self.settings.judged_by in ("chrf", "bleu"):
            corpus_score(self.settings.judged_by, ["a"], ["a"])  # for the library
        notes = [
            f"task '{self.name}': {len(cut)} examples are cut to the {self.max_length} tokens that are read (first: {cut[0]})"
            for _ in cut[:1]
        ]
        return notes + self.missing_splits()

    def load_skeleton(self, merged: Collection[str], dtype: torch.dtype = torch.float32) -> nn.Module:
        """See `Task.load_skeleton`."""
        model = super().load_skeleton(merged, dtype)
        config: Any = model.config
        config.use_cache = False
        return model

    @property
    def has_ensembles(self) -> bool:
        """Unless it is judged by what is generated; see `Task.has_ensembles`."""
        return not self.settings.generates

    @property
    def generates(self) -> bool:
        """Whether the metric is of what is generated."""
        return bool(self.settings.generates)

    @property
    def longest(self) -> int:
        """Tokens of a sequence that a model reads or completes, at most."""
        completed = self.prompt_length + self.settings.max_new_tokens if self.generates else 0
        return max(self.max_length, completed)

    @cached_property
    def generation_config(self) -> Any:
        """The head's `GenerationConfig` of transformers: what ends a completion. Beams are not used; see `_generate`."""
        generation = generation_config(self.head, self.base, self.blank_model()[0])
        generation.num_beams = 1
        return generation

    @property
    def is_below_zero(self) -> bool:
        """Of log-likelihoods and negative perplexities; see `Task.is_below_zero`."""
        return self.settings.judged_by in LIKELIHOODS

    @property
    def can_be_negative(self) -> bool:
        """See `Task.can_be_negative`."""
        return self.is_below_zero or self.settings.function is not None

    @cached_property
    def grade(self) -> Grade | None:
        """What grades single completions; None where all are graded together, or nothing is generated.

        Raises:
            TaskError: There is no such function, or it does not take what is generated and the completion.
        """
        name = self.settings.function
        if name is None:
            return GRADES.get(self.settings.judged_by)
        try:
            function = load_function(name, self.settings._directory)
        except TaskError as error:
            raise self.error(f"metric: {error}") from error
        try:
            inspect.signature(function).bind("", "")
        except (TypeError, ValueError) as error:
            raise self.error(f"metric: {name} cannot be called as function(generated, completion): {error}") from error
        return function

    def data_fingerprint(self, split: Split) -> str:
        """Content hash of the examples, of how they are encoded and judged, and of the tokenizer with its chat template."""
        examples = [[example.prompt, example.completions, example.right] for example in self.split(split)]
        settings = self.settings.model_dump(mode="json", exclude={"data", "batch_size", "role"})
        own = [] if self.settings.function is None or self.grade is None else [code_of(self.grade)]
        template = [self.tokenizer.chat_template] if settings.get("chat") else []
        return hashing.fingerprint([examples, settings, tokenizer_identity(self.tokenizer), *own, *template])

    def score_fingerprint(self, split: Split) -> str | None:
        """None where the user's own function grades; else also of what ends a completion; see `Task.score_fingerprint`."""
        own = super().score_fingerprint(split)
        if own is None or self.settings.function is not None:
            return None
        return hashing.fingerprint([own, self.generation_config.to_dict()]) if self.generates else own

    def predict(
        self,
        model: nn.Module | TextEngine,
        split: Split,
        positions: npt.NDArray[np.int64],
        *,
        precision: str = "float32",
    ) -> Predictions:
        """See `Task.predict`."""
        started = time.perf_counter()
        examples = [self.split(split)[place] for place in self.order(split)[positions]]
        kind = "cpu" if isinstance(model, TextEngine) else next(model.parameters()).device.type
        with torch.inference_mode(), torch.autocast(kind, torch.bfloat16, enabled=precision == "bfloat16"):
            if self.settings.choices is not None:
                predictions = self._chosen(model, examples)
            elif self.settings.generates:
                predictions = self._graded(model, examples)
            else:
                predictions = self._likelihoods(model, examples)
        if predictions.losses is None or not np.isfinite(predictions.losses).all():
            raise self.error(f"the model gave NaN or Inf for some of {len(examples)} {split} examples")
        return Predictions(**(vars(predictions) | {"seconds": time.perf_counter() - started}))

    def score(self, predictions: Predictions) -> Score:
        """See `Task.score`."""
        metric = self.settings.judged_by
        if metric == "neg_perplexity":
            sums, counts = (np.asarray(predictions.payload[name], np.float64) for name in ("sums", "tokens"))
            mean = -sums.sum() / counts.sum()
            # delta method, for a ratio of means over examples
            spread = (-sums - mean * counts).std() / counts.mean() / np.sqrt(len(counts))
            return score_of(predictions, metric, measured=(-float(np.exp(mean)), float(np.exp(mean) * spread)))
        if metric in ("chrf", "bleu"):
            texts = [[str(text) for text in predictions.payload[name]] for name in ("generated", "references")]
            return score_of(predictions, metric, measured=corpus_score(metric, *texts))
        return score_of(predictions, metric)

    def influences(self, predictions: Predictions) -> Floats | None:
        """See `Task.influences`; None of metrics of all texts together."""
        if self.settings.judged_by in ("chrf", "bleu"):
            return None
        if self.settings.judged_by != "neg_perplexity":
            return predictions.values
        counts = np.stack([np.asarray(predictions.payload[name], np.float64) for name in ("sums", "tokens")], axis=1)
        return influences(lambda sums: -np.exp(-sums[:, 0] / sums[:, 1]), counts)

    def read(self, paths: Sequence[str]) -> list[Example]:
        """See `FileTask.read`."""
        return read_examples(paths, self.settings)

    def make_batch(self, split: Split, places: npt.NDArray[np.int64]) -> Batch:
        """Prompts with their right completions, whose tokens are the labels; see `FileTask.make_batch`."""
        examples = self._answered(split, places)
        return self.joined([self.encoded(example, example.right) for example in examples], places)

    @cached_property
    def tokenizer(self) -> Any:
        """The head's tokenizer, which can pad; see `TextTask.tokenizer`."""
        tokenizer = super().tokenizer
        if tokenizer.pad_token_id is None:
            raise self.error("the tokenizer has neither a padding nor an end-of-text token: give it one")
        return tokenizer

    def _likelihoods(self, model: nn.Module | TextEngine, examples: Sequence[Example]) -> Predictions:
        """Of each example's completion: mean log-likelihood per token."""
        sums, tokens, entropies = self._scored(model, [self.encoded(example, 0) for example in examples])
        means = sums / tokens
        return Predictions(means, np.exp(means), -means, entropies, {"sums": sums, "tokens": tokens})

    def _chosen(self, model: nn.Module | TextEngine, examples: Sequence[Example]) -> Predictions:
        """Of each example's choices: whether the right one is likeliest, and the softmax over their likelihoods."""
        pairs = [(example, number) for example in examples for number in range(len(example.completions))]
        sums = self.choice_sums(model, examples)
        if self.settings.judged_by == "accuracy_norm":
            sums = sums / [max(1, len(example.completions[number].strip().encode())) for example, number in pairs]
        elif self.settings.judged_by == "accuracy_unconditional":
            sums = sums - self.choice_sums(model, [Example("", example.completions) for example in examples])
        ends = np.cumsum([len(example.completions) for example in examples])
        values, right, entropies = np.zeros((3, len(examples)))
        for place, (example, logits) in enumerate(zip(examples, np.split(sums, ends[:-1]), strict=True)):
            chances = np.exp(logits - logits.max())
            chances /= chances.sum()
            values[place] = logits.argmax() == example.right
            right[place] = chances[example.right]
            entropies[place] = -(chances * np.log(np.maximum(chances, np.finfo(float).tiny))).sum()
        return Predictions(values, right, -np.log(np.maximum(right, np.finfo(float).tiny)), entropies)

    def _graded(self, model: nn.Module | TextEngine, examples: Sequence[Example]) -> Predictions:
        """What is generated, graded; the surrogate is the reference's mean probability per token."""
        pattern = self.settings.extract
        sums, tokens, entropies = self._scored(model, [self.encoded(example, 0) for example in examples])
        generated = [""] * len(examples)
        for place, text in self._generate(model, examples):
            generated[place] = text if pattern is None else extracted(pattern, text)
        references = [example.completions[0] for example in examples]
        surrogates = np.exp(sums / tokens)
        if self.grade is None:
            texts = {"generated": np.array(generated, object), "references": np.array(references, object)}
            return Predictions(surrogates, surrogates, -sums / tokens, entropies, texts)
        values = np.array([self._grade(*each) for each in zip(generated, references, examples, strict=True)])
        return Predictions(values, surrogates, -sums / tokens, entropies)

    def _grade(self, generated: str, reference: str, example: Example) -> float:
        """What a completion is worth.

        Raises:
            TaskError: The user's function fails on it, or gives no finite number.
        """
        grade = self.grade
        assert grade is not None
        try:
            value = float(grade(generated, reference))
        except Exception as error:  # the user's code may raise anything
            raise self.error(
                f"{self.settings.judged_by} failed on {example.name}: {type(error).__name__}: {str(error)[:300]}"
            ) from error
        if not np.isfinite(value):
            raise self.error(f"{self.settings.judged_by} gave {value} on {example.name}: a finite number is needed")
        return value

    def _generate(self, model: Any, examples: Sequence[Example]) -> Iterator[tuple[int, str]]:
        """Greedy completions of the examples' prompts, each with its example's place."""
        prompts = [self.prompt_ids(example)[0] for example in examples]
        if isinstance(model, TextEngine):
            new = model.complete(prompts, self.settings.max_new_tokens, self.generation_config)
            yield from enumerate(self.tokenizer.batch_decode(new, skip_special_tokens=True))
            return
        device = next(model.parameters()).device
        for places in longest_first([len(ids) for ids in prompts], self.settings.batch_size):
            ids, mask = self.pad_prompts([prompts[place] for place in places])
            with torch.inference_mode():
                answer = model.generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    max_new_tokens=self.settings.max_new_tokens,
                    do_sample=False,
                    num_beams=1,
                    use_cache=True,
                    pad_token_id=self.tokenizer.pad_token_id,
                )
            new = answer if model.config.is_encoder_decoder else answer[:, ids.shape[1] :]
            yield from zip(places, self.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True)

    def choice_sums(self, model: nn.Module | TextEngine, examples: Sequence[Example]) -> Floats:
        """Summed log-likelihood of all choices' tokens, example after example; float64 [all choices]."""
        pairs = [(example, number) for example in examples for number in range(len(example.completions))]
        return self._scored(model, [self.encoded(example, number) for example, number in pairs])[0]

    def _answered(self, split: Split, places: npt.NDArray[np.int64]) -> list[Example]:
        """Examples with their completions; those that have none are completed by the head's own checkpoint, once."""
        examples = self.split(split)
        unanswered = [int(place) for place in places if not examples[place].completions]
        if unanswered:
            for number, text in self._generate(self._own_model, [examples[place] for place in unanswered]):
                place = unanswered[number]
                examples[place] = replace(examples[place], completions=(text or self.tokenizer.eos_token,))
        return [examples[place] for place in places]

    @cached_property
    def _own_model(self) -> nn.Module:
        return self.load_model()

    def _scored(self, model: nn.Module | TextEngine, encoded: Sequence[Any]) -> tuple[Floats, Floats, Floats | None]:
        """Of each sequence's completion: summed log-likelihood, number of tokens, mean entropy per token; float64 [M].

        An engine gives no entropies.
        """
        if isinstance(model, TextEngine):
            likelihoods = model.log_likelihoods([one.ids for one in encoded])
            own = [likelihood[one.start - 1 :] for likelihood, one in zip(likelihoods, encoded, strict=True)]
            return np.array([part.sum() for part in own]), np.array([len(part) for part in own], np.float64), None
        device = next(model.parameters()).device
        sums, tokens, entropies = np.zeros((3, len(encoded)))
        for places in longest_first([encoding.size for encoding in encoded], self.settings.batch_size):
            batch = self.joined([encoded[place] for place in places], np.array(places)).to(device)
            for place, logits, labels in zip(places, self.logits(model, batch), batch.labels, strict=True):
                targets = labels != IGNORED
                log_p = log_softmax(logits[targets].float(), dim=-1)
                sums[place] = log_p.gather(1, labels[targets, None]).double().sum()
                tokens[place] = targets.sum()
                entropies[place] = -(log_p.exp() * log_p).sum(-1).nan_to_num().double().mean()
        return sums, tokens, entropies

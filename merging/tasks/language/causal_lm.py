"""Causal language models: judged by likelihood, by multiple choice, or by what they generate."""

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from merging.tasks.head import learnt_positions
from merging.tasks.language.examples import Example
from merging.tasks.language.language_settings import LIKELIHOODS, LanguageSettings
from merging.tasks.language.language_task import LanguageTask
from merging.tasks.language.prompts import Encoded, encode, encode_prompt
from merging.tasks.language.shared_prompts import CACHES, choice_likelihoods, have_one_prompt
from merging.tasks.language.text_engine import EngineNeeds, TextEngine
from merging.tasks.language.token_padding import padded
from merging.tasks.predictions import Floats
from merging.tasks.task import IGNORED, Batch, register

COMPARED = 4
"""Examples whose choices are scored both ways, before prompts are shared."""
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}
"""Between the two, relative and in nats: they round differently."""


class CausalLMSettings(LanguageSettings):
    """Language modelling: the likelihood of completions or texts, multiple choice, or generation.

    Columns `prompt` and `completion`; or `text` alone, all of whose tokens are predicted; or `choices` (a list of completions)
    with `label` (the right one, as its position or as its text). Statistics may be computed on prompts alone
    (`completion: null`): each member completes them itself, greedily.
    """

    kind: Literal["causal_lm"] = Field("causal_lm", description="causal_lm: a causal language model.")
    text: str | None = Field(None, description="Column of a plain text, all of which is scored; instead of prompts.")
    chat: bool = Field(False, description="Put the checkpoint's chat template around prompt and completion.")
    delimiter: str = Field(" ", description="Put between prompt and completion where neither has a blank there.")
    end: bool = Field(False, description="Whether the end-of-text token belongs to completions.")

    @model_validator(mode="after")
    def _text_alone(self) -> "CausalLMSettings":
        if self.text is not None and (self.template is not None or self.choices is not None or self.chat):
            raise ValueError("`text` is all of an example: it goes with neither `template`, `choices` nor `chat`")
        if self.text is not None and self.judged_by not in LIKELIHOODS:
            raise ValueError(f"`text` has no reference to judge by: `metric` is {' or '.join(LIKELIHOODS)}")
        return self

    @property
    def whole_text(self) -> str | None:
        """See `LanguageSettings.whole_text`."""
        return self.text


class CausalLM(LanguageTask):
    """A language modelling task; see `Task`."""

    kind: ClassVar[str] = "causal_lm"
    model_class: ClassVar[str] = "AutoModelForCausalLM"
    settings: CausalLMSettings

    def __init__(self, name: str, settings: CausalLMSettings, head: str) -> None:
        super().__init__(name, settings, head)
        self._shared: dict[str, bool] = {}

    def engine_needs(self) -> EngineNeeds:
        """What an engine must be able to do for this task."""
        return EngineNeeds(self.longest, [self.generation_config] if self.generates else [])

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits of the label positions alone [N, K, V]: what is before them is not multiplied with the vocabulary."""
        keep = batch.labels.shape[1]
        logits: Tensor = _forward(model, batch.inputs, keep).logits
        return logits[:, -keep:]

    def with_all_targets(self, batch: Batch) -> Batch:
        """Every token that follows another is a target; see `Task.with_all_targets`."""
        ids, real = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
        labels = torch.cat([ids[:, 1:], batch.labels[:, -1:]], dim=1)
        return replace(batch, labels=torch.where(real, labels, IGNORED))

    def representation(self, model: nn.Module, batch: Batch) -> Tensor:
        """The backbone's last hidden states [N, S, D]."""
        backbone: Any = model.base_model
        states: Tensor = backbone(**_placed(backbone, batch.inputs)).last_hidden_state
        return states

    def choice_sums(self, model: nn.Module | TextEngine, examples: Sequence[Example]) -> Floats:
        """See `LanguageTask.choice_sums`: each prompt is read once, where that gives what choice by choice gives."""
        if isinstance(model, TextEngine):
            return super().choice_sums(model, examples)
        choices = [[self.encoded(one, number) for number in range(len(one.completions))] for one in examples]
        kinds = [_lengths(group) if have_one_prompt(group) else None for group in choices]
        sums = [np.empty(0)] * len(examples)
        for kind in set(kinds):
            places = [place for place, other in enumerate(kinds) if other == kind]
            parts = self._sums(model, [choices[place] for place in places], kind)
            for place, part in zip(places, parts, strict=True):
                sums[place] = part
        return np.concatenate(sums)

    def _sums(self, model: nn.Module, groups: Sequence[Sequence[Encoded]], kind: str | None) -> list[Floats]:
        """Likelihoods of some examples' choices, all of one kind, example by example.

        Args:
            model: The model.
            groups: Each example's choices.
            kind: What `_lengths` calls them; None where they share no prompt.
        """
        if kind is not None and kind not in self._shared:
            few = groups[:COMPARED]
            alone, shared = self._one_by_one(model, few), self._behind_prompts(model, few)
            # a model that looks ahead, or keeps more than keys and values, answers otherwise
            some = next(model.parameters())
            rounds = torch.is_autocast_enabled(some.device.type) or some.dtype != torch.float32
            bound = TOLERANCE["bfloat16" if rounds else "float32"]
            self._shared[kind] = shared is not None and np.allclose(shared, alone, bound, bound, equal_nan=True)
        behind = self._behind_prompts(model, groups) if kind is not None and self._shared[kind] else None
        sums = self._one_by_one(model, groups) if behind is None else behind
        return np.split(sums, np.cumsum([len(group) for group in groups])[:-1])

    def _one_by_one(self, model: nn.Module, groups: Sequence[Sequence[Encoded]]) -> Floats:
        return self._scored(model, [one for group in groups for one in group])[0]

    def _behind_prompts(self, model: nn.Module, groups: Sequence[Sequence[Encoded]]) -> Floats | None:
        argument = next((name for name in CACHES if name in _arguments(model)), None)
        if argument is None:
            return None
        size, padding = self.settings.batch_size, self.tokenizer.pad_token_id
        return choice_likelihoods(model, _forward, argument, groups, size, padding)

    def encoded(self, example: Example, number: int) -> Encoded:
        """See `LanguageTask.encoded`."""
        settings = self.settings
        return encode(
            self.tokenizer,
            example.prompt,
            example.completions[number],
            self.max_length,
            delimiter=settings.delimiter,
            chat=settings.chat and bool(example.prompt),
            ends=settings.end,
            cuts=settings.text is not None or settings.is_unanswered,
            column=settings.text or settings.choices or settings.completion,
        )

    @cached_property
    def prompt_length(self) -> int:
        """See `LanguageTask.prompt_length`: positions that a model has learnt are for both."""
        new, learnt = self.settings.max_new_tokens, learnt_positions(self.blank_model()[0])
        # what members complete is then read with its prompt
        room = min(self.max_length - new if self.settings.is_unanswered else self.max_length, learnt - new)
        if room < 1:
            raise self.error(
                f"`max_new_tokens` is {new}, which leaves no prompt any of the {min(self.max_length, learnt)} tokens that are "
                "read: lower it" + ("" if learnt <= self.max_length else ", or raise `max_length`")
            )
        return int(room)

    def prompt_ids(self, example: Example) -> tuple[Sequence[int], bool]:
        """See `LanguageTask.prompt_ids`; a prompt that is too long loses its beginning."""
        ids = encode_prompt(self.tokenizer, example.prompt, chat=self.settings.chat and bool(example.prompt))
        return ids[-self.prompt_length :], len(ids) > self.prompt_length

    def joined(self, encoded: Sequence[Encoded], places: npt.NDArray[np.int64]) -> Batch:
        """Sequences without their last token, padded on the left, so that all completions end side by side."""
        ids, mask = padded([sequence.ids[:-1] for sequence in encoded], self.tokenizer.pad_token_id, left=True)
        keep = max(sequence.targets for sequence in encoded)
        labels = torch.full((len(encoded), keep), IGNORED)
        for row, sequence in zip(labels, encoded, strict=True):
            row[keep - sequence.targets :] = torch.tensor(sequence.ids[sequence.start :])
        return Batch({"input_ids": ids, "attention_mask": mask}, labels, torch.from_numpy(places), mask.bool())

    def pad_prompts(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Padded on the left, where generation starts from."""
        return padded(prompts, self.tokenizer.pad_token_id, left=True)


def _lengths(choices: Sequence[Encoded]) -> str:
    """Whether a prompt's pass gives all that is asked for, or choices have further tokens."""
    return "one token" if all(one.targets == 1 for one in choices) else "several tokens"


def _forward(model: nn.Module, inputs: Mapping[str, Any], keep: int) -> Any:
    """The model's output, with logits of the last positions, or of all where it cannot leave any out."""
    fewer = {"logits_to_keep": keep} if "logits_to_keep" in _arguments(model) else {}
    return model(**_placed(model, inputs), **fewer)


def _placed(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A batch's inputs, with positions that do not count the padding, where the model takes any."""
    if "position_ids" not in _arguments(model):
        return dict(inputs)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return {**inputs, "position_ids": positions[:, -inputs["input_ids"].shape[1] :]}


def _arguments(model: nn.Module) -> Collection[str]:
    """Names of a model's arguments."""
    return inspect.signature(model.forward).parameters


register(CausalLM, CausalLMSettings)

"""Causal language models: judged by likelihood, by multiple choice, or by what they generate."""

import inspect
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from merging.tasks.language.language_task import LIKELIHOODS, Example, LanguageSettings, LanguageTask, padded
from merging.tasks.language.prompts import Encoded, encode
from merging.tasks.task import IGNORED, Batch, register


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

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits of the label positions alone [N, K, V]: what is before them is not multiplied with the vocabulary."""
        keep, inputs = batch.labels.shape[1], _placed(model, batch)
        if "logits_to_keep" in _arguments(model):
            inputs["logits_to_keep"] = keep
        logits: Tensor = model(**inputs).logits
        return logits[:, -keep:]

    def with_all_targets(self, batch: Batch) -> Batch:
        """Every token that follows another is a target; see `Task.with_all_targets`."""
        ids, real = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
        labels = torch.cat([ids[:, 1:], batch.labels[:, -1:]], dim=1)
        return replace(batch, labels=torch.where(real, labels, IGNORED))

    def representation(self, model: nn.Module, batch: Batch) -> Tensor:
        """The backbone's last hidden states [N, S, D]."""
        backbone: Any = model.base_model
        states: Tensor = backbone(**_placed(backbone, batch)).last_hidden_state
        return states

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
        )

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


def _placed(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """A batch's inputs, with positions that do not count the padding, where the model takes any."""
    if "position_ids" not in _arguments(model):
        return dict(batch.inputs)
    return {**batch.inputs, "position_ids": (batch.inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def _arguments(model: nn.Module) -> Collection[str]:
    """Names of a model's arguments."""
    return inspect.signature(model.forward).parameters


register(CausalLM, CausalLMSettings)

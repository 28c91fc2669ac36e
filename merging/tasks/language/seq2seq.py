"""Encoder–decoders: source texts and what they are turned into."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn

from merging.errors import TaskError
from merging.tasks.head import learnt_positions
from merging.tasks.language.examples import Example
from merging.tasks.language.language_settings import LanguageSettings
from merging.tasks.language.language_task import LanguageTask
from merging.tasks.language.token_padding import padded
from merging.tasks.task import IGNORED, Batch, register


class Seq2SeqSettings(LanguageSettings):
    """Sequence to sequence: the likelihood of targets, a choice among label words, or generation.

    Columns `source` and `target` unless `prompt` and `completion` name others; a Jinja `template` makes sources from columns,
    as T5's prompts are; `choices` and `label` choose among label words by their likelihood.
    """

    kind: Literal["seq2seq"] = Field("seq2seq", description="seq2seq: an encoder–decoder.")
    prompt: str | None = Field("source", description="Column of the source; not used where `template` is given.")
    completion: str | None = Field(
        "target", description="Column of the target; null: members complete sources themselves, for statistics."
    )


@dataclass(frozen=True)
class _Pair:
    """Source and target ids."""

    source: tuple[int, ...]
    target: tuple[int, ...]
    is_cut: bool

    @property
    def size(self) -> int:
        return len(self.source) + len(self.target)


class Seq2Seq(LanguageTask):
    """A sequence-to-sequence task; see `Task`."""

    kind: ClassVar[str] = "seq2seq"
    model_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    settings: Seq2SeqSettings

    def representation(self, model: nn.Module, batch: Batch) -> Tensor:
        """The encoder's last hidden states [N, S, D]."""
        encoder: Any = model.get_encoder()  # type: ignore[operator]
        inputs = {name: batch.inputs[name] for name in ("input_ids", "attention_mask")}
        states: Tensor = encoder(**inputs).last_hidden_state
        return states

    def encoded(self, example: Example, number: int) -> _Pair:
        """See `LanguageTask.encoded`. What is too long loses its end, but for choices, which must fit."""
        source, source_is_cut = self.prompt_ids(example)
        wanted, column = example.completions[number], self.settings.choices or self.settings.completion
        target, target_is_cut = self._fitted(text_target=wanted)
        if not target or not wanted.strip():
            raise TaskError(f"the target {wanted[:40]!r} has no token (column '{column}'): name another column")
        if target_is_cut and self.settings.choices is not None:
            raise TaskError(
                f"the choice {wanted[:40]!r} (column '{column}') has more tokens than `max_length`, {self.max_length}: raise "
                "it where the model reads more, or shorten the choice"
            )
        return _Pair(tuple(source), tuple(target), source_is_cut or target_is_cut)

    @cached_property
    def prompt_length(self) -> int:
        """See `LanguageTask.prompt_length`: sources and completions each have their own positions."""
        new, learnt = self.settings.max_new_tokens, learnt_positions(self.blank_model()[0])
        if new > learnt:
            raise self.error(f"`max_new_tokens` is {new}, and the model has learnt {learnt} positions: lower it")
        return self.max_length

    def prompt_ids(self, example: Example) -> tuple[Sequence[int], bool]:
        """See `LanguageTask.prompt_ids`; a source that is too long loses its end."""
        ids, is_cut = self._fitted(example.prompt)
        if not ids:
            raise TaskError(
                f"the source {example.prompt[:40]!r} has no token (column '{self.settings.prompt}'): remove it"
            )
        return ids, is_cut

    def _fitted(self, *texts: str, **others: str) -> tuple[list[int], bool]:
        """Token ids of a text within `max_length`, cut as the tokenizer cuts, and whether they are."""
        ids = list(self.tokenizer(*texts, **others)["input_ids"])
        if len(ids) <= self.max_length:
            return ids, False
        cut = self.tokenizer(*texts, **others, truncation=True, max_length=self.max_length)["input_ids"]
        return list(cut), True

    def joined(self, encoded: Sequence[_Pair], places: npt.NDArray[np.int64]) -> Batch:
        """Sources and targets padded on the right; the decoder reads targets shifted by its start token."""
        padding = self.tokenizer.pad_token_id
        ids, mask = padded([pair.source for pair in encoded], padding, left=False)
        target, real = padded([pair.target for pair in encoded], padding, left=False)
        labels = torch.where(real.bool(), target, IGNORED)
        start = torch.full((len(encoded), 1), self._start)
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "decoder_input_ids": torch.cat([start, target[:, :-1]], dim=1),
            "decoder_attention_mask": real,
        }
        return Batch(inputs, labels, torch.from_numpy(places), mask.bool())

    def pad_prompts(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Padded on the right, as encoders read them."""
        return padded(prompts, self.tokenizer.pad_token_id, left=False)

    @property
    def _start(self) -> int:
        """The token that decoding starts from."""
        from merging.checkpoints.adapters.adapter import open_checkpoint

        config = open_checkpoint(self.head, self.base).config
        start = config.get("decoder_start_token_id")
        if start is None:
            start = config.get("pad_token_id")
        if start is None:
            raise self.error(f"the config.json of {self.head} names no decoder_start_token_id")
        return int(start)


register(Seq2Seq, Seq2SeqSettings)

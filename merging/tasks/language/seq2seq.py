"""Encoder–decoders: source texts and what they are turned into."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn

from merging.errors import TaskError
from merging.tasks.language.language_task import Example, LanguageSettings, LanguageTask
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

    @property
    def prompt_ids(self) -> Sequence[int]:
        return self.source

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
        """See `LanguageTask.encoded`. A source that is too long loses its end; a target must fit."""
        limit = self.max_length
        source = list(self.tokenizer(example.prompt)["input_ids"])
        target = list(self.tokenizer(text_target=example.completions[number])["input_ids"])
        if not target or not example.completions[number].strip():
            raise TaskError(f"the target {example.completions[number][:40]!r} has no token: name another column")
        if len(target) > limit:
            raise TaskError(
                f"the target has {len(target)} tokens, `max_length` is {limit}: raise it where the model reads more, or "
                "shorten the target"
            )
        if len(source) > limit:
            source = [*source[: limit - 1], source[-1]]
        return _Pair(tuple(source), tuple(target))

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

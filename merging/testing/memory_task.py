"""A task whose model and examples lie in memory: what statistics are tested on."""

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from merging.tasks.task import IGNORED, Batch, Score, Split, Task, TaskSettings


class MemoryTask(Task):
    """A model and its examples, in memory; batches are cut to the longest of their examples.

    Args:
        model: The model, of any dtype.
        inputs: Keyword arguments of its forward, an example a row.
        labels: See `Batch`.
        mask: Which positions are real [N, S].
        head: Path of a checkpoint, where something asks for one.
    """

    kind = "tiny"

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        labels: Tensor,
        mask: Tensor | None = None,
        head: str = "",
    ) -> None:
        super().__init__("tiny", TaskSettings(), head)
        self.model, self.inputs, self.labels, self.mask = model, dict(inputs), labels, mask

    def check(self) -> list[str]:
        """Nothing can be wrong."""
        return []

    def load_model(self) -> nn.Module:
        """A copy of the model."""
        return copy.deepcopy(self.model).eval()

    def size(self, split: Split) -> int:
        """All examples are for training."""
        return len(self.labels) if split == "train" else 0

    def data_fingerprint(self, split: Split) -> str:
        """One for all."""
        return "0123456789abcdef"

    def evaluate(
        self, model: nn.Module, split: Split, *, limit: int | None = None, precision: str = "float32"
    ) -> Score:
        """Nothing is judged."""
        return Score(0.0, 0.0, self.size(split), "none")

    def batches(self, split: Split, start: int, stop: int, batch_size: int) -> Iterator[Batch]:
        """See `Task.batches`."""
        for first in range(start, min(stop, self.size(split)), batch_size):
            part = slice(first, min(first + batch_size, stop, self.size(split)))
            widths: dict[torch.Size, int] = {}
            if self.mask is not None:
                widths[self.mask.shape] = int(self.mask[part].sum(1).max())
            if "decoder_input_ids" in self.inputs:
                widths[self.labels.shape] = int((self.labels[part] != IGNORED).sum(1).max())

            def cut(value: Tensor, part: slice = part, widths: dict[torch.Size, int] = widths) -> Tensor:
                return value[part, : widths[value.shape]] if value.shape in widths else value[part]

            yield Batch(
                {name: cut(value) for name, value in self.inputs.items()},
                cut(self.labels),
                torch.arange(part.start, part.stop),
                None if self.mask is None else cut(self.mask),
            )

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """See `Task.logits`."""
        output = model(**batch.inputs)
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits

    def representation(self, model: nn.Module, batch: Batch) -> Tensor:
        """See `Task.representation`."""
        states: Tensor = model.base_model(**batch.inputs).last_hidden_state  # type: ignore[operator]
        return states


def words(count: int, width: int, vocabulary: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and mask [count, width], of differing lengths, padded on the right with 0."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, width + 1, (count,), generator=generator)
    mask = (torch.arange(width) < lengths[:, None]).long()
    return torch.randint(4, vocabulary, (count, width), generator=generator) * mask, mask


def scramble(model: nn.Module, seed: int = 1) -> nn.Module:
    """Float64 weights far from their initialisation, so that no gradient is negligible."""
    model = model.double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise, alpha=0.2 if parameter.dim() > 1 else 0.1)
    return model


def tiny_encoder(count: int = 7) -> MemoryTask:
    """A BERT classifier of three classes with texts of differing lengths."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        num_labels=3,
    )
    ids, mask = words(count, 9, 40)
    model = scramble(BertForSequenceClassification(config))
    return MemoryTask(model, {"input_ids": ids, "attention_mask": mask}, ids[:, 0] % 3, mask)

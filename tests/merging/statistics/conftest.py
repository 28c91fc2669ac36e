import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from merging.statistics import Partial, Statistic, measure_shard
from merging.tasks.task import IGNORED, Batch, Score, Task, TaskSettings


class TinyTask(Task):
    """A model and its examples, in memory; batches are cut to the longest of their examples."""

    kind = "tiny"

    def __init__(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        labels: Tensor,
        mask: Tensor | None = None,
        head: str = "",
    ) -> None:
        super().__init__("tiny", TaskSettings(), head)
        self.model, self.inputs, self.labels, self.mask = model, inputs, labels, mask

    def check(self) -> list[str]:
        return []

    def load_model(self) -> nn.Module:
        return copy.deepcopy(self.model).eval()

    def size(self, split: str) -> int:
        return len(self.labels) if split == "train" else 0

    def data_fingerprint(self, split: str) -> str:
        return "0123456789abcdef"

    def evaluate(self, model: nn.Module, split: str, **options: object) -> Score:
        return Score(0.0, 0.0, self.size(split), "none")

    def batches(self, split: str, start: int, stop: int, batch_size: int) -> Iterator[Batch]:
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
        output = model(**batch.inputs)
        return output if isinstance(output, Tensor) else output.logits

    def representation(self, model: nn.Module, batch: Batch) -> Tensor:
        return model.base_model(**batch.inputs).last_hidden_state


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
            parameter += (0.2 if parameter.dim() > 1 else 0.1) * noise
    return model


def bert(count: int) -> TinyTask:
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
    return TinyTask(model, {"input_ids": ids, "attention_mask": mask}, ids[:, 0] % 3, mask)


def llama(count: int) -> TinyTask:
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        max_position_embeddings=16,
        num_labels=3,
        pad_token_id=0,
    )
    ids, mask = words(count, 7, 40)
    model = scramble(LlamaForSequenceClassification(config))
    return TinyTask(model, {"input_ids": ids, "attention_mask": mask}, ids[:, 0] % 3, mask)


def vit(count: int) -> TinyTask:
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    images = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return TinyTask(scramble(ViTForImageClassification(config)), {"pixel_values": images}, torch.arange(count) % 3)


def gpt2(count: int) -> TinyTask:
    config = GPT2Config(vocab_size=24, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=1)
    ids, mask = words(count, 7, 24)
    labels = torch.cat([ids[:, 1:], torch.zeros(count, 1, dtype=torch.int64)], dim=1)
    labels = labels.masked_fill(labels == 0, IGNORED)
    model = scramble(GPT2LMHeadModel(config))
    return TinyTask(model, {"input_ids": ids, "attention_mask": mask}, labels, mask)


def t5(count: int) -> TinyTask:
    config = T5Config(
        vocab_size=24,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        relative_attention_num_buckets=8,
    )
    ids, mask = words(count, 7, 24)
    labels, real = words(count, 5, 24, seed=5)
    decoder_ids = torch.cat([torch.zeros(count, 1, dtype=torch.int64), labels[:, :-1]], dim=1)
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoder_ids}
    return TinyTask(scramble(T5ForConditionalGeneration(config)), inputs, labels.masked_fill(real == 0, IGNORED), mask)


TASKS: dict[str, Callable[[int], TinyTask]] = {"bert": bert, "llama": llama, "vit": vit, "gpt2": gpt2, "t5": t5}


@pytest.fixture
def tiny_task() -> type[TinyTask]:
    return TinyTask


@pytest.fixture
def build() -> Callable[..., TinyTask]:
    """Name and number of examples → a task with a small random model in float64."""

    def make(name: str, count: int = 7) -> TinyTask:
        return TASKS[name](count)

    return make


@pytest.fixture
def sharded() -> Callable[..., Partial]:
    """Measures [0, 2), [2, 5), [5, end) apart and combines them in another order."""

    def run(task: Task, statistic: Statistic) -> Partial:
        parts = [measure_shard(task, statistic, "train", *ends) for ends in ((0, 2), (2, 5), (5, task.size("train")))]
        return parts[2].combine(parts[0]).combine(parts[1])

    return run

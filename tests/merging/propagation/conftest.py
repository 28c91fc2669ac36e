import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AlbertModel,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2Model,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from merging.checkpoints.pool import Pool
from merging.tasks.task import Batch, Score, Task, TaskSettings

VOCABULARY = 40
TEXT = {"vocab_size": VOCABULARY, "num_labels": 3, "pad_token_id": 0}
SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
MODELS = {
    "bert": (BertModel, BertForSequenceClassification, BertConfig(**TEXT, **SIZE, max_position_embeddings=16)),
    "albert": (AlbertModel, AlbertForSequenceClassification, AlbertConfig(**TEXT, **SIZE, embedding_size=8)),
    "llama": (LlamaModel, LlamaForSequenceClassification, LlamaConfig(**TEXT, **SIZE, num_key_value_heads=1)),
    "gpt2": (GPT2Model, GPT2ForSequenceClassification, GPT2Config(**TEXT, n_embd=16, n_layer=2, n_head=2)),
    "vit": (ViTModel, ViTForImageClassification, ViTConfig(**SIZE, image_size=8, patch_size=4, num_labels=3)),
    "t5": (
        T5ForConditionalGeneration,
        T5ForConditionalGeneration,
        T5Config(
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
            relative_attention_num_buckets=8,
            tie_word_embeddings=True,
        ),
    ),
}


class MemoryTask(Task):
    """A model and its examples, in memory; batches are as long as their longest example."""

    kind = "memory"

    def __init__(self, name: str, model: nn.Module, inputs: Mapping[str, Tensor], mask: Tensor | None = None) -> None:
        super().__init__(name, TaskSettings(), "")
        self.model, self.inputs, self.mask = model, inputs, mask

    def check(self) -> list[str]:
        return []

    def load_model(self) -> nn.Module:
        return copy.deepcopy(self.model).eval()

    def size(self, split: str) -> int:
        return len(next(iter(self.inputs.values()))) if split == "train" else 0

    def data_fingerprint(self, split: str) -> str:
        return "0123456789abcdef"

    def evaluate(self, model: nn.Module, split: str, **options: object) -> Score:
        return Score(0.0, 0.0, self.size(split), "none")

    def batches(self, split: str, start: int, stop: int, batch_size: int) -> Iterator[Batch]:
        stop = min(stop, self.size(split))
        for first in range(start, stop, batch_size):
            part = slice(first, min(first + batch_size, stop))
            mask = None if self.mask is None else self.mask[part]
            width = None if mask is None else int(mask.sum(1).max())
            inputs = {
                name: value[part, :width] if self.mask is not None and value.shape == self.mask.shape else value[part]
                for name, value in self.inputs.items()
            }
            labels = torch.zeros(inputs.get("decoder_input_ids", torch.zeros(part.stop - first)).shape).long()
            yield Batch(inputs, labels, torch.arange(first, part.stop), None if mask is None else mask[:, :width])

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        output = model(**batch.inputs)
        return output if isinstance(output, Tensor) else output.logits


@pytest.fixture
def memory_task() -> type[MemoryTask]:
    return MemoryTask


@dataclass(frozen=True)
class Given:
    """A pool with its members' tasks."""

    pool: Pool
    tasks: dict[str, MemoryTask]

    @property
    def members(self) -> list[str]:
        return list(self.tasks)


def noisy(model: nn.Module, noise: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value += noise * torch.randn(value.shape, generator=generator)


def examples(kind: str, count: int, seed: int) -> tuple[dict[str, Tensor], Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    if kind == "vit":
        return {"pixel_values": torch.randn(count, 3, 8, 8, generator=generator)}, None
    lengths = torch.randint(3, 10, (count,), generator=generator)
    mask = (torch.arange(9) < lengths[:, None]).long()
    ids = torch.randint(4, VOCABULARY, (count, 9), generator=generator) * mask
    inputs = {"input_ids": ids, "attention_mask": mask}
    if kind == "t5":
        inputs["decoder_input_ids"] = torch.randint(4, VOCABULARY, (count, 5), generator=generator)
    return inputs, mask


@pytest.fixture(scope="session")
def given(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Given]:
    """`given("bert", members=3, noise=0.1, count=40)`: random models around one base, each with its examples; read only."""

    @cache
    def build(kind: str, members: int = 3, noise: float = 0.1, count: int = 40) -> Given:
        root: Path = tmp_path_factory.mktemp(kind)
        bare, headed, config = MODELS[kind]
        torch.manual_seed(0)
        base: PreTrainedModel = bare(copy.deepcopy(config))
        noisy(base, 0.15, 1)
        base.save_pretrained(root / "base")
        tasks, paths = {}, {}
        for number in range(members):
            name = f"m{number}"
            torch.manual_seed(number)
            model = headed.from_pretrained(root / "base", num_labels=3) if bare is not headed else copy.deepcopy(base)
            noisy(model, noise, 10 + number if noise else 10)
            model.config.pad_token_id = 0
            model.save_pretrained(root / name)
            paths[name] = str(root / name)
            tasks[name] = MemoryTask(name, model, *examples(kind, count, 20 + number))
        return Given(Pool.open(str(root / "base"), paths), tasks)

    return build


@pytest.fixture
def handmade(tmp_path: Path) -> Callable[..., Given]:
    """A pool of any modules: `handmade(base, {"m": (model, inputs)})`; a model is called with the inputs' names."""

    def save(path: Path, model: nn.Module) -> str:
        path.mkdir()
        (path / "config.json").write_text(json.dumps({"model_type": "handmade"}))
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path / "model.safetensors")
        return str(path)

    def build(base: nn.Module, members: Mapping[str, tuple[nn.Module, Mapping[str, Tensor]]]) -> Given:
        paths = {name: save(tmp_path / name, model) for name, (model, _) in members.items()}
        tasks = {name: MemoryTask(name, model, inputs) for name, (model, inputs) in members.items()}
        return Given(Pool.open(save(tmp_path / "base", base), paths), tasks)

    return build

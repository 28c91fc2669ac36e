from collections.abc import Callable

import pytest
import torch
from transformers import (
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
from merging.tasks.task import IGNORED, Task
from merging.testing.memory_task import MemoryTask as TinyTask
from merging.testing.memory_task import scramble, tiny_encoder, words


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


TASKS: dict[str, Callable[[int], TinyTask]] = {"bert": tiny_encoder, "llama": llama, "vit": vit, "gpt2": gpt2, "t5": t5}


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

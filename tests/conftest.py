"""What many tests need: tiny real models on disk."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizerFast

WORDS = "good bad great awful fine poor film book story plot music actor very not really so the a was is".split()


def tiny_config(**changes: object) -> BertConfig:
    settings = {
        "vocab_size": 5 + len(WORDS),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 32,
    }
    return BertConfig(**(settings | changes))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BertTokenizerFast:
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    path = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    path.write_text("\n".join(vocabulary))
    return BertTokenizerFast(str(path), model_max_length=32)


@pytest.fixture(scope="session")
def save_base(tokenizer: BertTokenizerFast) -> Callable[..., Path]:
    """Writes a bare BertModel: `save_base(path, seed=0, **config)`."""

    def save(path: Path, seed: int = 0, **changes: object) -> Path:
        torch.manual_seed(seed)
        BertModel(tiny_config(**changes)).save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    return save


@pytest.fixture(scope="session")
def save_member(tokenizer: BertTokenizerFast) -> Callable[..., Path]:
    """Writes a classifier on a base, its weights moved by noise: `save_member(path, base, seed, labels=3, noise=0.005)`."""

    def save(path: Path, base: Path, seed: int, labels: int = 3, noise: float = 0.005) -> Path:
        torch.manual_seed(1000 + seed)
        model = BertForSequenceClassification.from_pretrained(base, num_labels=labels)
        with torch.no_grad():
            for value in model.parameters():
                value.add_(torch.randn_like(value) * noise)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    return save


@pytest.fixture(scope="session")
def tiny_pool(
    tmp_path_factory: pytest.TempPathFactory, save_base: Callable[..., Path], save_member: Callable[..., Path]
) -> dict[str, Path]:
    """A base and members `one`, `two`, `three` (with 2, 3 and 3 labels) on disk; read only."""
    root = tmp_path_factory.mktemp("pool")
    base = save_base(root / "base")
    members = {
        name: save_member(root / name, base, seed, labels=2 + (seed > 0))
        for seed, name in enumerate(("one", "two", "three"))
    }
    return {"base": base, **members}

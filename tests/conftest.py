"""What many tests need: tiny real models on disk."""

import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizerFast

WORDS = tuple("good bad great awful fine poor film book story plot music actor very not really so the a was is".split())  # noqa: SIM905


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


@pytest.fixture(scope="session")
def write_texts() -> Callable[..., Path]:
    """Writes a split whose label follows from its words: `write_texts(path, examples, labels=3, seed=0)`."""

    def write(path: Path, examples: int, labels: int = 3, seed: int = 0) -> Path:
        generator = random.Random(seed)
        rows = []
        for number in range(examples):
            words = generator.choices(WORDS, k=generator.randint(3, 12))
            rows.append({"text": " ".join(words), "label": number % labels})
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_parquet(path)
        return path

    return write


@pytest.fixture(scope="session")
def tiny_campaign(tmp_path_factory: pytest.TempPathFactory, tiny_pool, write_texts) -> dict[str, Any]:
    """Settings of a campaign over the tiny pool that takes seconds; a copy for every test that changes them."""
    root = tmp_path_factory.mktemp("data")
    sizes = {"train": 24, "validation": 30, "test": 30}
    tasks = {}
    for number, name in enumerate(("one", "two", "three")):
        data = {
            split: str(write_texts(root / name / f"{split}.parquet", size, 2 + (number > 0), seed=number))
            for split, size in sizes.items()
        }
        tasks[name] = {"kind": "text_classification", "data": data, "max_length": 16}
    return {
        "name": "tiny",
        "base": str(tiny_pool["base"]),
        "members": {name: {"checkpoint": str(tiny_pool[name])} for name in tasks},
        "tasks": tasks,
        "statistics": {
            "shard": 8,
            "fisher": {"examples": 16},
            "gram": {"examples": 16},
            "representation": {"examples": 16},
        },
        # random models: their gain over the base is noise, and may be nowhere
        "selection": {"quality": "equal"},
        "search": {"candidates": 14},
    }


@pytest.fixture
def campaign_file(tiny_campaign, tmp_path) -> Callable[..., Path]:
    """Writes the tiny campaign with changes: `campaign_file(search={"candidates": 3})` replaces within sections."""

    def write(**changes: Any) -> Path:
        settings = copy.deepcopy(tiny_campaign)
        for key, value in changes.items():
            settings[key] = settings.get(key, {}) | value if isinstance(value, dict) else value
        path = tmp_path / "campaign.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return write


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One local Ray for all tests that need one; `connect()` joins it."""
    from ray_tasks.cluster import connect

    with connect():
        yield

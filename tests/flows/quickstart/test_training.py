from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from flows.quickstart.training import TrainingSettings, bucketed, train_member
from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.pool import Pool
from merging.errors import CheckpointError
from merging.tasks import TextClassificationSettings, make_task

SETTINGS = TrainingSettings(epochs=12, batch_size=8, learning_rate=2e-3, max_length=16)


@pytest.fixture(scope="module")
def train(tmp_path_factory) -> Path:
    """Texts whose label is what their adjective says."""
    generator = np.random.default_rng(0)
    words = [["bad", "awful", "poor"], ["film", "book", "plot"], ["good", "great", "fine"]]
    labels = generator.integers(0, 3, size=96)
    texts = ["the " * generator.integers(1, 6) + str(generator.choice(words[label])) for label in labels]
    path = tmp_path_factory.mktemp("data") / "train.parquet"
    pd.DataFrame({"text": texts, "label": labels}).to_parquet(path)
    return path


@pytest.fixture(scope="module")
def member(tmp_path_factory, tiny_pool, train) -> Path:
    return train_member(tiny_pool["base"], train, tmp_path_factory.mktemp("members") / "one", SETTINGS).path


def test_learns(member, train):
    task = make_task("one", TextClassificationSettings(data={"validation": str(train)}), str(member))
    assert task.evaluate(task.load_model(), "validation").value > 0.9


def test_is_an_ordinary_directory(member, tiny_pool):
    model = AutoModelForSequenceClassification.from_pretrained(member)
    assert model.config.id2label == {0: "negative", 1: "neutral", 2: "positive"}
    assert AutoTokenizer.from_pretrained(member)("good book")["input_ids"] == [2, 5, 12, 3]
    pool = Pool.open(str(tiny_pool["base"]), {"one": str(member)})
    assert pool.members["one"].head == ("classifier.bias", "classifier.weight")


def test_same_inputs_same_bits(member, tiny_pool, train, tmp_path):
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    again = train_member(tiny_pool["base"], train, tmp_path / "again", SETTINGS).path
    assert Checkpoint.open(str(again)).fingerprint == Checkpoint.open(str(member)).fingerprint
    assert torch.random.get_rng_state().equal(before)


def test_another_seed_gives_another_member(member, tiny_pool, train, tmp_path):
    settings = TrainingSettings(**{**SETTINGS.__dict__, "seed": 1})
    other = train_member(tiny_pool["base"], train, tmp_path / "other", settings).path
    assert Checkpoint.open(str(other)).fingerprint != Checkpoint.open(str(member)).fingerprint


def test_reuses_what_is_there(tiny_pool, train, tmp_path):
    quick = TrainingSettings(max_length=16)
    first = train_member(tiny_pool["base"], train, tmp_path / "m", quick)
    second = train_member(tiny_pool["base"], train, tmp_path / "m", quick)
    assert (first.reused, second.reused) == (False, True)
    assert (first.loss, first.seconds) == (second.loss, second.seconds)
    changed = train_member(tiny_pool["base"], train, tmp_path / "m", TrainingSettings(max_length=8))
    assert not changed.reused
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_reports_progress(tiny_pool, train, tmp_path):
    steps = []
    train_member(
        tiny_pool["base"], train, tmp_path / "m", TrainingSettings(epochs=2, batch_size=40),
        progress=lambda done, total, loss: steps.append((done, total, loss > 0)),
    )  # fmt: skip
    assert steps == [(i, 6, True) for i in range(1, 7)]


def test_base_that_is_missing(train, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint directory"):
        train_member(tmp_path / "nowhere", train, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_bucketed_takes_each_example_once_and_saves_padding():
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 60, size=1000)
    batches = bucketed(lengths, 16, generator)
    assert sorted(np.concatenate(batches)) == list(range(1000))
    assert max(len(batch) for batch in batches) == 16
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert padded < 1.15 * lengths.sum()
    firsts = [lengths[batch].mean() for batch in batches]
    assert firsts != sorted(firsts)

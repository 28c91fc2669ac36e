from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForTokenClassification,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from flows.quickstart.sentiment import LABELS
from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.pool import Pool
from merging.errors import CheckpointError, TaskError
from merging.optimization.fine_tuning import (
    Lesson,
    TrainingSettings,
    joined,
    train_member,
    train_together,
)
from merging.tasks import (
    CausalLMSettings,
    Seq2SeqSettings,
    TextClassification,
    TextClassificationSettings,
    TokenClassificationSettings,
    make_task,
)

SETTINGS = TrainingSettings(epochs=12, batch_size=8, learning_rate=2e-3)
SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
T5 = {
    "vocab_size": 40,
    "d_model": 16,
    "d_ff": 24,
    "d_kv": 8,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}


def task_on(train: Path, max_length: int = 16) -> TextClassificationSettings:
    return TextClassificationSettings(data={"train": str(train)}, max_length=max_length)


def language(train: str) -> CausalLMSettings:
    return CausalLMSettings(data={"train": train}, prompt="source", completion="target")


def seq2seq(train: str) -> Seq2SeqSettings:
    return Seq2SeqSettings(data={"train": train})


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
    return train_member(
        tiny_pool["base"], task_on(train), tmp_path_factory.mktemp("members") / "one", SETTINGS, labels=LABELS
    ).path


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
    again = train_member(tiny_pool["base"], task_on(train), tmp_path / "again", SETTINGS, labels=LABELS).path
    assert Checkpoint.open(str(again)).fingerprint == Checkpoint.open(str(member)).fingerprint
    assert torch.random.get_rng_state().equal(before)


def test_another_seed_gives_another_member(member, tiny_pool, train, tmp_path):
    settings = SETTINGS.model_copy(update={"seed": 1})
    other = train_member(tiny_pool["base"], task_on(train), tmp_path / "other", settings, labels=LABELS).path
    assert Checkpoint.open(str(other)).fingerprint != Checkpoint.open(str(member)).fingerprint


def test_reuses_what_is_there(tiny_pool, train, tmp_path):
    first = train_member(tiny_pool["base"], task_on(train), tmp_path / "m", labels=LABELS)
    second = train_member(tiny_pool["base"], task_on(train), tmp_path / "m", labels=LABELS)
    assert (first.reused, second.reused) == (False, True)
    assert (first.loss, first.seconds) == (second.loss, second.seconds)
    changed = train_member(tiny_pool["base"], task_on(train, max_length=8), tmp_path / "m", labels=LABELS)
    assert not changed.reused
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_reports_progress(tiny_pool, train, tmp_path):
    steps = []
    train_member(
        tiny_pool["base"], task_on(train), tmp_path / "m", TrainingSettings(epochs=2, batch_size=40), labels=LABELS,
        progress=lambda done, total, loss: steps.append((done, total, loss > 0)),
    )  # fmt: skip
    assert steps == [(i, 6, True) for i in range(1, 7)]


def test_base_that_is_missing(train, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint directory"):
        train_member(tmp_path / "nowhere", task_on(train), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_learns_tags(tiny_pool, tmp_path):
    """Words with tags: nouns among adjectives, sentences of several lengths."""
    generator = np.random.default_rng(0)
    words = [generator.choice(["good", "film", "bad", "book"], size=generator.integers(2, 8)) for _ in range(64)]
    tags = [["N" if word in ("film", "book") else "A" for word in sentence] for sentence in words]
    file = tmp_path / "train.parquet"
    pd.DataFrame({"words": words, "tags": tags}).to_parquet(file)
    data = {"train": str(file), "validation": str(file)}
    settings = TokenClassificationSettings(data=data, metric="token_accuracy")
    member = train_member(tiny_pool["base"], settings, tmp_path / "m", SETTINGS, labels=("N", "A")).path
    task = make_task("tags", settings, str(member))
    assert task.evaluate(task.load_model(), "validation").value > 0.95


@pytest.mark.parametrize("kind", ["tags", "language"])
def test_joined_batches_give_the_logits_of_single_examples(kind, tiny_pool, tokenizer, tmp_path):
    file = tmp_path / "train.parquet"
    if kind == "tags":
        rows = {"words": [["good"], ["bad", "film", "so"], ["a", "b"]], "tags": [["A"], ["A", "N", "N"], ["N", "A"]]}
        pd.DataFrame(rows).to_parquet(file)
        settings = TokenClassificationSettings(data={"train": str(file)}, labels=["N", "A"])
        path = tmp_path / "model"
        BertForTokenClassification.from_pretrained(tiny_pool["base"], id2label={0: "N", 1: "A"}).save_pretrained(path)
    else:
        prompts, completions = ["good film", "so", "the plot was not"], ["bad", "very good book", "fine"]
        pd.DataFrame({"prompt": prompts, "completion": completions}).to_parquet(file)
        settings = CausalLMSettings(data={"train": str(file)})
        path = tmp_path / "model"
        config = LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
        )
        LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    task = make_task("task", settings, str(path))
    model, examples = task.load_model(), list(task.batches("train", 0, 3, 1))
    batch = joined(examples, left=kind == "language")
    with torch.inference_mode():
        together = task.logits(model, batch)
        for row, example in enumerate(examples):
            alone, wanted = task.logits(model, example), example.labels[example.labels >= 0]
            judged = batch.labels[row] >= 0
            assert batch.labels[row][judged].equal(wanted)
            assert torch.allclose(together[row][judged], alone[example.labels >= 0], atol=1e-5)


@pytest.mark.parametrize(
    ("model", "settings", "trained"),
    [
        (lambda: T5ForConditionalGeneration(T5Config(**T5)), seq2seq, "shared.weight"),
        (lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=False)), language, "lm_head.weight"),
        (
            lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)),
            language,
            "model.embed_tokens.weight",
        ),
        (
            lambda: GPT2LMHeadModel(
                GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=False)
            ),
            language,
            "lm_head.weight",
        ),
        (
            lambda: BertLMHeadModel(BertConfig(**SMALL, is_decoder=True)),
            language,
            "cls.predictions.transform.dense.weight",
        ),
    ],
    ids=["t5", "llama-untied", "llama-tied", "gpt2-untied", "bert-decoder"],
)
def test_a_language_model_has_no_head_that_learns_faster(model, settings, trained, tokenizer, tmp_path):
    """What turns states into words was pretrained with the rest: `head_factor` must not speed it up."""
    base, file = tmp_path / "base", tmp_path / "train.parquet"
    model().save_pretrained(base)
    tokenizer.save_pretrained(base)
    pd.DataFrame({"source": ["good film", "bad book"] * 8, "target": ["good", "bad"] * 8}).to_parquet(file)
    one, ten = (
        train_member(
            base, settings(str(file)), tmp_path / str(factor), TrainingSettings(batch_size=8, head_factor=factor)
        ).path
        for factor in (1, 10)
    )
    first, second, start = (Checkpoint.open(str(path)) for path in (one, ten, base))
    assert all(first.read(name).equal(second.read(name)) for name in first.tensors)
    assert not first.read(trained).equal(start.read(trained))


def test_tasks_of_one_head_are_trained_as_one_set(tiny_pool, train, tmp_path):
    """Two halves trained together are what all examples are: one model, one head, as many steps."""
    frame = pd.read_parquet(train)
    halves = {}
    for name, part in (("first", frame[::2]), ("second", frame[1::2])):
        part.to_parquet(tmp_path / f"{name}.parquet")
        halves[name] = Lesson(task_on(tmp_path / f"{name}.parquet"), LABELS)
    steps = []
    result = train_together(
        tiny_pool["base"], halves, tmp_path / "all", SETTINGS, lambda done, total, loss: steps.append(total)
    )
    assert result.places == {"first": tmp_path / "all", "second": tmp_path / "all"}
    assert steps[-1] == 12 * len(frame) // 8
    task = make_task("one", TextClassificationSettings(data={"validation": str(train)}), str(tmp_path / "all"))
    assert task.evaluate(task.load_model(), "validation").value > 0.9
    assert train_together(tiny_pool["base"], halves, tmp_path / "all", SETTINGS).reused


def test_tasks_of_unlike_heads_share_a_backbone(tiny_pool, train, tmp_path):
    pd.DataFrame({"words": [["good", "film"], ["bad", "book"]] * 8, "tags": [["A", "N"]] * 16}).to_parquet(
        tmp_path / "tags.parquet"
    )
    tags = TokenClassificationSettings(data={"train": str(tmp_path / "tags.parquet")}, metric="token_accuracy")
    lessons = {"sentiment": Lesson(task_on(train), LABELS), "tags": Lesson(tags, ["N", "A"])}
    result = train_together(tiny_pool["base"], lessons, tmp_path / "all", SETTINGS)
    assert result.places == {name: tmp_path / "all" / name for name in lessons}
    first, second = (Checkpoint.open(str(result.places[name])) for name in lessons)
    base = Checkpoint.open(str(tiny_pool["base"]))
    both = [name for name in first.tensors if name in second.tensors and "classifier" not in name]
    assert both
    assert all(first.read(name).equal(second.read(name)) for name in both)
    moved = [not first.read(f"bert.{name}").equal(base.read(name)) for name in base.tensors if f"bert.{name}" in both]
    assert sum(moved) > len(moved) / 2
    for name, settings in {"sentiment": task_on(train), "tags": tags}.items():
        task = make_task(name, settings, str(result.places[name]))
        assert task.evaluate(task.load_model(), "train").value > 0.9


def test_a_head_of_other_classes_is_replaced(member, train, tmp_path):
    kept, renewed = (
        train_member(
            member, task_on(train), tmp_path / name, TrainingSettings(learning_rate=1e-12, head_factor=1), labels=labels
        ).path
        for name, labels in (("kept", LABELS), ("renewed", ("x", "y", "z")))
    )
    before = Checkpoint.open(str(member)).read("classifier.weight")
    assert torch.allclose(Checkpoint.open(str(kept)).read("classifier.weight"), before)
    assert not torch.allclose(Checkpoint.open(str(renewed)).read("classifier.weight"), before, atol=1e-2)


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        (["b", "a", "b"], ["a", "b"]),
        ([2, 0, 0], ["0", "1", "2"]),
        ([0, 0, 0], None),
        ([0, 1, -1], None),
        ([0.5, 1, 2], None),
    ],
)
def test_classes_of_data(labels, wanted, tmp_path):
    pd.DataFrame({"text": ["x"] * len(labels), "label": labels}).to_parquet(tmp_path / "t.parquet")
    settings = task_on(tmp_path / "t.parquet")
    if wanted is None:
        with pytest.raises(TaskError, match=r"t\.parquet"):
            TextClassification.data_classes(settings)
    else:
        assert TextClassification.data_classes(settings) == wanted


def test_training_that_diverges_says_so(tiny_pool, train, tmp_path):
    with pytest.raises(TaskError, match="learning_rate"):
        train_member(
            tiny_pool["base"], task_on(train), tmp_path / "m", TrainingSettings(learning_rate=1e38), labels=LABELS
        )
    assert not (tmp_path / "m").exists()

import json

import numpy as np
import pandas as pd
import pytest
import torch
from seqeval.metrics import f1_score
from transformers import BertConfig, BertForTokenClassification, BertTokenizerFast

from merging.errors import StatisticsError, TaskError
from merging.statistics import STATISTICS, LikelihoodSettings, StatisticSettings, measure
from merging.tasks import TokenClassificationSettings, make_task

TAGS = ["O", "B-PER", "I-PER"]
PIECES = ["an", "na", "bo", "ran", "home", "##na", "##b", "##o"]
WORDS = ["an", "anna", "bob", "bobo", "ran", "home"]


@pytest.fixture(scope="module")
def tagger(tmp_path_factory):
    path = tmp_path_factory.mktemp("tagger")
    (path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *PIECES]))
    tokenizer = BertTokenizerFast(str(path / "vocab.txt"), model_max_length=32)
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=5 + len(PIECES),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        id2label=dict(enumerate(TAGS)),
        label2id={tag: n for n, tag in enumerate(TAGS)},
    )
    model = BertForTokenClassification(config)
    for value in model.parameters():
        value.data += 0.3 * torch.randn_like(value)
    model.save_pretrained(path)
    return str(path)


def rows(count=9, seed=0):
    g = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        size = int(g.integers(1, 7))
        made.append({"words": list(g.choice(WORDS, size)), "tags": [TAGS[n] for n in g.integers(0, 3, size)]})
    return made


@pytest.fixture
def make(tmp_path, tagger):
    def run(examples, splits=("validation",), name="rows.jsonl", **settings):
        path = tmp_path / name
        if name.endswith("jsonl"):
            path.write_text("\n".join(json.dumps(row) for row in examples))
        elif name.endswith("parquet"):
            pd.DataFrame(examples).to_parquet(path)
        else:
            path.write_text(examples)
        settings = TokenClassificationSettings(data=dict.fromkeys(splits, str(path)), **settings)
        return make_task("people", settings, tagger)

    return run


def brute(model, tokenizer, row):
    """Log-probabilities at the first sub-word of each word of one sentence [words, tags]."""
    ids, first = [tokenizer.cls_token_id], []
    for word in row["words"]:
        first.append(len(ids))
        ids += tokenizer(word, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([[*ids, tokenizer.sep_token_id]])).logits[0]
    return logits[first].double().log_softmax(-1)


@pytest.mark.parametrize("metric", ["entity_f1", "token_accuracy"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_scores_are_those_of_single_sentences_without_padding(make, metric, batch_size):
    examples = rows()
    task = make(examples, metric=metric, batch_size=batch_size)
    task.check()
    model = task.load_model()
    log_p = [brute(model, task.tokenizer, row) for row in examples]
    own = [[TAGS[n] for n in p.argmax(-1)] for p in log_p]
    true = [row["tags"] for row in examples]
    predictions = task.predict(model, "validation", np.arange(9))
    score = task.score(predictions)
    if metric == "entity_f1":
        assert score.value == pytest.approx(f1_score(true, own, zero_division=0))
    else:
        pairs = [(a, b) for one, other in zip(true, own, strict=True) for a, b in zip(one, other, strict=True)]
        assert score.value == pytest.approx(np.mean([a == b for a, b in pairs]))
    assert score.standard_error > 0
    order = np.random.default_rng(0).permutation(9)
    of_true = [
        p.gather(1, torch.tensor([[TAGS.index(t)] for t in tags]))[:, 0] for p, tags in zip(log_p, true, strict=True)
    ]
    assert predictions.losses == pytest.approx([-float(of_true[i].mean()) for i in order], abs=1e-5)
    assert predictions.surrogates == pytest.approx([float(of_true[i].exp().mean()) for i in order], abs=1e-5)
    some = task.predict(model, "validation", np.array([5, 2]))
    assert some.losses == pytest.approx(predictions.losses[[5, 2]], abs=1e-5)


def test_files_of_all_formats_are_the_same_examples(make):
    examples = rows()
    conll = "-DOCSTART- O\n\n" + "\n\n".join(
        "\n".join(f"{word} x {tag}" for word, tag in zip(row["words"], row["tags"], strict=True)) for row in examples
    )
    numbers = [{**row, "tags": [TAGS.index(tag) for tag in row["tags"]]} for row in examples]
    prints = {
        make(examples).data_fingerprint("validation"),
        make(numbers, name="rows.parquet").data_fingerprint("validation"),
        make(conll, name="rows.conll").data_fingerprint("validation"),
    }
    assert len(prints) == 1


def test_the_empirical_fisher_sums_over_an_example_s_tags(make):
    examples = rows(5)
    task = make(examples, splits=("train",))
    statistic = STATISTICS["fisher"](LikelihoodSettings(estimator="empirical", examples=5, batch_size=2))
    fisher = statistic.finalize(measure(task, statistic, "train"))
    model = task.load_model().double()
    expected = {}
    for batch in task.batches("train", 0, 5, 1):
        model.zero_grad()
        logits = model(**batch.inputs).logits[0].log_softmax(-1)
        known = batch.labels[0] >= 0
        logits[known].gather(1, batch.labels[0][known, None]).sum().backward()
        for name, value in model.named_parameters():
            expected[name] = expected.get(name, 0) + (0 if value.grad is None else value.grad**2 / 5)
    assert "classifier.weight" in fisher
    for name, value in fisher.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-3, atol=1e-8)


def test_what_is_cut_is_said(make):
    notes = make([{"words": ["an"] * 60, "tags": ["O"] * 60}]).check()
    assert "1 sentences are cut to 32 tokens" in notes[0]


@pytest.mark.parametrize(
    ("examples", "name", "message"),
    [
        ([{"words": ["an"], "tags": ["B-LOC"]}], "r.jsonl", "sentence 1: the tag 'B-LOC' is none of the head's"),
        ([{"words": ["an"], "tags": [3]}], "r.jsonl", "sentence 1: the tag 3 is none"),
        ([{"words": ["an"], "tags": []}], "r.jsonl", "1 words and 0 tags"),
        ([{"words": [], "tags": []}], "r.jsonl", "0 words and 0 tags"),
        ([{"words": "an", "tags": ["O"]}], "r.jsonl", "row 1: column 'words' holds 'an'"),
        ([{"words": [7], "tags": ["O"]}], "r.jsonl", "7 is no word"),
        ([{"tags": ["O"]}], "r.jsonl", "has no column 'words'"),
        ("an O\nanna\n", "r.conll", "line 2: 'anna' has no tag"),
        ("\n\n", "r.conll", "there are no sentences"),
    ],
)
def test_bad_data_is_named(make, examples, name, message):
    with pytest.raises(TaskError, match=message):
        make(examples, name=name).check()


def test_a_head_of_another_kind_is_refused(make, head):
    with pytest.raises(TaskError, match="without a classification head|AutoModelForTokenClassification"):
        make_task("people", make(rows()).settings, head).check()


@pytest.mark.parametrize("tag", [["O"], {"a": 1}, float("nan"), None, True, 10**90])
def test_tags_of_other_types_are_one_error(make, tag):
    with pytest.raises(TaskError, match="is none of the head's"):
        make([{"words": ["an", "ran"], "tags": [tag, "O"]}]).check()


def test_names_and_positions_of_tags_may_be_mixed(make):
    task = make([{"words": ["an", "ran"], "tags": ["B-PER", 2]}])
    assert task.split("validation")[0].tags == (1, 2)


def test_halves_of_characters_are_no_words(make):
    with pytest.raises(TaskError, match="is no word"):
        make([{"words": ["\ud800", "ran"], "tags": ["O", "O"]}]).check()


@pytest.mark.parametrize("word", ["10\u00a0000", "a\u2028b", "a\x85b", "a\x0bb"])
def test_columns_are_apart_by_blanks_and_tabs_alone(make, word):
    task = make(f"\ufeff{word} X B-PER\r\nran X O\r\n", name="rows.conll")
    assert task.split("validation")[0].words == (word, "ran")


def test_words_with_blanks_in_columns_apart_by_tabs(make):
    assert make("bob an\tB-PER\nran\tO\n", name="rows.conll").split("validation")[0].words == ("bob an", "ran")


def test_calibration_data_need_no_tags(make):
    examples = rows(6)
    words = "\n\n".join("\n".join(row["words"]) for row in examples)
    tagged = make(examples, splits=("train",))
    without = [
        make([{"words": row["words"]} for row in examples], splits=("train",), tags=None, name="bare.jsonl"),
        make(words, splits=("train",), tags=None, name="words.conll"),
    ]
    for kind, settings in (
        ("fisher", LikelihoodSettings(estimator="sampled", examples=6)),
        ("gram", StatisticSettings(examples=6)),
    ):
        statistic = STATISTICS[kind](settings)
        expected = statistic.finalize(measure(tagged, statistic, "train"))
        for task in without:
            task.check()
            computed = statistic.finalize(measure(task, statistic, "train"))
            assert all(torch.equal(value, computed[name]) for name, value in expected.items())
    empirical = STATISTICS["fisher"](LikelihoodSettings(estimator="empirical", examples=6))
    with pytest.raises(StatisticsError, match="has no label, which estimator 'empirical' needs"):
        measure(without[0], empirical, "train")
    with pytest.raises(ValueError, match="nothing is judged without tags"):
        make(examples, tags=None)


def test_bad_rows_are_named_by_file_and_line_or_column(make):
    with pytest.raises(TaskError, match=r"x\.conll, line 5, sentence 2: the tag 'B-LOC'"):
        make("an O\n\nran O\n# O\nbob B-LOC\n", name="x.conll").check()
    with pytest.raises(TaskError, match=r"r\.jsonl, columns 'words', 'tags', sentence 2: the tag 'B-LOC'"):
        make([{"words": ["an"], "tags": ["O"]}, {"words": ["an"], "tags": ["B-LOC"]}], name="r.jsonl").check()
    with pytest.raises(
        TaskError, match=r"r\.jsonl, columns 'words', 'tags', sentence 2 has no word that the tokenizer"
    ):
        make([{"words": ["an"], "tags": ["O"]}, {"words": [" "], "tags": ["O"]}], name="r.jsonl").check()

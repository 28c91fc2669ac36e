import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    ByT5Tokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from merging.errors import TaskError
from merging.statistics import STATISTICS, LikelihoodSettings, StatisticSettings, measure
from merging.tasks import Seq2SeqSettings, make_task

TEXTS = ["teh", "the", "recieve", "receive", "cat", "a dog", "x"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("t5")
    config = T5Config(
        vocab_size=384,
        d_model=16,
        d_ff=24,
        d_kv=8,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    torch.manual_seed(1)
    T5ForConditionalGeneration(config).save_pretrained(path)
    ByT5Tokenizer().save_pretrained(path)
    return str(path)


def rows(count=6, seed=0):
    g = np.random.default_rng(seed)
    return [{"source": str(g.choice(TEXTS)), "target": str(g.choice(TEXTS))} for _ in range(count)]


@pytest.fixture
def make(tmp_path, model_dir):
    def run(examples, splits=("validation",), **settings):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in examples))
        return make_task("spelling", Seq2SeqSettings(data=dict.fromkeys(splits, str(path)), **settings), model_dir)

    return run


def brute(model, source, target):
    """Log-probabilities of a target's tokens, one example at a time, by transformers' own shifting."""
    tokenizer = ByT5Tokenizer()
    labels = tokenizer(target, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(**tokenizer(source, return_tensors="pt"), labels=labels).logits[0]
    return logits.double().log_softmax(-1).gather(1, labels[0][:, None])[:, 0].tolist()


@pytest.mark.parametrize("batch_size", [1, 4])
def test_likelihoods_are_those_of_single_pairs_without_padding(make, batch_size):
    examples = rows()
    task = make(examples, batch_size=batch_size)
    task.check()
    model = task.load_model()
    predictions = task.predict(model, "validation", np.arange(6))
    order = np.random.default_rng(0).permutation(6)
    expected = [np.mean(brute(model, examples[i]["source"], examples[i]["target"])) for i in order]
    assert predictions.values == pytest.approx(expected, abs=1e-5)


def test_label_words_are_chosen_by_likelihood(make):
    examples = [{"text": text, "words": ["yes", "no"], "label": n % 2} for n, text in enumerate(TEXTS)]
    task = make(examples, template="is {{ text }} right?", choices="words")
    model = task.load_model()
    predictions = task.predict(model, "validation", np.arange(len(examples)))
    for value, i in zip(predictions.values, np.random.default_rng(0).permutation(len(examples)), strict=True):
        sums = [sum(brute(model, f"is {TEXTS[i]} right?", word)) for word in ("yes", "no")]
        assert value == float(np.argmax(sums) == i % 2)


@pytest.mark.parametrize("metric", ["exact_match", "chrf", "rouge_l"])
def test_what_is_generated_is_greedy(make, metric):
    examples = rows()
    model = make(examples).load_model()
    tokenizer = ByT5Tokenizer()
    own = []
    for row in examples:
        ids = model.generate(**tokenizer(row["source"], return_tensors="pt"), max_new_tokens=5, do_sample=False)
        own.append(tokenizer.decode(ids[0], skip_special_tokens=True))
    wished = [{**row, "target": answer or "none"} for row, answer in zip(examples, own, strict=True)]
    right = np.mean([bool(answer.strip()) for answer in own])
    task = make(wished, metric=metric, max_new_tokens=5)
    score = task.evaluate(model, "validation")
    assert score.value >= right - 1e-6 if metric != "rouge_l" else score.value >= 0
    assert score.is_mean == (metric != "chrf")


def test_statistics_of_encoder_and_decoder(make):
    task = make(rows(), splits=("train",))
    statistic = STATISTICS["fisher"](LikelihoodSettings(estimator="empirical", examples=4, batch_size=2))
    fisher = statistic.finalize(measure(task, statistic, "train"))
    model = task.load_model().double()
    expected = {}
    for batch in task.batches("train", 0, 4, 1):
        model.zero_grad()
        log_p = model(**batch.inputs).logits[0].log_softmax(-1)
        log_p.gather(1, batch.labels[0][:, None]).sum().backward()
        for name, value in model.named_parameters():
            expected[name] = expected.get(name, 0) + (0 if value.grad is None else value.grad**2 / 4)
    assert "decoder.block.1.layer.1.EncDecAttention.k.weight" in fisher
    for name, value in fisher.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-3, atol=1e-8)
    gram = STATISTICS["gram"](StatisticSettings(examples=4, batch_size=4))
    grams = gram.finalize(measure(task, gram, "train"))
    assert "decoder.block.1.layer.2.DenseReluDense.wo.weight" in grams
    assert task.representation(task.load_model(), next(task.batches("train", 0, 3, 3))).dim() == 3


LABEL_WORDS = {"prompt": "s", "choices": "c"}


@pytest.mark.parametrize(
    ("examples", "settings", "message"),
    [
        ([{"source": "a", "target": " "}], {}, "row 1: the target ' ' has no token"),
        ([{"s": "a", "c": ["x", "abcdefgh"], "label": 0}], {**LABEL_WORDS, "max_length": 4}, "'c'\\) has more tokens"),
        ([{"source": "a"}], {}, "has no column 'target'"),
        ([{"source": None, "target": "a"}], {}, "column 'source' holds no text"),
    ],
)
def test_bad_data_is_named(make, examples, settings, message):
    with pytest.raises(TaskError, match=message):
        make(examples, **settings).check()


def test_sources_and_targets_that_are_too_long_lose_their_end_and_that_is_said(make):
    long = [
        {"source": "abcdefgh", "target": "x"},
        {"source": "a", "target": "abcdefgh"},
        {"source": "a", "target": "x"},
    ]
    task = make(long, max_length=4)
    assert "2 examples are cut to the 4 tokens that are read (first: " in task.check()[0]
    assert "row 1)" in task.check()[0]
    model = task.load_model()
    values = task.predict(model, "validation", np.arange(3)).values
    short = make([{"source": "abc", "target": "x"}, {"source": "a", "target": "abc"}, {"source": "a", "target": "x"}])
    assert values == pytest.approx(short.predict(model, "validation", np.arange(3)).values, abs=1e-5)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """A BART of 16 learnt positions, whose tokenizer puts nothing around a text."""
    path = tmp_path_factory.mktemp("bart")
    inner = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "cat": 3, "dog": 4}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(path)
    sizes = {f"{side}_{part}": 8 if part == "ffn_dim" else 1 for side in ("encoder", "decoder") for part in BART_PARTS}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1}
    config = BartConfig(
        vocab_size=5, d_model=8, max_position_embeddings=16, forced_eos_token_id=None, **sizes, **tokens
    )
    BartForConditionalGeneration(config).save_pretrained(path)
    return str(path)


BART_PARTS = ("layers", "attention_heads", "ffn_dim")


def test_generation_stays_within_the_positions_that_a_decoder_has_learnt(make, learnt):
    task = make([{"source": "cat " * 40, "target": "dog"}], metric="exact_match", max_new_tokens=16)
    task.head = learnt
    task.check()
    assert task.evaluate(task.load_model(), "validation").examples == 1
    task = make([{"source": "cat", "target": "dog"}], metric="exact_match", max_new_tokens=17)
    task.head = learnt
    with pytest.raises(TaskError, match="`max_new_tokens` is 17, and the model has learnt 16 positions"):
        task.check()


def test_a_source_without_tokens_is_named(make, learnt):
    task = make([{"source": "cat", "target": "dog"}, {"source": "", "target": "dog"}])
    task.head = learnt
    with pytest.raises(TaskError, match=r"row 2: the source '' has no token \(column 'source'\)"):
        task.check()

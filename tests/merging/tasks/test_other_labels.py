"""Heads for several labels and for numbers: read, judged and differentiated as transformers does."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError
from scipy.stats import pearsonr
from sklearn.metrics import f1_score
from transformers import BertForSequenceClassification

from merging.errors import TaskError
from merging.optimization.losses import GradientModels
from merging.tasks import TextClassificationSettings
from merging.tasks.likelihood import divergences, entropies, surrogates

WORDS = "good bad great awful film book story plot very not really so".split()  # noqa: SIM905
SIZES = {"train": 12, "validation": 30, "test": 20}
MULTI, NUMBERS = "multi_label_classification", "regression"


@pytest.fixture(scope="module")
def heads(tmp_path_factory, tiny_pool, tokenizer) -> dict[str, str]:
    """A head for three labels at once, and one for a number; neither configuration names its classes."""
    place = tmp_path_factory.mktemp("heads")
    for name, outputs in ((MULTI, 3), (NUMBERS, 1)):
        torch.manual_seed(1)
        model = BertForSequenceClassification.from_pretrained(tiny_pool["base"], num_labels=outputs, problem_type=name)
        with torch.no_grad():
            model.classifier.weight.mul_(30)
        model.save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    return {name: str(place / name) for name in (MULTI, NUMBERS)}


def frame(problem: str, count: int, seed: int) -> pd.DataFrame:
    generator = np.random.default_rng(seed)
    texts = [" ".join(generator.choice(WORDS, size=generator.integers(2, 9))) for _ in range(count)]
    if problem == NUMBERS:
        return pd.DataFrame({"text": texts, "label": generator.normal(2, 3, count)})
    return pd.DataFrame({"text": texts, "label": [np.flatnonzero(generator.random(3) < 0.4) for _ in range(count)]})


@pytest.fixture
def make(make_text_task, heads):
    """A task with one of the heads, and its splits: `make(problem, **settings)`."""

    def run(problem, frames=None, **settings):
        frames = frames or {split: frame(problem, size, seed) for seed, (split, size) in enumerate(SIZES.items())}
        return make_text_task(frames, head=heads[problem], **settings)

    return run


def own(task, split="test"):
    """transformers' own logits and loss, all examples one by one without padding."""
    model = BertForSequenceClassification.from_pretrained(task.head).eval()
    examples = task.split(split)
    logits, losses = [], []
    with torch.no_grad():
        for text, label in zip(examples.texts[0], examples.labels, strict=True):
            inputs = task.tokenizer(text, return_tensors="pt")
            result = model(**inputs, labels=torch.tensor(label[None], dtype=torch.float32))
            logits.append(result.logits[0])
            losses.append(float(result.loss))
    return torch.stack(logits).double(), np.array(losses), examples.labels


def test_several_labels_are_judged_as_transformers_trains_them(make):
    task = make(MULTI)
    assert not [note for note in task.check() if "cut" not in note]
    score = task.evaluate(task.load_model(), "test")
    logits, losses, labels = own(task)
    assert (score.metric, score.is_mean, score.examples) == ("micro_f1", False, 20)
    assert score.value == pytest.approx(f1_score(labels, logits.numpy() > 0, average="micro"))
    assert score.loss == pytest.approx(losses.mean(), abs=1e-6)
    assert score.expected_error == pytest.approx(1 - np.exp(-losses).mean(), abs=1e-6)
    p = logits.sigmoid()
    assert score.entropy == pytest.approx(float(-(p * p.log() + (1 - p) * (1 - p).log()).sum(1).mean()), abs=1e-5)
    result = task.predict(task.load_model(), "test", np.arange(20))
    assert result.values == pytest.approx(np.exp(-losses)[task.order("test")], abs=1e-6)  # of an F1, the surrogate


def test_a_regression_is_judged_as_transformers_trains_it(make):
    task = make(NUMBERS)
    score = task.evaluate(task.load_model(), "test")
    logits, losses, labels = own(task)
    assert (score.metric, score.is_mean) == ("pearson", False)
    assert score.value == pytest.approx(pearsonr(labels[:, 0], logits[:, 0])[0], abs=1e-3)
    assert score.loss == pytest.approx(losses.mean(), rel=1e-5)
    spread = task.split("validation").labels.std()
    assert score.expected_error == pytest.approx(1 - np.exp(-losses / spread**2).mean(), abs=1e-6)
    assert np.isnan(score.entropy)


def test_the_head_says_what_it_is_and_the_setting_goes_before(make, heads, tmp_path):
    config = json.loads((Path(heads[NUMBERS]) / "config.json").read_text())
    assert config["problem_type"] == NUMBERS
    flags = {split: frame(NUMBERS, size, 0).assign(label=[0, 1] * (size // 2)) for split, size in SIZES.items()}
    yes_or_no = make(NUMBERS, flags, problem_type=MULTI)
    yes_or_no.check()
    assert yes_or_no.evaluate(yes_or_no.load_model(), "test").metric == "micro_f1"
    assert yes_or_no.likelihood(yes_or_no.load_model()) == "bernoulli"
    with pytest.raises(TaskError, match="has one output, which is no choice among classes"):
        make(NUMBERS, flags, problem_type="single_label_classification").check()


@pytest.mark.parametrize(
    ("problem", "metric", "fits"),
    [(MULTI, "accuracy", "micro_f1"), (MULTI, "pearson", "micro_f1"), (NUMBERS, "macro_f1", "pearson")],
)
def test_a_metric_of_another_kind_of_label_is_refused(make, problem, metric, fits):
    with pytest.raises(TaskError, match=rf"`metric: {metric}` does not fit .*: name one of {fits}"):
        make(problem, metric=metric).check()


def test_settings_know_their_metric():
    settings = {"data": {"test": "a.csv"}}
    assert TextClassificationSettings(**settings).judged_by == "accuracy"
    assert TextClassificationSettings(**settings, problem_type=NUMBERS).judged_by == "pearson"
    with pytest.raises(ValidationError, match="Did you mean 'pearson'"):
        TextClassificationSettings(**settings, metric="person")
    with pytest.raises(ValidationError, match="each another one"):
        TextClassificationSettings(**settings, label=["a", "text"])


@pytest.mark.parametrize(
    "values",
    [
        [["LABEL_0", "LABEL_2"], []],
        [[0, 2], []],
        [[True, False, True], [False] * 3],
        [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]],
    ],
    ids=["names", "positions", "flags", "floats"],
)
@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_forms_of_several_labels_agree(make, tmp_path, values, suffix):
    data = pd.DataFrame({"text": ["good", "bad"], "label": values})
    task = make(MULTI, {"test": data})
    if suffix == "jsonl":
        task.settings.data["test"] = str(tmp_path / "x.jsonl")
        data.to_json(tmp_path / "x.jsonl", orient="records", lines=True)
    assert task.split("test").labels.tolist() == [[1, 0, 1], [0, 0, 0]]
    (batch,) = task.batches("test", 0, 2, 2)
    assert batch.labels.dtype == torch.float32
    assert not batch.is_sequential


def test_a_column_for_each_label(make, tmp_path):
    data = pd.DataFrame({"text": ["good", "bad"], "x": [1, 0], "y": [True, False], "z": [0.0, 1.0]})
    task = make(MULTI, {"test": data}, label=["x", "y", "z"])
    assert task.split("test").labels.tolist() == [[1, 1, 0], [0, 0, 1]]
    by_name = make(MULTI, {"test": data}, label=["x", "y", "z"], labels=["z", "y", "x"])
    assert by_name.split("test").labels.tolist() == [[0, 1, 1], [1, 0, 0]]
    file = tmp_path / "x.csv"
    data.to_csv(file, index=False)
    task.settings.data["validation"] = str(file)
    assert (task.split("validation").labels == task.split("test").labels).all()


@pytest.mark.parametrize(
    ("problem", "values", "message"),
    [
        (MULTI, [[0, 1], [7]], r"\[7\] in row 2: 7 is none of the head's 3 classes"),
        (MULTI, [["LABEL_1"], ["angry"]], "'angry' is none of"),
        (MULTI, [[0, 1, 0], [1]], "a class is named twice.*true and false"),
        (MULTI, [[True, False], [True, True]], "row 1: the head has 3 outputs .and 1 more"),
        (MULTI, [[0.5, 0.0, 0.0], [1.0, 0.0, 0.0]], "0 or 1, true or false is needed"),
        (MULTI, ["LABEL_0", "LABEL_1"], "a list is needed"),
        (MULTI, [[0, 1], None], "None in row 2: a list is needed"),
        (MULTI, [[0, 1], [1, 0]], r"all 2 examples have the labels \[1.0, 1.0, 0.0\]: nothing can be measured"),
        (NUMBERS, ["high", "low"], "'high' in row 1: a finite number is needed"),
        (NUMBERS, [1.0, None], "nan in row 2: a finite number"),
        (NUMBERS, [1.0, float("inf")], "inf in row 2"),
        (NUMBERS, [True, False], "a finite number is needed"),
        (NUMBERS, [2.5, 2.5], r"all 2 examples have the labels \[2.5\]"),
    ],
)
def test_labels_that_do_not_fit_are_refused(make, problem, values, message):
    data = pd.DataFrame({"text": ["good", "bad"], "label": pd.Series(values)})
    with pytest.raises(TaskError, match=rf"task 'reviews': test: .*test\.parquet: .*{message}"):
        make(problem, {"test": data}).split("test")


def test_columns_must_be_as_many_as_outputs(make):
    with pytest.raises(TaskError, match="names 2 columns, the head has 3 outputs"):
        make(MULTI, {"test": pd.DataFrame({"text": ["a"], "x": [1], "y": [0]})}, label=["x", "y"]).split("test")


def test_labels_are_part_of_the_data(make):
    task = make(NUMBERS)
    before = task.data_fingerprint("train")
    other = make(NUMBERS, {split: frame(NUMBERS, size, 5) for split, size in SIZES.items()})
    assert other.data_fingerprint("train") != before
    assert make(NUMBERS).data_fingerprint("train") == before


@pytest.mark.parametrize("problem", [MULTI, NUMBERS])
def test_unlabelled_texts_serve_as_calibration_data(make, problem):
    task = make(problem, {"train": frame(problem, 12, 0)[["text"]]}, label=None)
    task.check()
    (batch,) = task.batches("train", 0, 4, 4)
    assert batch.labels.isnan().all()
    assert task.data_fingerprint("train")


def test_pairs_of_texts_have_numbers(make):
    data = {s: frame(NUMBERS, size, 0).assign(other="so good") for s, size in SIZES.items()}
    task = make(NUMBERS, data, text_pair="other")
    task.check()
    (batch,) = task.batches("test", 0, 4, 4)
    assert batch.inputs["token_type_ids"].any()
    assert task.evaluate(task.load_model(), "test").examples == 20


def test_divergences_are_of_the_distributions():
    generator = torch.Generator().manual_seed(0)
    z, w = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    expected = {
        "categorical": torch.distributions.kl_divergence(
            torch.distributions.Categorical(logits=w), torch.distributions.Categorical(logits=z)
        ),
        "bernoulli": torch.distributions.kl_divergence(
            torch.distributions.Bernoulli(logits=w), torch.distributions.Bernoulli(logits=z)
        ).sum(1),
        "gaussian": torch.distributions.kl_divergence(
            torch.distributions.Normal(w, 1.0), torch.distributions.Normal(z, 1.0)
        ).sum(1),
    }
    for likelihood, value in expected.items():
        torch.testing.assert_close(divergences(likelihood, z, w), value)
        assert divergences(likelihood, w, w).abs().max() < 1e-12
    torch.testing.assert_close(entropies("categorical", z), torch.distributions.Categorical(logits=z).entropy())
    assert float(surrogates("categorical", z, torch.zeros(5, dtype=torch.int64))[0]) == pytest.approx(
        float(z.softmax(1)[0, 0])
    )


@pytest.mark.parametrize("loss", ["cross_entropy", "expected_error", "distil"])
@pytest.mark.parametrize("problem", [MULTI, NUMBERS])
def test_losses_are_what_the_task_is_judged_by(make, tiny_pool, heads, problem, loss):
    """At the member itself: the same numbers as of the evaluation, and none to distil."""
    from merging.checkpoints.pool import Pool

    task = make(problem)
    pool = Pool.open(str(tiny_pool["base"]), {"x": heads[problem]})
    live = GradientModels(pool, [task], {"reviews": "x"}, loss, torch.device("cpu"))
    for name, weight in live.weights.items():
        weight.copy_(pool.member_weight("x", name))
    batches = list(task.batches("validation", 0, 30, 30))
    result, gradients = live.gradients(batches)
    score = task.evaluate(task.load_model(), "validation")
    expected = {"cross_entropy": score.loss, "expected_error": score.expected_error, "distil": 0.0}[loss]
    assert result == pytest.approx(expected, abs=1e-5)
    assert gradients
    largest = max(float(g.abs().max()) for g in gradients.values())
    assert (largest > 1e-4) == (loss != "distil")

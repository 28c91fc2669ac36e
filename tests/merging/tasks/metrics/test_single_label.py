import numpy as np
import pytest
from sklearn import metrics as sk

from merging.errors import TaskError
from merging.tasks.metrics import METRICS
from merging.tasks.metrics.single_label import ClassCounts, resample


def measure(name, labels, probabilities, seed=0):
    return METRICS[name].measure(labels, probabilities, seed)


BOOTSTRAPPED = ["macro_f1", "micro_f1", "weighted_f1", "balanced_accuracy", "matthews"]


@pytest.fixture
def answers() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    labels = generator.choice(4, size=600, p=[0.6, 0.25, 0.1, 0.05])
    logits = generator.normal(size=(600, 4)) + 1.5 * np.eye(4)[labels]
    return labels, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("accuracy", lambda y, p: sk.accuracy_score(y, p.argmax(1))),
        ("macro_f1", lambda y, p: sk.f1_score(y, p.argmax(1), average="macro")),
        ("micro_f1", lambda y, p: sk.f1_score(y, p.argmax(1), average="micro")),
        ("weighted_f1", lambda y, p: sk.f1_score(y, p.argmax(1), average="weighted")),
        ("balanced_accuracy", lambda y, p: sk.balanced_accuracy_score(y, p.argmax(1))),
        ("matthews", lambda y, p: sk.matthews_corrcoef(y, p.argmax(1))),
        ("neg_log_loss", lambda y, p: -sk.log_loss(y, p)),
    ],
)
def test_equals_scikit_learn(name, expected, answers):
    value, _ = measure(name, *answers)
    assert value == pytest.approx(expected(*answers), abs=1e-12)


def test_every_metric_is_compared():
    assert set(METRICS) == {"accuracy", "neg_log_loss", *BOOTSTRAPPED}


def test_standard_error_of_accuracy_is_exact(answers):
    value, error = measure("accuracy", *answers)
    assert error == pytest.approx(np.sqrt(value * (1 - value) / 600), rel=1e-12)


@pytest.mark.parametrize("absent", [None, 3])
@pytest.mark.parametrize("name", BOOTSTRAPPED)
def test_resampled_metric_is_scikit_learns(name, absent, answers):
    labels, probabilities = answers
    if absent is not None:  # neither among the labels nor among the predictions of this half
        kept = (labels != absent) & (probabilities.argmax(1) != absent)
        labels, probabilities = labels[kept], probabilities[kept]
    predictions = probabilities.argmax(1)
    eye = np.eye(4)
    counts = ClassCounts(
        (eye[labels] * eye[predictions]).sum(0, keepdims=True),
        eye[labels].sum(0, keepdims=True),
        eye[predictions].sum(0, keepdims=True),
    )
    value, _ = measure(name, labels, probabilities)
    assert METRICS[name].of_counts(counts)[0] == pytest.approx(value, abs=1e-12)


def test_resampled_counts_add_up(answers):
    labels, probabilities = answers
    counts = resample(labels, probabilities.argmax(1), 4, 50, seed=0)
    assert counts.right.shape == (50, 4)
    assert (counts.labelled.sum(1) == 600).all()
    assert (counts.predicted.sum(1) == 600).all()
    assert (counts.right <= np.minimum(counts.labelled, counts.predicted)).all()
    assert counts.labelled.mean(0) == pytest.approx(np.bincount(labels), rel=0.1)


def test_bootstrap_agrees_with_the_formula(answers):
    """Micro-F1 of one label an example is accuracy, whose standard error is known."""
    _, exact = measure("accuracy", *answers)
    _, resampled = measure("micro_f1", *answers)
    assert resampled == pytest.approx(exact, rel=0.2)


def test_bootstrap_agrees_with_resampling_examples(answers):
    labels, probabilities = answers
    predictions = probabilities.argmax(1)
    generator = np.random.default_rng(1)
    values = []
    for _ in range(100):
        rows = generator.integers(0, 600, size=600)
        values.append(sk.balanced_accuracy_score(labels[rows], predictions[rows]))
    _, error = measure("balanced_accuracy", labels, probabilities)
    assert error == pytest.approx(np.std(values), rel=0.3)


def test_bootstrap_is_repeatable(answers):
    assert measure("macro_f1", *answers) == measure("macro_f1", *answers)
    assert measure("macro_f1", *answers, seed=1)[1] != measure("macro_f1", *answers, seed=2)[1]


def test_one_class_predicted_gives_a_number():
    value, error = measure("matthews", np.array([0, 1, 1]), np.array([[0.9, 0.1]] * 3))
    assert (value, error) == (0.0, 0.0)


def test_unknown_metric_suggests():
    with pytest.raises(TaskError, match="Did you mean 'accuracy'"):
        measure("acuracy", np.array([0]), np.array([[1.0]]))


@pytest.mark.parametrize("name", BOOTSTRAPPED)
def test_influences_are_the_jackknifes(name, answers):
    """Leaving examples out one by one gives the same differences of two models, and their standard error."""
    labels, one = answers
    other = np.random.default_rng(1).permutation(one)

    def jackknife(probabilities):
        every = np.arange(len(labels))
        without = [measure(name, labels[every != place], probabilities[every != place])[0] for place in every]
        return measure(name, labels, probabilities)[0] + (len(labels) - 1) * (np.mean(without) - np.array(without))

    own, others = (METRICS[name].influences(labels, each) for each in (one, other))
    assert own.mean() == pytest.approx(measure(name, *answers)[0], abs=1e-6)
    gaps, expected = own - others, jackknife(one) - jackknife(other)
    assert np.corrcoef(gaps, expected)[0, 1] > 0.999
    assert gaps.std() == pytest.approx(expected.std(), rel=0.03)
    assert own.std() / 600**0.5 == pytest.approx(measure(name, *answers)[1], rel=0.15)


def test_one_class_for_all_contributes_nothing(answers):
    labels, _ = answers
    assert (METRICS["matthews"].influences(labels, np.tile([0.1, 0.2, 0.6, 0.1], (600, 1))) == 0).all()

"""Metrics of several labels and of numbers: scikit-learn's and SciPy's values, and standard errors that resampling confirms."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from merging.tasks.metrics import MULTI_LABEL, REGRESSION


@pytest.fixture
def several() -> tuple[np.ndarray, np.ndarray]:
    """Labels and logits of four labels, one of which no example has."""
    generator = np.random.default_rng(0)
    labels = (generator.random((400, 4)) < [0.6, 0.3, 0.1, 0.0]).astype(float)
    return labels, generator.normal(size=(400, 4)) + 2 * labels - 1


@pytest.fixture
def numbers() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(1)
    labels = generator.integers(0, 6, size=(300, 2)).astype(float)  # with ties
    return labels, 3 * labels + generator.normal(size=(300, 2)) * [2, 9]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("micro_f1", lambda y, z: sk.f1_score(y, z > 0, average="micro")),
        ("macro_f1", lambda y, z: sk.f1_score(y, z > 0, average="macro", zero_division=0.0)),
        ("samples_f1", lambda y, z: sk.f1_score(y, z > 0, average="samples", zero_division=0.0)),
        ("subset_accuracy", lambda y, z: sk.accuracy_score(y, z > 0)),
        ("hamming_accuracy", lambda y, z: 1 - sk.hamming_loss(y, z > 0)),
        (
            "neg_log_loss",
            lambda y, z: -np.mean([sk.log_loss(y[:, c], 1 / (1 + np.exp(-z[:, c])), labels=[0, 1]) for c in range(4)]),
        ),
    ],
)
def test_several_labels_equal_scikit_learn(name, expected, several):
    assert MULTI_LABEL[name].measure(*several, 0)[0] == pytest.approx(expected(*several), abs=1e-12)


def test_nearly_certain_labels_have_a_finite_log_loss():
    labels, logits = np.array([[1.0, 0.0]]), np.array([[60.0, 60.0]])
    assert MULTI_LABEL["neg_log_loss"].measure(labels, logits, 0)[0] == pytest.approx(-30.0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pearson", lambda y, z: np.mean([stats.pearsonr(y[:, c], z[:, c])[0] for c in range(2)])),
        ("spearman", lambda y, z: np.mean([stats.spearmanr(y[:, c], z[:, c])[0] for c in range(2)])),
        ("neg_squared_error", lambda y, z: -sk.mean_squared_error(y, z)),
        ("neg_absolute_error", lambda y, z: -sk.mean_absolute_error(y, z)),
    ],
)
def test_numbers_equal_scipy_and_scikit_learn(name, expected, numbers):
    assert REGRESSION[name].measure(*numbers, 0)[0] == pytest.approx(expected(*numbers), abs=1e-12)


def test_every_metric_is_compared():
    assert set(MULTI_LABEL) == {
        "micro_f1", "macro_f1", "samples_f1", "subset_accuracy", "hamming_accuracy", "neg_log_loss",
    }  # fmt: skip
    assert set(REGRESSION) == {"pearson", "spearman", "neg_squared_error", "neg_absolute_error"}


@pytest.mark.parametrize(("registry", "name"), [(MULTI_LABEL, "micro_f1"), (MULTI_LABEL, "macro_f1")])
def test_bootstrap_of_f1_agrees_with_resampling_examples(registry, name, several):
    labels, logits = several
    generator = np.random.default_rng(1)
    rows = [generator.integers(0, 400, size=400) for _ in range(200)]
    values = [registry[name].measure(labels[own], logits[own], 0)[0] for own in rows]
    assert registry[name].measure(labels, logits, 0)[1] == pytest.approx(np.std(values), rel=0.2)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_bootstrap_of_correlations_agrees_with_resampling_examples(name, numbers):
    labels, outputs = numbers
    generator = np.random.default_rng(1)
    rows = [generator.integers(0, 300, size=300) for _ in range(200)]
    values = [REGRESSION[name].measure(labels[own], outputs[own], 0)[0] for own in rows]
    assert REGRESSION[name].measure(labels, outputs, 0)[1] == pytest.approx(np.std(values), rel=0.2)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_a_constant_correlates_with_nothing(name):
    assert REGRESSION[name].measure(np.arange(4.0)[:, None], np.ones((4, 1)), 0) == (0.0, 0.0)
    assert REGRESSION[name].measure(np.ones((1, 1)), np.ones((1, 1)), 0)[0] == 0.0


def test_the_standard_error_survives_a_large_mean(numbers):
    """Moments of predictions far from zero would cancel."""
    labels, outputs = numbers
    near, far = (REGRESSION["pearson"].measure(labels, outputs + shift, 0) for shift in (0, 1e7))
    assert far == pytest.approx(near, rel=1e-4)


@pytest.mark.parametrize("name", ["micro_f1", "macro_f1", "pearson", "spearman"])
def test_influences_are_the_jackknifes(name, several, numbers):
    """Leaving examples out one by one gives the same contributions."""
    metric, (labels, outputs) = (MULTI_LABEL[name], several) if name in MULTI_LABEL else (REGRESSION[name], numbers)
    every = np.arange(len(labels))
    without = np.array([metric.measure(labels[every != place], outputs[every != place], 0)[0] for place in every])
    value, error = metric.measure(labels, outputs, 0)
    own = metric.influences(labels, outputs)
    assert own.mean() == pytest.approx(value, abs=1e-5)
    assert np.corrcoef(own, -without)[0, 1] > 0.99  # leaving one out changes Spearman's ranks, too
    assert own.std() / len(own) ** 0.5 == pytest.approx(error, rel=0.2)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_a_constant_contributes_nothing(name, numbers):
    labels, _ = numbers
    assert (REGRESSION[name].influences(labels, np.full((300, 2), 0.1)) == 0).all()

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from merging.errors import TaskError
from merging.tasks import CustomSettings, make_task
from merging.tasks.classification import judged, scored
from merging.tasks.predictions import Predictions
from merging.tasks.task import score_of

LABELS = np.array([0, 1, 1])
PROBABILITIES = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.5, 0.5, 0.0]])


def predictions(metric="accuracy"):
    with np.errstate(divide="ignore"):
        return judged(metric, LABELS, torch.from_numpy(np.log(PROBABILITIES)), seconds=0.5)


def test_one_number_per_example():
    assert predictions("accuracy").values.tolist() == [1.0, 0.0, 0.0]
    assert predictions("neg_log_loss").values == pytest.approx(np.log([0.7, 0.1, 0.5]))
    assert predictions().surrogates == pytest.approx([0.7, 0.1, 0.5])
    assert predictions().losses == pytest.approx(-np.log([0.7, 0.1, 0.5]))
    assert predictions("macro_f1").values == pytest.approx(predictions().surrogates)


def test_the_entropy_counts_an_impossible_class_as_nothing():
    each = [-sum(p * np.log(p) for p in row if p) for row in PROBABILITIES]
    assert predictions().entropies == pytest.approx(each)


def test_parts_joined_are_the_whole():
    whole = predictions()
    joined = Predictions.join([whole.take(np.array([0])), whole.take(np.array([1, 2]))])
    for name in ("values", "surrogates", "losses", "entropies"):
        assert (getattr(joined, name) == getattr(whole, name)).all()
    result, expected = (vars(scored("macro_f1", each)) for each in (joined, replace(whole, seconds=0.0)))
    assert result == pytest.approx(expected, nan_ok=True)
    assert Predictions.join([whole, whole]).seconds == 1.0
    assert Predictions.join([whole, Predictions(np.zeros(2))]).losses is None


def test_a_score_is_the_mean_unless_a_metric_of_all_predictions_says_otherwise():
    score = score_of(predictions(), "accuracy")
    assert (score.value, score.examples, score.is_mean) == (pytest.approx(1 / 3), 3, True)
    assert score.standard_error == pytest.approx(np.sqrt(2 / 9 / 3))
    assert score.expected_error == pytest.approx(1 - (0.7 + 0.1 + 0.5) / 3)
    other = score_of(Predictions(np.array([1.0, 2.0])), "length", measured=(7.0, 0.5))
    assert (other.value, other.standard_error, other.is_mean) == (7.0, 0.5, False)
    assert np.isnan([other.loss, other.expected_error, other.entropy]).all()


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_steps_add_up_to_the_evaluation(make_text_task, frames, metric):
    task = make_text_task(frames, metric=metric)
    model = task.load_model()
    parts = [task.predict(model, "validation", np.arange(first, min(first + 16, 50))) for first in range(0, 50, 16)]
    stepwise, whole = task.score(Predictions.join(parts)), task.evaluate(model, "validation")
    assert (stepwise.value, stepwise.examples) == (whole.value, 50)
    assert (stepwise.loss, stepwise.entropy) == pytest.approx((whole.loss, whole.entropy), abs=1e-6)
    # any subset by position in the fixed order, in the order asked for
    places = np.array([40, 3, 17, 5])
    some = task.predict(model, "validation", places)
    everything = Predictions.join(parts).take(places)
    assert some.values == pytest.approx(everything.values, abs=1e-5)
    assert some.losses == pytest.approx(everything.losses, abs=1e-5)
    if metric == "macro_f1":
        labels, answers = some.payload["labels"], some.payload["outputs"].argmax(1)
        expected = f1_score(labels, answers, average="macro", zero_division=0.0)
        assert task.score(some).value == pytest.approx(expected)


def test_a_custom_task_is_measured_whole(head):
    task = make_task("own", CustomSettings(evaluator="math:sqrt"), head)
    assert not task.has_predictions
    with pytest.raises(TaskError, match="'own' .custom. gives no predictions of single examples"):
        task.predict(None, "validation", np.arange(3))

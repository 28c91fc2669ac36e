import math

import numpy as np
import pytest
from sklearn.metrics import f1_score

from merging.errors import TaskError
from merging.tasks import CustomSettings, make_task
from merging.tasks.predictions import Outcomes


@pytest.fixture
def outcomes():
    probabilities = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.5, 0.5, 0.0]])
    with np.errstate(divide="ignore"):
        return Outcomes(np.array([0, 1, 1]), np.log(probabilities), 0.5)


def test_one_number_an_example(outcomes):
    assert outcomes.values("accuracy").tolist() == [1.0, 0.0, 0.0]
    assert outcomes.values("neg_log_loss") == pytest.approx(np.log([0.7, 0.1, 0.5]))
    assert outcomes.chosen == pytest.approx([0.7, 0.1, 0.5])
    assert outcomes.values("macro_f1") == pytest.approx(outcomes.chosen)


def test_the_entropy_counts_an_impossible_class_as_nothing(outcomes):
    each = [-sum(p * math.log(p) for p in row if p) for row in ([0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.5, 0.5])]
    assert outcomes.entropy == pytest.approx(sum(each) / 3)


def test_parts_joined_are_the_whole(outcomes):
    joined = Outcomes.join([outcomes.take(np.array([0])), outcomes.take(np.array([1, 2]))])
    assert (joined.labels == outcomes.labels).all()
    assert (joined.log_probabilities == outcomes.log_probabilities).all()
    assert Outcomes.join([outcomes, outcomes]).seconds == 1.0


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_steps_add_up_to_the_evaluation(make_text_task, frames, metric):
    task = make_text_task(frames, metric=metric)
    model = task.load_model()
    parts = [task.outcomes(model, "validation", np.arange(first, min(first + 16, 50))) for first in range(0, 50, 16)]
    stepwise, whole = task.score(Outcomes.join(parts)), task.evaluate(model, "validation")
    assert (stepwise.value, stepwise.examples) == (whole.value, 50)
    assert (stepwise.loss, stepwise.entropy) == pytest.approx((whole.loss, whole.entropy), abs=1e-6)
    # any subset by position in the fixed order, in the order asked for
    chosen = np.array([40, 3, 17, 5])
    some = task.outcomes(model, "validation", chosen)
    everything = Outcomes.join(parts).take(chosen)
    assert (some.labels == everything.labels).all()
    assert some.log_probabilities == pytest.approx(everything.log_probabilities, abs=1e-5)
    if metric == "macro_f1":
        expected = f1_score(some.labels, some.log_probabilities.argmax(1), average="macro", zero_division=0.0)
        assert task.score(some).value == pytest.approx(expected)


def test_a_custom_task_is_measured_whole(head):
    task = make_task("own", CustomSettings(evaluator="math:sqrt"), head)
    assert not task.has_outcomes
    with pytest.raises(TaskError, match="'own' .custom. gives no outcomes of single examples"):
        task.outcomes(None, "validation", np.arange(3))

import numpy as np
import pytest

from flows.report.test_answers import KeptPredictions
from merging.evaluation.steps import Trace
from merging.recipe import Recipe
from merging.tasks.metrics import METRICS
from merging.tasks.task import Score
from search.candidate import Candidate, Measurement, Outcome


def outcome(metrics):
    values = {task: np.linspace(0, 1, 5, dtype=np.float32) for task in metrics}
    scores = {task: Score(0.5, 0.1, 5, metric, is_mean=METRICS[metric].is_mean) for task, metric in metrics.items()}
    influences = {task: own for task, own in values.items() if task != "together"}
    result = Measurement(scores, trace=Trace([scores], values, values, influences=influences))
    return Outcome(Candidate(Recipe("base", {}), "test", "final"), result)


def test_what_examples_contribute_is_kept_and_nothing_else(tmp_path):
    kept = KeptPredictions(str(tmp_path))
    given = outcome({"right": "accuracy", "by counts": "macro_f1", "together": "macro_f1"})
    assert kept.learn(given) is given
    result = kept.read(given.candidate.recipe.identity)
    assert set(result) == {"right", "by counts"}
    assert result["right"] == pytest.approx([0, 0.25, 0.5, 0.75, 1])


def test_what_was_never_kept_is_empty(tmp_path):
    kept = KeptPredictions(str(tmp_path / "nothing"))
    failed = Outcome(Candidate(Recipe("base", {}), "test", "final"), error=ValueError("no"))
    assert kept.learn(failed) is failed
    assert kept.read(failed.candidate.recipe.identity) == {}


def test_every_example_is_asked_for():
    plan = KeptPredictions("anywhere").plan(Candidate(Recipe("base", {}), "test", "final"))
    (step,) = plan.steps({"one": 3, "two": 2})
    assert {task: list(places) for task, places in step.items()} == {"one": [0, 1, 2], "two": [0, 1]}

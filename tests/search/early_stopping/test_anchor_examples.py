import numpy as np
import pytest

from merging.evaluation.steps import Trace
from merging.recipe import Recipe
from merging.tasks.metrics import METRICS
from merging.tasks.task import Score
from search.candidate import ANCHORS, Candidate, Measurement, Outcome
from search.early_stopping.anchor_examples import Anchors, Traces, choose, make_anchors

SIZE, DRAWS = 400, 150


@pytest.fixture(scope="module")
def world():
    """What four references and one candidate say of examples of all difficulties: p_y [N, 4] and right or wrong [N]."""
    generator = np.random.default_rng(2)
    difficulty = generator.normal(size=SIZE)
    references = 1 / (1 + np.exp(2 * difficulty[:, None] - generator.normal(0.5, 0.5, size=(SIZE, 4))))
    own = 1 / (1 + np.exp(2 * difficulty - generator.normal(0.8, 0.5, size=SIZE)))
    return references, (own > 0.5).astype(float)


@pytest.mark.parametrize("count", [25, 80])
def test_estimates_are_right_on_average_and_know_their_error(world, count):
    references, right = world
    drawn = [choose(references, count, seed) for seed in range(DRAWS)]
    result = np.array([anchors.estimate(right[anchors.positions]) for anchors in drawn])
    errors = result[:, 0] - right.mean()
    assert abs(errors.mean()) < 0.006
    assert 0.9 < np.sqrt((result[:, 1] ** 2).mean()) / errors.std() < 1.6
    at_random = [np.random.default_rng(s).choice(right, count, replace=False).mean() for s in range(DRAWS)]
    assert errors.std() < 0.6 * np.std(at_random)


def test_examples_that_tell_candidates_apart_are_drawn_more_often():
    references = np.full((200, 3), 0.99)
    references[:50, 0] = 0.01  # on these the references disagree
    anchors = choose(references, 40, 0)
    assert (anchors.positions < 50).sum() > 20
    assert len(set(anchors.positions.tolist())) == 40
    assert (1 / anchors.chances).sum() == pytest.approx(200, rel=0.1)


def test_all_examples_give_the_score_itself(world):
    references, right = world
    anchors = choose(references, 1000, 0)
    assert anchors.estimate(right[anchors.positions]) == (right.mean(), 0.0)


def trace_of(chosen, metric="accuracy"):
    chosen = np.asarray(chosen, np.float32)
    right = (chosen > 0.5).astype(np.float32)
    score = Score(
        float(right.mean()), 0.1, len(chosen), metric, 0.5, 1 - float(chosen.mean()), is_mean=METRICS[metric].is_mean
    )
    losses = -np.log(np.maximum(chosen, np.finfo(np.float32).tiny))
    return Trace([{"x": score}], {"x": right}, {"x": chosen}, {"x": losses})


def test_a_planner_measures_anchors_and_answers_with_estimates(world, tmp_path):
    references, _ = world
    anchors = make_anchors([trace_of(column) for column in references.T], 50, seed=3)
    anchors.write(str(tmp_path / "anchors.safetensors"))
    anchors = Anchors.read(str(tmp_path / "anchors.safetensors"))
    candidate = Candidate(Recipe("average", {"a": 1.0}), ANCHORS)
    positions = anchors.plan(candidate).positions["x"]
    assert anchors.plan(Candidate(candidate.recipe, "validation")) is None
    whole, some = trace_of(references[:, 0]), trace_of(references[positions, 0])
    outcome = Outcome(candidate, Measurement(some.scores[0], trace=some))
    score = anchors.learn(outcome).measurement.scores["x"]
    assert score.examples == 50
    assert score.value == pytest.approx(whole.scores[0]["x"].value, abs=0.05)
    # a reference's own p_y lies in the regression, so that its mean is known up to the ridge
    assert score.expected_error == pytest.approx(whole.scores[0]["x"].expected_error, abs=0.02)
    assert 0 < score.standard_error < some.scores[0]["x"].standard_error


def test_a_metric_that_is_no_mean_keeps_its_score_over_equal_chances(world):
    references, _ = world
    anchors = make_anchors([trace_of(column, "macro_f1") for column in references.T], 50, seed=0)
    assert np.ptp(anchors.tasks["x"].chances) == 0
    some = trace_of(references[anchors.tasks["x"].positions, 0], "macro_f1")
    candidate = Candidate(Recipe("average", {"a": 1.0}), ANCHORS)
    learnt = anchors.learn(Outcome(candidate, Measurement(some.scores[0], trace=some)))
    assert learnt.measurement.scores["x"].value == some.scores[0]["x"].value


def test_traces_are_kept_by_candidate():
    traces, recipe = Traces(), Recipe("base", {})
    outcome = Outcome(Candidate(recipe), Measurement({}, trace=trace_of([0.2, 0.9])))
    assert traces.plan(outcome.candidate).gate is None
    assert traces.learn(outcome) is outcome
    assert traces.learn(Outcome(Candidate(recipe), error=ValueError("no"))).error is not None
    assert list(traces.by_recipe) == [recipe.identity]

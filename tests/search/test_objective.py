import math
from dataclasses import replace

import pytest

from merging.errors import SettingsError
from merging.tasks.task import Score
from search.ledger.row import Row
from search.objective import EXPECTED, OBJECTIVES, best, make_objective, own_scores, pareto

VALUES = {"x": 0.9, "y": 0.5, "z": 0.7}
SCORES = {task: Score(value, 0.01, 100, "accuracy", 0.5, 0.8 - value / 2) for task, value in VALUES.items()}
OWN = {"x": 1.0, "y": 0.8, "z": 0.7 / 1.1}
WEIGHTS = {"x": 3.0, "z": 1.0}


def value(name, scores=SCORES):
    return make_objective(name, list(VALUES), OWN, OWN, WEIGHTS)(scores)[name]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mean", 0.7),
        ("worst", 0.5),
        ("z", 0.7),
        ("normalized", (0.9 + 0.625 + 1.1) / 3),
        ("weighted", (3 * 0.9 + 0.7) / 4),
        ("expected_mean", 0.2 + 0.35),
        ("expected_worst", 0.2 + 0.25),
        ("expected_z", 0.2 + 0.35),
        ("expected_weighted", 0.2 + (3 * 0.9 + 0.7) / 8),
        ("expected_normalized", (0.65 / 1 + 0.45 / 0.8 + 0.55 / 0.7 * 1.1) / 3),
    ],
)
def test_objectives_by_name(name, expected):
    assert value(name) == pytest.approx(expected)


def test_a_task_is_called_what_it_is_called():
    assert make_objective("expected_mean", ["expected_mean"])({"expected_mean": SCORES["x"]}) == {"expected_mean": 0.9}


def test_several_objectives_keep_their_order():
    objective = make_objective(["worst", "expected_mean", "x"], list(VALUES))
    assert objective.names == ("worst", "expected_mean", "x")
    assert list(objective(SCORES).items()) == [("worst", 0.5), ("expected_mean", pytest.approx(0.55)), ("x", 0.9)]


def test_unseen_tasks_count_where_they_are_asked_for():
    def of(name):
        return make_objective(name, list(VALUES), {"x": 1.0, "y": 0.8}, None, WEIGHTS, None, ["z"])(SCORES)[name]

    assert of("mean") == pytest.approx(0.7)
    assert of("worst") == 0.5
    assert of("normalized") == pytest.approx((0.9 + 0.625) / 2)
    assert (of("unseen"), of("z")) == (0.7, 0.7)
    assert of("weighted") == pytest.approx((3 * 0.9 + 0.7) / 4)
    for name, unseen in (("unseen", []), ("mean", list(VALUES))):
        with pytest.raises(SettingsError, match="there are none"):
            make_objective(name, list(VALUES), unseen=unseen)


@pytest.mark.parametrize(
    "name", [*(name for name in OBJECTIVES if name != "unseen"), "expected_mean", "expected_worst"]
)
@pytest.mark.parametrize("task", ["x", "z"])
def test_one_missing_figure_spoils_the_whole(name, task):
    figure = "expected_error" if name.startswith(EXPECTED) else "value"
    assert math.isnan(value(name, SCORES | {task: replace(SCORES[task], **{figure: math.nan})}))
    with pytest.raises(KeyError, match=task):
        value(name, {other: SCORES["y"] for other in SCORES if other != task})


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("wort", "Did you mean 'worst'"),
        ("expected_men", "Did you mean 'expected_mean'"),
        (["mean", "mean"], "each once"),
        ([], "at least one"),
    ],
)
def test_unknown_objectives_are_refused(names, message):
    with pytest.raises(SettingsError, match=message):
        make_objective(names, list(VALUES))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "needs `weights`"),
        ({"x": 0.0}, "needs `weights`"),
        ({"xx": 1.0}, "unknown task 'xx'"),
        ({"x": -1.0}, "task 'x' is -1"),
        ({"x": math.nan}, "task 'x' is nan"),
    ],
)
def test_weights_that_make_no_mean_are_refused(weights, message):
    with pytest.raises(SettingsError, match=message):
        make_objective("weighted", list(VALUES), weights=weights)


@pytest.mark.parametrize("references", [None, {"x": 1.0, "y": 0.0, "z": 1.0}, {"x": 1.0, "y": math.nan, "z": 1.0}])
def test_normalizing_needs_what_to_divide_by(references):
    with pytest.raises(SettingsError, match="own member"):
        make_objective("normalized", list(VALUES), references, OWN)
    with pytest.raises(SettingsError, match="own member"):
        make_objective("expected_normalized", list(VALUES), OWN, references)


def test_constraints_are_told_with_the_scores():
    objective = make_objective("mean", list(VALUES), constraints=lambda scores: {"y": 0.6 - scores["y"]})
    assert objective.violations(SCORES) == {"y": pytest.approx(0.1)}
    assert make_objective("mean", list(VALUES)).violations(SCORES) == {}


def reference(member, scores, split="validation"):
    return Row("c", member, split, "reference", "complete", "member", (member,), {member: 1.0}, scores=scores)


def test_own_scores_are_those_of_the_tasks_member():
    rows = [
        reference("a", {"x": 0.9, "y": 0.1}),
        reference("a2", {"x": 0.95, "y": 0.2}),
        reference("b", {"x": 0.3, "y": 0.8}),
        reference("b", {"x": 0.3, "y": 0.7}, "test"),
        Row("c", "base", "validation", "reference", "complete", "base", scores={"x": 1.0, "y": 1.0}),
    ]
    tasks_of = {"a": "x", "a2": "x", "b": "y"}
    assert own_scores(rows, tasks_of, "validation") == {"x": 0.95, "y": 0.8}
    errors = [replace(row, expected_errors={task: 1 - score / 2 for task, score in row.scores.items()}) for row in rows]
    result = own_scores(errors, tasks_of, "validation", expected=True)
    assert result == {"x": pytest.approx(0.475), "y": pytest.approx(0.4)}


def test_the_best_are_complete_validated_candidates_and_the_earliest_of_equals():
    def row(candidate, objective, trial, origin="search", split="validation"):
        status = "failed" if objective is None else "complete"
        return Row("c", candidate, split, origin, status, "ties", objective=objective, trial=trial)

    rows = [
        row("late", 0.8, 9),
        row("failed", None, 1),
        row("early", 0.8, 3),
        row("unheard", 0.8, None, "anchor"),
        row("low", -0.5, 2),
        row("single", 0.99, None, "reference"),
        row("tested", 0.99, None, "final", "test"),
    ]
    assert [r.candidate for r in best(rows, top=9)] == ["unheard", "early", "late", "low"]
    assert [r.candidate for r in best(rows)] == ["unheard"]
    assert best([]) == []


def candidate(name, mean, worst, violations=None):
    objectives = {"mean": mean, "worst": worst}
    return Row(
        "c",
        name,
        "validation",
        "search",
        "complete",
        "ties",
        objective=mean,
        objectives=objectives,
        violations=violations or {},
    )


def test_what_breaks_a_constraint_comes_after_what_does_not():
    rows = [
        candidate("worse", 0.9, 0.5, {"x": 0.2, "y": 0.1}),
        candidate("broken", 0.8, 0.5, {"x": 0.1, "y": -3.0}),
        candidate("kept", 0.3, 0.2, {"x": 0.0, "y": -0.1}),
        candidate("free", 0.4, 0.2),
    ]
    assert [row.candidate for row in best(rows, 9)] == ["free", "kept", "broken", "worse"]
    assert [row.candidate for row in pareto(rows)] == ["free"]
    assert [row.candidate for row in pareto(rows[:2])] == ["broken"]


def test_the_front_is_what_nothing_dominates():
    rows = [
        candidate("low", 0.5, 0.1),
        candidate("fair", 0.5, 0.5),
        candidate("twin", 0.5, 0.5),
        candidate("inside", 0.45, 0.45),
        candidate("high", 0.9, 0.2),
        candidate("even", 0.3, 0.6),
        candidate("beside", 0.3, 0.5),
    ]
    assert [row.candidate for row in pareto(rows)] == ["high", "fair", "even"]
    assert [row.candidate for row in pareto(rows[::-1])] == ["high", "twin", "even"]
    assert pareto([]) == []

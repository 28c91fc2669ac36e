import math

import pytest

from merging.errors import SettingsError
from search.objective import OBJECTIVES, best, make_objective, own_scores
from search.schema import Row

SCORES = {"x": 0.9, "y": 0.5, "z": 0.7}


@pytest.mark.parametrize(("name", "value"), [("mean", 0.7), ("worst", 0.5), ("z", 0.7), ("normalized", 0.875)])
def test_objectives_by_name(name, value):
    objective = make_objective(name, list(SCORES), {"x": 1.0, "y": 0.8, "z": 0.7 / 1.1})
    expected = value if name != "normalized" else (0.9 + 0.625 + 1.1) / 3
    assert objective(SCORES) == pytest.approx(expected)
    assert name in (*OBJECTIVES, *SCORES)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("task", list(SCORES))
def test_one_missing_figure_spoils_the_whole(name, task):
    objective = make_objective(name, list(SCORES), SCORES)
    assert math.isnan(objective(SCORES | {task: math.nan}))
    with pytest.raises(KeyError, match=task):
        objective({other: 0.5 for other in SCORES if other != task})


def test_unknown_objectives_are_refused():
    with pytest.raises(SettingsError, match="Did you mean 'worst'"):
        make_objective("wort", list(SCORES))


@pytest.mark.parametrize("references", [None, {"x": 1.0, "y": 0.0, "z": 1.0}, {"x": 1.0, "y": math.nan, "z": 1.0}])
def test_normalizing_needs_what_to_divide_by(references):
    with pytest.raises(SettingsError, match="own member"):
        make_objective("normalized", list(SCORES), references)


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
    assert own_scores(rows, {"a": "x", "a2": "x", "b": "y"}, "validation") == {"x": 0.95, "y": 0.8}


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

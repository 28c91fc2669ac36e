import pytest
from pydantic import ValidationError

from merging.errors import SettingsError
from search.constraints import Constraint, make_constraints, violations

TASKS = ("amazon", "nyt")
REFERENCES = {"amazon": 0.9, "nyt": 0.8}


def test_a_drop_is_measured_from_the_tasks_own_member_and_a_floor_from_zero():
    bounds = [Constraint(task="amazon", drop=0.05), Constraint(task="nyt", floor=0.7)]
    result = violations({"amazon": 0.8, "nyt": 0.75}, REFERENCES, bounds)
    assert result == pytest.approx({"amazon.drop": 0.05, "nyt.floor": -0.05})


def test_a_score_on_the_bound_holds():
    assert violations({"nyt": 0.5}, {"nyt": 0.75}, [Constraint(task="nyt", drop=0.25)]) == {"nyt.drop": 0.0}


def test_without_a_task_every_task_is_bounded():
    check = make_constraints([Constraint(drop=0.1), Constraint(task="nyt", floor=0.75)], TASKS, REFERENCES)
    assert check({"amazon": 0.7, "nyt": 0.7}) == pytest.approx({"amazon.drop": 0.1, "nyt.drop": 0.0, "nyt.floor": 0.05})


def test_nothing_bounded_is_nothing_to_check():
    assert make_constraints([], TASKS, {}) is None


@pytest.mark.parametrize(
    ("bounds", "references", "message"),
    [
        ([Constraint(task="amazn", floor=0.5)], REFERENCES, "Did you mean 'amazon'"),
        (
            [Constraint(drop=0.1), Constraint(task="nyt", drop=0.2)],
            REFERENCES,
            "'nyt' has two bounds of the kind 'drop'",
        ),
        ([Constraint(drop=0.1)], {"amazon": 0.9}, "'nyt' with its own member, and there is none"),
    ],
)
def test_mistakes_are_named(bounds, references, message):
    with pytest.raises(SettingsError, match=message):
        make_constraints(bounds, TASKS, references)


@pytest.mark.parametrize("given", [{"task": "nyt"}, {"drop": 0.1, "floor": 0.2}, {"drop": -0.1}, {"flor": 0.1}])
def test_a_bound_is_a_drop_or_a_floor(given):
    with pytest.raises(ValidationError):
        Constraint.model_validate(given)

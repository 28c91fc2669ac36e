"""What is said to a search while it runs: that it shall stop, and what it shall measure."""

import optuna
import pytest

from merging.recipe import Recipe
from search.budget import Budget
from search.candidate import Candidate, Provenance
from search.in_flight import measure
from search.ledger.ledger import Ledger
from search.loop import search
from search.objective import make_objective
from search.samplers.make_sampler import make_sampler
from search.space.method_space import MethodSpace
from search.space.search_space import Space
from search.steering import Steering, StoppedError


class Said(Steering):
    """Stops once `after` candidates have been asked for; has recipes to measure."""

    def __init__(self, executor, after=None, recipes=()):
        self._executor, self._after, self._recipes = executor, after, list(recipes)

    def stopping(self):
        return self._after is not None and len(self._executor.submitted) >= self._after

    def queued(self):
        while self._recipes:
            yield self._recipes.pop()


def scores(recipe):
    return {"one": 0.5 + 0.1 * recipe.scaling.get("a", 0.0), "two": 0.5}


@pytest.fixture
def run(tmp_path, threads):
    def run(capacity, candidates=12, **said):
        executor = threads(scores, capacity)
        space = Space({"task_arithmetic": MethodSpace(), "average": MethodSpace()}, "ab", None, "per_member")
        study = optuna.create_study(direction="maximize")
        ledger = Ledger(str(tmp_path / "ledger"), "demo")
        ending = search(
            study,
            space,
            lambda number: make_sampler("random", 5, {}, number),
            ledger,
            executor,
            make_objective("mean", ["one", "two"]),
            Provenance("demo"),
            Budget(candidates),
            steering=Said(executor, **said),
        )
        return ending, executor, study, ledger

    return run


@pytest.mark.parametrize("capacity", [1, 3])
def test_a_stop_ends_after_what_is_in_flight_and_a_resume_goes_on(run, capacity):
    ending, executor, _, ledger = run(capacity, after=5)
    assert ending == "stopped"
    assert 5 <= len(executor.submitted) < 5 + capacity
    assert {row.candidate for row in ledger.rows()} == {c.recipe.identity for c in executor.submitted}
    assert all(row.status == "complete" for row in ledger.rows())
    ending, _, _, ledger = run(capacity)
    assert (ending, len(ledger.rows())) == ("candidates", 12)


def test_a_recipe_that_is_enqueued_is_measured_next_and_the_sampler_learns_of_it(run):
    inside = Recipe("task_arithmetic", {"a": 0.625, "b": 0.125}, {})
    outside = Recipe("task_arithmetic", {"a": 77.0, "b": 0.1}, {})
    ending, executor, study, ledger = run(1, recipes=[inside, outside, inside, outside])
    assert ending == "candidates"
    first = [candidate.recipe for candidate in executor.submitted[:2]]
    assert {recipe.identity for recipe in first} == {inside.identity, outside.identity}
    row = ledger.get(inside.identity, "validation")
    assert (row.origin, row.status, row.scaling) == ("search", "complete", inside.scaling)
    assert study.get_trials()[row.trial].value == row.objective
    assert ledger.get(outside.identity, "validation").trial is None
    assert len(ledger.rows()) == len(executor.submitted) == 12


def test_a_stop_between_measurements_says_so_unless_all_are_there(tmp_path, threads):
    candidates = [Candidate(Recipe("task_arithmetic", {"a": number / 8}, {})) for number in range(5)]
    ledger, executor = Ledger(str(tmp_path), "demo"), threads(scores)
    with pytest.raises(StoppedError, match="resume"):
        measure(candidates, executor, ledger, None, Provenance("demo"), steering=Said(executor, 2))
    assert len(ledger.rows()) == 2
    rows = measure(candidates[:2], executor, ledger, None, Provenance("demo"), steering=Said(executor, 0))
    assert len(rows) == 2

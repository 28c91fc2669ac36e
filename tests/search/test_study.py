import math
import random
from dataclasses import replace

import pytest
from optuna.trial import TrialState

from merging.methods.method import METHODS
from merging.recipe import Recipe
from merging.tasks.task import Score
from search.candidate import Candidate, Measurement, Outcome, Provenance
from search.in_flight import measure
from search.ledger.ledger import Ledger
from search.loop import Budget, search
from search.objective import make_objective
from search.samplers.make_sampler import make_sampler, memories
from search.samplers.optuna_variants import DISTRIBUTION
from search.space.ranges import Domain
from search.space.search_space import MethodSpace, Space
from search.study import CANDIDATE, build_study

SPACE = Space({"task_arithmetic": MethodSpace(), "ties": MethodSpace()}, "ab", None, "per_member")


def scores(recipe):
    return {
        "x": 1 - abs(recipe.scaling["a"] - 0.6) - abs(recipe.scaling["b"] - 0.3) / 2 + 0.1 * (recipe.method == "ties")
    }


class Killed(BaseException):
    pass


ARGUMENTS = {
    "tpe": {"n_startup_trials": 4},
    "gp": {"n_startup_trials": 4},
    "cmaes": {"popsize": 4},
    "nsga2": {"population_size": 4},
    "nsga3": {"population_size": 4},
    "grid": {"search_space": {f"task_arithmetic.scaling.{member}": [0.3, 0.6, 0.9] for member in "ab"}},
    "quality_diversity": {"sampler_arguments": {"n_startup_trials": 4}},
}
"""Of each sampler such that it learns early."""
ONE = Space({"task_arithmetic": MethodSpace()}, "ab", None, "per_member")


@pytest.fixture
def quest(tmp_path, threads):
    """Runs a one-worker search in a directory of that name; may die before or after a row is written."""

    def run(name, candidates, space=SPACE, dies=None, sampler="tpe", **named):
        ledger = Ledger(str(tmp_path / name / "ledger"), "demo")
        extend = ledger.extend

        def dying(rows):
            if dies == ("before", len(ledger.rows())):
                raise Killed
            extend(rows)
            if dies == ("after", len(ledger.rows()) - 1):
                raise Killed

        ledger.extend = dying
        executor = threads(scores)
        study = build_study(ledger, space)
        states = [trial.state for trial in study.trials]
        arguments = ARGUMENTS.get(sampler)
        search(
            study,
            space,
            lambda number: make_sampler(sampler, 1, arguments, number),
            ledger,
            executor,
            make_objective("mean", ["x"]),
            Provenance("demo"),
            Budget(candidates),
            history=memories(sampler, arguments, **named),
        )
        run.states, run.study, run.submitted = states, study, executor.submitted
        return [(row.trial, row.candidate, row.objective, row.origin, row.sampler) for row in ledger.rows()]

    return run


def test_a_new_study_has_its_anchors_waiting(tmp_path):
    study = build_study(Ledger(str(tmp_path / "ledger")), SPACE)
    waiting = study.get_trials(states=(TrialState.WAITING,))
    heard = [recipe.identity for recipe in SPACE.baselines() if recipe in SPACE]
    assert [trial.user_attrs[CANDIDATE] for trial in waiting] == heard
    assert len(study.trials) == len(heard) == 2


@pytest.mark.parametrize(
    "sampler",
    [
        "tpe",
        pytest.param("gp", marks=pytest.mark.slow),
        "cmaes",
        "nsga2",
        "nsga3",
        "qmc",
        "quality_diversity",
        "random",
    ],
)
def test_dying_beside_a_row_changes_nothing(quest, sampler):
    """Proposals learn from others long before the first death."""
    space = ONE if sampler in ("cmaes", "gp") else SPACE
    unbroken = quest("unbroken", 22, space, sampler=sampler)
    for death in (
        ("before", 0),
        ("after", 2),
        ("before", 9),
        ("after", 9),
        ("before", 11),
        ("after", 16),
        ("before", 20),
    ):
        with pytest.raises(Killed):
            quest("broken", 22, space, dies=death, sampler=sampler)
    assert quest("broken", 22, space, sampler=sampler) == unbroken
    assert len({row[1] for row in unbroken}) == 22


@pytest.mark.parametrize("sampler", ["grid", "brute_force"])
def test_enumeration_goes_on_where_it_was(quest, sampler):
    few = Space({"task_arithmetic": MethodSpace(scaling=Domain(choices=(0.3, 0.6, 0.9)))}, "ab", None, "per_member")
    unbroken = quest("unbroken", 50, few, sampler=sampler)
    for death in (("after", 2), ("before", 4), ("after", 7)):
        with pytest.raises(Killed):
            quest("broken", 50, few, dies=death, sampler=sampler)
    assert quest("broken", 50, few, sampler=sampler) == unbroken
    assert len(unbroken) == 10


@pytest.mark.parametrize("sampler", ["tpe", "cmaes"])
def test_a_search_that_is_given_more_candidates_goes_on_as_if_it_had_had_them_from_the_start(quest, sampler):
    space = ONE if sampler == "cmaes" else SPACE
    unbroken = quest("unbroken", 24, space, sampler=sampler)
    for candidates in (9, 15, 16, 24):
        resumed = quest("resumed", candidates, space, sampler=sampler)
    assert resumed == unbroken
    assert len(quest.submitted) == 8


def test_nothing_of_a_ledger_is_executed(quest, tmp_path):
    """What CMA-ES has learnt is numbers; others in their place are not taken, and a fresh distribution begins."""
    rows = quest("numbers", 20, ONE, sampler="cmaes")
    noted = [row[4]["notes"][DISTRIBUTION] for row in rows if DISTRIBUTION in ((row[4] or {}).get("notes") or {})]
    assert len(noted) >= 2
    assert all(isinstance(value, int | float | list) for state in noted for value in state.values())
    ledger = Ledger(str(tmp_path / "numbers" / "ledger"))
    spoilt = [
        replace(row, sampler={"notes": row.sampler["notes"] | {DISTRIBUTION: {"_mean": ["x"], "_rng": "pickle"}}})
        if row.sampler
        else row
        for row in ledger.rows()
    ]
    Ledger(str(tmp_path / "spoilt" / "ledger")).extend(spoilt)
    assert len(quest("spoilt", 24, ONE, sampler="cmaes")) == 24


def test_proposals_that_were_in_flight_are_made_again_under_their_numbers(tmp_path, threads):
    ledger = Ledger(str(tmp_path / "ledger"), "demo")

    def run(candidates, skip=()):
        executor, extend = threads(scores, 4), ledger.extend
        ledger.extend = lambda rows: extend([row for row in rows if row.trial not in skip])
        sampler = lambda number: make_sampler("qmc", 1, None, number)  # noqa: E731
        arguments = (executor, make_objective("mean", ["x"]), Provenance("demo"), Budget(candidates))
        search(build_study(ledger, SPACE), SPACE, sampler, ledger, *arguments)

    run(14, skip=(6, 8))
    assert {row.trial for row in ledger.rows()} == {None, *range(13)} - {6, 8}
    ledger = Ledger(str(tmp_path / "ledger"), "demo")
    run(16)
    assert {row.trial for row in ledger.rows()} == {None, *range(15)}


class Shuffled:
    """Several at once, which come back in any order and in groups."""

    def __init__(self, capacity, chance):
        self.capacity, self.chance, self.queue = capacity, chance, []

    def submit(self, candidate):
        self.queue.append(candidate)

    def wait(self, timeout):
        self.chance.shuffle(self.queue)
        count = self.chance.randint(1, len(self.queue))
        done, self.queue = self.queue[:count], self.queue[count:]
        return [Outcome(one, Measurement({"x": Score(scores(one.recipe)["x"], 0.0, 1, "accuracy")})) for one in done]


@pytest.mark.parametrize("sampler", ["random", "qmc"])
def test_whatever_is_in_flight_at_a_death_the_same_proposals_are_measured_in_the_end(tmp_path, sampler):
    """Of samplers whose proposals depend on their number alone."""
    chance = random.Random(3)

    def run(name, deadly):
        ledger = Ledger(str(tmp_path / name), "demo")
        extend, left = ledger.extend, chance.randint(1, 5)

        def dying(rows):
            nonlocal left
            left -= 1
            if deadly and left == 0 and chance.random() < 0.5:
                raise Killed
            extend(rows)
            if deadly and left == 0:
                raise Killed

        ledger.extend = dying
        arguments = (Shuffled(5, chance), make_objective("mean", ["x"]), Provenance("demo"), Budget(40))
        search(build_study(ledger, SPACE), SPACE, lambda n: make_sampler(sampler, 1, None, n), ledger, *arguments)
        return {(row.trial, row.candidate) for row in ledger.rows()}

    deaths = 0
    for _ in range(8):
        try:
            run("broken", True)
            break
        except Killed:
            deaths += 1
    assert deaths > 2
    assert run("broken", False) == run("calm", False)


def test_a_ledger_of_an_earlier_version_goes_on_without_what_it_lacks(quest, tmp_path):
    rows = quest("old", 12, sampler="random")
    ledger = Ledger(str(tmp_path / "old" / "ledger"))
    earlier = [replace(row, sampler=None) for row in ledger.rows() if row.trial not in (5, 7)]
    Ledger(str(tmp_path / "new" / "ledger")).extend(earlier)
    again = quest("new", 14, sampler="random")
    assert [row[1] for row in again[:10]] == [row[1] for row in rows if row[0] not in (5, 7)]
    assert quest.states.count(TrialState.FAIL) == 2
    assert quest.states.count(TrialState.WAITING) == 0
    assert len(again) == 14


def test_rows_are_kept_when_the_space_changes(quest):
    before = quest("wider", 10)
    wider = Space(
        {"task_arithmetic": MethodSpace(), "ties": MethodSpace(), "regmean": MethodSpace()},
        "ab",
        None,
        "per_member",
    )
    after = quest("wider", 14, space=wider)
    assert after[:10] == before
    assert len(after) == 14
    assert {trial.distributions["method"].choices for trial in quest.study.trials} == {
        ("task_arithmetic", "ties", "regmean")
    }
    narrower = Space({"ties": MethodSpace()}, "ab", None, "per_member")
    assert quest("wider", 16, space=narrower)[:14] == after
    numbers = [row[0] for row in quest("wider", 16, space=narrower) if row[0] is not None]
    assert len(set(numbers)) == len(numbers) >= 14


def measured_before(tmp_path, name, threads):
    """Rows of an earlier stage: two that the space has, one that fails there, and two that it has not."""
    recipes = [
        Recipe("task_arithmetic", {"a": 0.6, "b": 0.3}),
        Recipe("average", {"a": 1.0, "b": 1.0}),
        Recipe("task_arithmetic", {"a": 0.6}),
        Recipe("task_arithmetic", {"a": 0.9, "b": 0.9}),
        Recipe("task_arithmetic", {"a": 0.2, "b": 0.2}),
    ]
    recipes = [METHODS[recipe.method].complete(recipe) for recipe in recipes]
    executor = threads(lambda recipe: scores(recipe) if recipe is not recipes[3] else {"x": math.nan})
    candidates = [Candidate(recipe, "validation", "anchor") for recipe in recipes]
    ledger = Ledger(str(tmp_path / name / "ledger"), "demo")
    return measure(candidates, executor, ledger, make_objective("mean", ["x"]), Provenance("demo"))


@pytest.mark.parametrize("killed", [False, True])
def test_what_was_measured_before_is_heard_by_the_study_where_it_lies_in_its_space(quest, tmp_path, threads, killed):
    before = measured_before(tmp_path, "unbroken", threads)
    unbroken = quest("unbroken", 14)
    assert quest.states[:3] == [TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE]
    heard = quest.study.trials[:3]
    assert [trial.user_attrs[CANDIDATE] for trial in heard] == [before[i].candidate for i in (0, 3, 4)]
    assert [trial.values for trial in heard] == [[before[0].objective], None, [before[4].objective]]
    assert [number for number, *_ in unbroken[:5]] == [None] * 5
    assert min(number for number, *_ in unbroken if number is not None) == 3
    assert len({trial.user_attrs.get(CANDIDATE) for trial in quest.study.trials}) == len(quest.study.trials)
    measured_before(tmp_path, "broken", threads)
    if killed:
        with pytest.raises(Killed):
            quest("broken", 14, dies=("after", 9))
    assert quest("broken", 14) == unbroken


def test_failed_candidates_are_measured_again_where_that_is_asked_for(tmp_path, threads):
    sick = {"task_arithmetic"}

    def measure_or_fail(recipe):
        if recipe.method in sick:
            raise RuntimeError(f"CUDA error at {recipe.identity}")
        return scores(recipe)

    def run(*, retry_failed=False):
        ledger = Ledger(str(tmp_path / "ledger"), "demo", retry_failed=retry_failed)
        executor = threads(measure_or_fail)
        search(
            build_study(ledger, SPACE),
            SPACE,
            lambda number: make_sampler("random", 1, None, number),
            ledger,
            executor,
            make_objective("mean", ["x"]),
            Provenance("demo"),
            Budget(12),
        )
        return executor.submitted, ledger.rows()

    _, rows = run()
    failed = {row.candidate for row in rows if row.status == "failed"}
    assert 2 <= len(failed) < 12
    sick.clear()
    assert run()[0] == []
    again, rows = run(retry_failed=True)
    assert {candidate.recipe.identity for candidate in again} == failed
    assert len(again) == len(failed)
    assert {row.status for row in rows} == {"complete"}
    assert len(rows) == 12
    assert sum(row.origin == "anchor" for row in rows) == 3
    _, rows = run()
    assert {row.status for row in rows} == {"complete"}
    assert len(rows) == 12
    assert run(retry_failed=True)[0] == []

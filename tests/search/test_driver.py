import math
import threading
import time
from collections import Counter

import pytest

from merging.errors import MethodError, SearchError, SettingsError
from merging.recipe import Recipe
from search.candidate import Candidate, Provenance
from search.domain import Domain
from search.driver import Budget, search
from search.flight import measure
from search.ledger import Ledger
from search.objective import best, make_objective
from search.samplers import make_sampler
from search.space import MethodSpace, Space
from search.study import open_study

TASKS = ("x", "y")
PROVENANCE = Provenance("demo", "1.0", "data")
OPTIMUM = {"a": 0.9, "b": 0.4}


def scores(recipe):
    """Two tasks whose mean is best for task arithmetic at `OPTIMUM`."""
    if recipe.method != "task_arithmetic":
        return {"x": 0.5, "y": 0.4}
    return {
        task: 1 - 2 * (recipe.scaling[member] - OPTIMUM[member]) ** 2 for task, member in zip(TASKS, "ab", strict=True)
    }


class Watch:
    def __init__(self, interrupt_at=0):
        self.total, self.rows, self.best, self.interrupt_at = 0, [], [], interrupt_at

    def on_start(self, total):
        self.total = total

    def on_row(self, row, best, done, total):
        assert total == self.total
        self.rows.append(row)
        self.best.append((best.objective if best else None, done))
        if done == self.interrupt_at:
            raise KeyboardInterrupt


@pytest.fixture
def campaign(tmp_path, threads):
    """Runs or resumes a search in one directory."""

    class Campaign:
        space = Space({"task_arithmetic": MethodSpace(), "average": MethodSpace()}, "ab", None, "per_member")

        def run(
            self,
            evaluate=scores,
            candidates=20,
            capacity=1,
            sampler="tpe",
            arguments=None,
            watch=None,
            **budget,
        ):
            self.executor = threads(evaluate, capacity)
            self.watch = watch or Watch()
            self.ledger = Ledger(str(tmp_path / "ledger"), "demo")
            with open_study(str(tmp_path / "study"), "demo", self.space, self.ledger) as self.study:
                return search(
                    self.study,
                    self.space,
                    lambda number: make_sampler(sampler, 5, arguments, number),
                    self.ledger,
                    self.executor,
                    make_objective("mean", TASKS),
                    PROVENANCE,
                    Budget(candidates, **budget),
                    self.watch,
                )

        def rows(self):
            return Ledger(str(tmp_path / "ledger")).rows()

    return Campaign()


@pytest.mark.parametrize("capacity", [1, 4])
def test_a_search_begins_with_the_anchors_and_ends_above_them(campaign, capacity):
    assert campaign.run(candidates=40, capacity=capacity) == "budget"
    rows = campaign.rows()
    anchors = [row for row in rows if row.origin == "anchor"]
    assert [c.recipe for c in campaign.executor.submitted[:2]] == campaign.space.anchors()
    assert len(anchors) == 2
    assert len(rows) == len({row.candidate for row in rows}) == 40
    (winner,) = best(rows)
    assert winner.method == "task_arithmetic"
    assert winner.objective > max(row.objective for row in anchors) + 0.1
    assert winner.objective > 0.9
    assert campaign.study.best_value == winner.objective
    assert all(row.recipe.identity == row.candidate for row in rows)
    assert {row.worker for row in rows} == {"host/1/cpu"}


def test_tpe_soon_proposes_better_than_at_random(campaign):
    campaign.run(candidates=40)
    rows = campaign.rows()
    at_random, learnt = rows[2:12], rows[-15:]
    assert sum(row.objective for row in learnt) / 15 > sum(row.objective for row in at_random) / 10 + 0.1
    assert max(row.objective for row in learnt) > max(row.objective for row in at_random)


def test_several_candidates_are_in_flight(campaign):
    everyone = threading.Barrier(4)

    def together(recipe):
        everyone.wait(timeout=30)  # breaks unless four are under way at once
        return scores(recipe)

    campaign.run(together, candidates=12, capacity=4)
    assert [row.status for row in campaign.rows()] == ["complete"] * 12


def test_progress_is_told(campaign):
    campaign.run(candidates=12)
    assert campaign.watch.total == 12
    assert [done for _, done in campaign.watch.best] == list(range(1, 13))
    values = [value for value, _ in campaign.watch.best]
    assert values == sorted(values)
    assert [row.candidate for row in campaign.watch.rows] == [row.candidate for row in campaign.rows()]


def test_a_finished_search_has_nothing_left_to_do_and_a_larger_budget_goes_on(campaign):
    campaign.run(candidates=10)
    before = campaign.rows()
    assert campaign.run(candidates=10) == "budget"
    assert campaign.executor.submitted == []
    campaign.run(candidates=14)
    assert len(campaign.executor.submitted) == 4
    assert campaign.rows()[:10] == before


def test_anchors_are_measured_whatever_the_budget(campaign):
    campaign.run(candidates=1)
    assert [row.origin for row in campaign.rows()] == ["anchor", "anchor"]


def test_a_failed_candidate_is_a_row_and_the_search_goes_on(campaign):
    def sometimes(recipe):
        if recipe.method == "task_arithmetic" and recipe.scaling["a"] > 0.8:
            raise MethodError(f"too much: {recipe.scaling['a']}")
        return scores(recipe)

    assert campaign.run(sometimes, candidates=30) == "budget"
    failed = [row for row in campaign.rows() if row.status == "failed"]
    assert 0 < len(failed) < 25
    assert all(row.error.startswith("MethodError: too much") and row.objective is None for row in failed)
    states = Counter(trial.state.name for trial in campaign.study.trials)
    assert states["FAIL"] == len(failed)
    assert "failed" not in {row.status for row in best(campaign.rows(), 30)}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_finite_objective_is_a_failure(campaign, value):
    campaign.run(lambda r: scores(r) | ({"x": value} if r.scaling["a"] > 1 else {}), candidates=25, identical_errors=99)
    failed = [row for row in campaign.rows() if row.status == "failed"]
    assert failed
    assert all("the objective is" in row.error and "x" in row.scores and row.objective is None for row in failed)


def test_a_task_without_a_score_is_a_failure(campaign):
    with pytest.raises(SearchError, match="no score came back for task 'y'"):
        campaign.run(lambda recipe: {"x": 0.5})


def test_the_same_error_again_and_again_stops_the_search(campaign):
    def broken(recipe):
        if recipe in campaign.space.anchors():
            return scores(recipe)
        raise RuntimeError("no space left on device")

    with pytest.raises(SearchError, match=r"3 candidates in a row.*RuntimeError: no space left") as caught:
        campaign.run(broken, identical_errors=3)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert len(campaign.rows()) == 5
    campaign.run(candidates=10)
    assert [row.status for row in campaign.rows()] == ["complete"] * 2 + ["failed"] * 3 + ["complete"] * 5


def test_all_anchors_failing_stops_the_search(campaign):
    count = iter(range(99))
    with pytest.raises(SearchError, match="every anchor failed"):
        campaign.run(lambda recipe: (_ for _ in ()).throw(ValueError(f"number {next(count)}")))
    assert len(campaign.rows()) == 2


def test_known_recipes_are_not_measured_again_until_the_space_is_exhausted(campaign):
    campaign.space = Space(
        {"task_arithmetic": MethodSpace(scaling=Domain(choices=(0.3, 0.6, 0.9)))}, "ab", None, "per_member"
    )
    assert campaign.run(candidates=50, duplicates=40) == "exhausted"
    rows = campaign.rows()
    assert len(rows) == len({row.candidate for row in rows}) == 1 + 9  # the plain average is outside
    assert len(campaign.executor.submitted) == 10
    asked = len(campaign.study.trials)
    assert asked > 40
    assert campaign.run(candidates=50, duplicates=40) == "exhausted"
    assert len(campaign.study.trials) == asked


@pytest.mark.parametrize("sampler", ["grid", "brute_force"])
def test_samplers_that_enumerate_end_when_they_are_through(campaign, sampler):
    campaign.space = Space(
        {"task_arithmetic": MethodSpace(scaling=Domain(choices=(0.3, 0.6, 0.9)))}, "ab", None, "per_member"
    )
    grid = {f"task_arithmetic.scaling.{member}": [0.3, 0.6, 0.9] for member in "ab"}
    arguments = {"search_space": grid} if sampler == "grid" else {}
    assert campaign.run(candidates=50, capacity=2, sampler=sampler, arguments=arguments, duplicates=5) == "exhausted"
    assert len(campaign.rows()) == 10


def test_a_space_without_anything_to_vary_ends_with_its_anchors(campaign):
    campaign.space = Space({"average": MethodSpace(scaling=Domain(value=1.0))}, "ab")
    assert campaign.run() == "exhausted"
    assert [row.trial for row in campaign.rows()] == [None]


@pytest.mark.parametrize(
    ("sampler", "arguments"), [("brute_force", {}), ("grid", {"search_space": {"something.else": [1]}})]
)
def test_a_sampler_that_cannot_propose_says_so(campaign, sampler, arguments):
    with pytest.raises(SettingsError, match="cannot propose"):
        campaign.run(sampler=sampler, arguments=arguments)


def test_a_lost_candidate_is_put_back(campaign):
    lost = Counter()

    def unstable(recipe):
        lost[recipe.identity] += 1
        if lost[recipe.identity] <= len(lost) % 3:
            raise ConnectionError("worker died")
        return scores(recipe)

    campaign.run(unstable, candidates=12, retries=2)
    assert {row.status for row in campaign.rows()} == {"complete"}
    assert max(lost.values()) == 3
    assert len(campaign.executor.submitted) == sum(lost.values())


def test_a_candidate_that_is_lost_every_time_is_a_failed_row(campaign):
    def deadly(recipe):
        if recipe.method == "task_arithmetic" and recipe.scaling["a"] > 1.0:
            raise ConnectionError("worker died")
        return scores(recipe)

    campaign.run(deadly, candidates=25, retries=1, identical_errors=99)
    failed = [row for row in campaign.rows() if row.status == "failed"]
    assert failed
    assert {row.error for row in failed} == {"ClusterError: the worker was lost 2 times: worker died"}


def test_the_budget_in_seconds_lets_what_is_under_way_finish(campaign):
    def slow(recipe):
        time.sleep(0.1)
        return scores(recipe)

    started = time.monotonic()
    assert campaign.run(slow, candidates=1000, capacity=2, seconds=0.8) == "seconds"
    assert time.monotonic() - started < 5
    assert 4 <= len(campaign.rows()) < 30
    assert {trial.state.name for trial in campaign.study.trials} == {"COMPLETE"}


@pytest.mark.parametrize("capacity", [1, 4])
def test_an_interrupt_leaves_everything_consistent(campaign, capacity):
    with pytest.raises(KeyboardInterrupt):
        campaign.run(capacity=capacity, watch=Watch(interrupt_at=6))
    before = campaign.rows()
    assert len(before) == 6
    campaign.run(candidates=12, capacity=capacity)
    rows = campaign.rows()
    assert rows[:6] == before
    assert len(rows) == len({row.candidate for row in rows}) == 12
    assert sorted(row.trial for row in rows) == list(range(12))
    assert [trial.state.name for trial in campaign.study.trials] == ["COMPLETE"] * 12


def test_measuring_what_no_sampler_proposed(tmp_path, threads):
    ledger = Ledger(str(tmp_path), "demo")
    base = Candidate(Recipe("base", {}), "validation", "reference")
    member = Candidate(Recipe("member", {"a": 1.0}), "test", "reference")
    executor = threads(lambda recipe: {"x": 0.4} if recipe.method == "base" else {"x": 0.7}, 2)
    rows = measure([base, member, base], executor, ledger, None, PROVENANCE)
    assert [(row.method, row.split, row.origin, row.scores, row.objective) for row in rows] == [
        ("base", "validation", "reference", {"x": 0.4}, None),
        ("member", "test", "reference", {"x": 0.7}, None),
        ("base", "validation", "reference", {"x": 0.4}, None),
    ]
    assert len(executor.submitted) == 2
    again = measure([member], executor, Ledger(str(tmp_path)), make_objective("mean", ["x"]), PROVENANCE)
    assert again == rows[1:2]
    assert len(executor.submitted) == 2


def test_measuring_records_failures(tmp_path, threads):
    ledger = Ledger(str(tmp_path), "demo")
    executor = threads(lambda recipe: (_ for _ in ()).throw(ConnectionError("gone")))
    (row,) = measure([Candidate(Recipe("base", {}), "test", "final")], executor, ledger, None, PROVENANCE, retries=2)
    assert row.status == "failed"
    assert row.error == "ClusterError: the worker was lost 3 times: gone"
    assert len(executor.submitted) == 3

import math
import shutil
import threading
import time
from collections import Counter

import pytest
from optuna.samplers import RandomSampler

from merging.errors import MethodError, SearchError, SettingsError
from merging.recipe import Recipe
from search.candidate import Candidate, Provenance
from search.in_flight import measure
from search.ledger.ledger import Ledger
from search.loop import Budget, search
from search.objective import best, make_objective, pareto
from search.samplers.history_window import Recent
from search.samplers.make_sampler import make_sampler, memories
from search.samplers.optuna_variants import bred
from search.space.ranges import Domain
from search.space.search_space import MethodSpace, Space
from search.study import build_study

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

    def on_start(self, progress):
        self.total = progress.total

    def on_row(self, row, progress):
        assert progress.total == self.total
        self.rows.append(row)
        self.progress = progress
        self.best.append((progress.best.objective if progress.best else None, progress.done))
        if len(self.rows) == self.interrupt_at:
            raise KeyboardInterrupt


@pytest.fixture
def campaign(tmp_path, threads):
    """Runs or resumes a search in one directory."""

    class Campaign:
        space = Space({"task_arithmetic": MethodSpace(), "average": MethodSpace()}, "ab", None, "per_member")
        objective = make_objective("mean", TASKS)

        def run(
            self,
            evaluate=scores,
            candidates=20,
            capacity=1,
            sampler="tpe",
            arguments=None,
            watch=None,
            history=None,
            **budget,
        ):
            self.executor = threads(evaluate, capacity)
            self.watch = watch or Watch()
            self.ledger = Ledger(str(tmp_path / "ledger"), "demo")
            count = len(self.objective.names)
            self.study = build_study(self.ledger, self.space, objectives=count)
            return search(
                self.study,
                self.space,
                sampler if callable(sampler) else lambda number: make_sampler(sampler, 5, arguments, number),
                self.ledger,
                self.executor,
                self.objective,
                PROVENANCE,
                Budget(candidates, **budget),
                self.watch,
                history=history,
            )

        def rows(self):
            return Ledger(str(tmp_path / "ledger")).rows()

    return Campaign()


@pytest.mark.parametrize("capacity", [1, 4])
def test_a_search_begins_with_the_anchors_and_ends_above_them(campaign, capacity):
    assert campaign.run(candidates=40, capacity=capacity) == "candidates"
    rows = campaign.rows()
    anchors = [row for row in rows if row.origin == "anchor"]
    assert [c.recipe for c in campaign.executor.submitted[:2]] == campaign.space.baselines()
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


def test_no_evaluator_waits_for_the_sampler(campaign, threads, monkeypatch):
    events = []

    def logged(name, function):
        def call(*arguments):
            events.append(name)
            return function(*arguments)

        return call

    monkeypatch.setattr(threads, "submit", logged("submit", threads.submit))
    monkeypatch.setattr(threads, "wait", logged("wait", threads.wait))
    monkeypatch.setattr(Ledger, "extend", logged("write", Ledger.extend))
    sampler = logged("ask", lambda number: make_sampler("random", 5, None, number))
    campaign.run(candidates=10, sampler=sampler)
    assert events[:8] == ["ask", "submit", "ask", "wait", "submit", "write", "ask", "wait"]
    assert events.count("ask") == 10
    assert all(
        events[place + 1 : place + 3] == ["submit", "write"] for place, name in enumerate(events[:-3]) if name == "wait"
    )


def test_progress_is_told(campaign):
    campaign.run(candidates=12)
    assert campaign.watch.total == 12
    assert [done for _, done in campaign.watch.best] == list(range(1, 13))
    progress = campaign.watch.progress
    assert progress.examples == 12 * 200
    assert progress.per_minute > 0
    assert progress.seconds_left == 0
    values = [value for value, _ in campaign.watch.best]
    assert values == sorted(values)
    assert [row.candidate for row in campaign.watch.rows] == [row.candidate for row in campaign.rows()]


def test_a_finished_search_has_nothing_left_to_do_and_a_larger_budget_goes_on(campaign):
    campaign.run(candidates=10)
    before = campaign.rows()
    assert campaign.run(candidates=10) == "candidates"
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

    assert campaign.run(sometimes, candidates=30) == "candidates"
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
    assert all(row.error == f"TaskError: 'mean' is {value}: no finite score of x" for row in failed)
    assert all("x" in row.scores and row.objective is None and not row.objectives for row in failed)


def test_a_task_without_a_score_is_a_failure(campaign):
    with pytest.raises(SearchError, match="no score came back for task 'y'"):
        campaign.run(lambda recipe: {"x": 0.5})


def test_the_same_error_again_and_again_stops_the_search(campaign):
    def broken(recipe):
        if recipe in campaign.space.baselines():
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
    with pytest.raises(SearchError, match="every baseline failed"):
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
    requested = len(campaign.study.trials)
    assert requested > 40
    assert campaign.run(candidates=50, duplicates=40) == "exhausted"
    assert len(campaign.study.trials) == requested


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


@pytest.mark.parametrize("capacity", [1, 3])
def test_the_budget_in_examples_is_overrun_by_one_candidate_at_most(campaign, capacity):
    assert campaign.run(candidates=1000, capacity=capacity, examples=2100) == "examples"  # 200 a candidate
    assert len(campaign.rows()) == 11
    assert campaign.run(candidates=1000, capacity=capacity, examples=2100) == "examples"
    assert campaign.executor.submitted == []
    assert campaign.run(candidates=13, examples=9999) == "candidates"


def test_a_plateau_ends_the_search_and_a_resumed_one(campaign):
    def flat(recipe):
        return {"x": min(0.8, scores(recipe)["x"]), "y": 0.4}

    assert campaign.run(flat, candidates=1000, patience=12, min_delta=0.01) == "plateau"
    values = [row.objective for row in campaign.rows()]
    improved = [i for i in range(1, len(values)) if values[i] > max(values[:i]) + 0.01]
    assert len(values) - 1 - improved[-1] in (12, 13)  # one was asked ahead
    assert campaign.run(flat, candidates=1000, patience=12, min_delta=0.01) == "plateau"
    assert campaign.executor.submitted == []
    assert campaign.run(flat, candidates=1000, patience=15, min_delta=0.01) == "plateau"
    assert 2 <= len(campaign.executor.submitted) <= 3


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_several_objectives(campaign, sampler):
    campaign.objective = make_objective(["worst", "x"], TASKS)
    campaign.run(candidates=12, sampler=sampler)
    campaign.run(candidates=25, sampler=sampler)
    rows = campaign.rows()
    assert all(row.objectives == {"worst": min(row.scores.values()), "x": row.scores["x"]} for row in rows)
    assert all(row.objective == row.objectives["worst"] for row in rows)
    reported = [(trial.user_attrs["candidate"], tuple(trial.values)) for trial in campaign.study.trials]
    assert reported == [(row.candidate, tuple(row.objectives.values())) for row in rows]
    front = {trial.user_attrs["candidate"] for trial in campaign.study.best_trials}
    assert front == {row.candidate for row in pareto(rows)}
    assert campaign.run(candidates=25, sampler=sampler) == "candidates"
    (winner,) = best(rows)
    assert winner.objective == max(row.objective for row in rows)


def test_a_sampler_of_one_objective_says_so(campaign):
    campaign.objective = make_objective(["mean", "worst"], TASKS)
    with pytest.raises(SettingsError, match="cannot propose"):
        campaign.run(sampler="cmaes")


def test_constraints_reach_row_and_study(campaign):
    campaign.objective = make_objective("mean", TASKS, constraints=lambda scores: {"x": 0.7 - scores["x"]})
    campaign.run(candidates=15)
    campaign.run(candidates=20)
    rows = campaign.rows()
    assert all(row.violations == {"x": 0.7 - row.scores["x"]} for row in rows)
    assert [trial.constraints for trial in campaign.study.trials] == [row.violations for row in rows]
    assert best(rows)[0].violations["x"] <= 0 < max(row.violations["x"] for row in rows)


def test_a_recipe_that_cannot_be_is_no_row_and_ends_the_search_if_none_can(campaign, monkeypatch):
    suggest = campaign.space.suggest

    def at_times(trial):
        recipe = suggest(trial)
        if recipe.scaling["a"] > limit:
            raise MethodError("scaling factors cancel")
        return recipe

    monkeypatch.setattr(campaign.space, "suggest", at_times)
    limit = 0.7
    assert campaign.run(candidates=12, identical_errors=20, sampler="random") == "candidates"
    assert len(campaign.rows()) == 12
    assert {"FAIL", "COMPLETE"} == {trial.state.name for trial in campaign.study.trials}
    limit = -1
    with pytest.raises(SearchError, match="4 proposals in a row are no recipes: scaling factors cancel"):
        campaign.run(candidates=20, identical_errors=4, sampler="random")


def test_a_history_that_holds_everything_changes_nothing(campaign, tmp_path):
    campaign.run(candidates=20)
    unbounded = [row.candidate for row in campaign.rows()]
    shutil.rmtree(tmp_path / "ledger")
    campaign.run(candidates=20, history=memories("tpe", limit=100))
    assert [row.candidate for row in campaign.rows()] == unbounded


def test_a_bounded_history_is_all_that_the_sampler_sees(campaign):
    seen = []

    class Looking(RandomSampler):
        def infer_relative_search_space(self, study, trial):
            seen.append([past.values[0] for past in study.get_trials(deepcopy=False) if past.state.is_finished()])
            return super().infer_relative_search_space(study, trial)

    campaign.run(candidates=40, sampler=lambda number: Looking(number), history=[Recent(8)])
    values = [row.objective for row in campaign.rows()]
    assert [len(finished) for finished in seen[:6]] == [1, 2, 3, 4, 5, 6]
    assert max(map(len, seen)) <= 8
    assert sorted(seen[-1])[-2:] == sorted(values[:-2])[-2:]
    assert seen[-1][-6:] == values[-8:-2]


@pytest.mark.parametrize(
    ("sampler", "arguments"),
    [("nsga2", {"population_size": 4}), ("nsga3", {"population_size": 4}), ("cmaes", {"popsize": 4}), ("qmc", {})],
)
def test_what_a_sampler_needs_of_the_history_does_for_all_of_it(campaign, tmp_path, sampler, arguments):
    if sampler == "cmaes":
        campaign.space = Space({"task_arithmetic": MethodSpace()}, "ab", None, "per_member")
    result, seen = [], []
    for history in (None, memories(sampler, arguments)):
        campaign.run(candidates=40, sampler=sampler, arguments=arguments, history=history)
        result.append([row.candidate for row in campaign.rows()])
        seen = history
        shutil.rmtree(tmp_path / "ledger")
    assert result[0] == result[1]
    assert 2 <= len(seen[0].trials()) <= 20


@pytest.mark.parametrize(("sampler", "size"), [("nsga2", "population_size"), ("cmaes", "popsize")])
def test_evolution_goes_on_after_an_interrupt_as_if_there_had_been_none(campaign, tmp_path, sampler, size):
    campaign.space = Space({"task_arithmetic": MethodSpace()}, "ab", None, "per_member")

    def run(**named):
        history = memories(sampler, {size: 4})
        campaign.run(candidates=24, sampler=sampler, arguments={size: 4}, history=history, **named)

    run()
    unbroken = [row.candidate for row in campaign.rows()]
    shutil.rmtree(tmp_path / "ledger")
    for interrupt_at in (6, 6, 6):
        with pytest.raises(KeyboardInterrupt):
            run(watch=Watch(interrupt_at))
    run()
    assert [row.candidate for row in campaign.rows()] == unbroken


def test_evolution_goes_on_from_a_ledger_that_another_sampler_filled(campaign):
    arguments = {"population_size": 6}
    campaign.run(candidates=30, sampler="random")
    before = campaign.rows()
    campaign.run(candidates=40, sampler="nsga2", arguments=arguments, history=memories("nsga2", arguments))
    assert campaign.rows()[:30] == before
    best_six = sorted(before[:-1], key=lambda row: -row.objective)[:6]  # the last is held back as if it were in flight
    marks = [mark for trial in campaign.study.trials if (mark := bred(trial))]
    assert marks[0][0] == 1
    assert set(marks[0][1]) == {row.trial for row in best_six}
    assert marks[-1][0] == 2


@pytest.mark.parametrize("capacity", [1, 4])
def test_an_interrupt_leaves_everything_consistent(campaign, capacity):
    with pytest.raises(KeyboardInterrupt):
        campaign.run(capacity=capacity, watch=Watch(interrupt_at=6))
    before = campaign.rows()
    assert 6 <= len(before) < 6 + capacity  # several may have arrived together
    campaign.run(candidates=12, capacity=capacity)
    rows = campaign.rows()
    assert rows[: len(before)] == before
    assert len(rows) == len({row.candidate for row in rows}) == 12
    assert sorted(row.trial for row in rows) == list(range(12))
    assert [trial.state.name for trial in campaign.study.trials] == ["COMPLETE"] * 12


def test_measuring_what_no_sampler_proposed(tmp_path, threads):
    ledger = Ledger(str(tmp_path), "demo")
    base = Candidate(Recipe("base", {}), "validation", "reference")
    member = Candidate(Recipe("member", {"a": 1.0}), "test", "reference")
    executor = threads(lambda recipe: {"x": 0.4} if recipe.method == "base" else {"x": 0.7}, 2)
    counts: list[int] = []
    rows = measure([base, member, base], executor, ledger, None, PROVENANCE, progress=counts.append)
    assert counts == [0, 1, 2]
    assert [(row.method, row.split, row.origin, row.scores, row.objective) for row in rows] == [
        ("base", "validation", "reference", {"x": 0.4}, None),
        ("member", "test", "reference", {"x": 0.7}, None),
        ("base", "validation", "reference", {"x": 0.4}, None),
    ]
    assert len(executor.submitted) == 2
    objective = make_objective("mean", ["x"])
    again = measure([member], executor, Ledger(str(tmp_path)), objective, PROVENANCE, progress=counts.append)
    assert (again, counts) == (rows[1:2], [0, 1, 2, 1])
    assert len(executor.submitted) == 2


def test_measuring_records_failures(tmp_path, threads):
    ledger = Ledger(str(tmp_path), "demo")
    executor = threads(lambda recipe: (_ for _ in ()).throw(ConnectionError("gone")))
    (row,) = measure([Candidate(Recipe("base", {}), "test", "final")], executor, ledger, None, PROVENANCE, retries=2)
    assert row.status == "failed"
    assert row.error == "ClusterError: the worker was lost 3 times: gone"
    assert len(executor.submitted) == 3

import pytest

from merging.recipe import Recipe
from search.candidate import Candidate, Provenance
from search.in_flight import to_row
from search.ledger.ledger import Ledger
from search.line_search import LineSearch
from search.loop import Budget, search
from search.objective import make_objective
from search.samplers.make_sampler import make_sampler
from search.space.ranges import Domain
from search.space.search_space import MethodSpace, Space
from search.study import build_study

OBJECTIVE = make_objective("mean", ["x"])


def make_space(scaling="per_member", starts=(), **methods):
    groups = ("layers:0-2", "layers:3-") if scaling == "per_depth" else ()
    return Space(methods or {"task_arithmetic": MethodSpace()}, "ab", None, scaling, groups, starts)


def measured(recipe, value, threads):
    executor = threads(lambda recipe: {"x": value})
    executor.submit(Candidate(recipe, "validation", "anchor"))
    (outcome,) = executor.wait(5)
    return to_row(outcome, OBJECTIVE, Provenance("demo"))


def walk(space, value_of, threads):
    """Measures what the line search asks for until it ends; the factors of the first member, in that order."""
    rows = {recipe.identity: measured(recipe, value_of(recipe), threads) for recipe in space.baselines()}
    line, factors = LineSearch(space, lambda recipe: rows.get(recipe.identity)), []
    while found := line.frontier():
        for recipe in found:
            factors.append(round(recipe.scaling["a"], 6))
            rows[recipe.identity] = measured(recipe, value_of(recipe), threads)
    assert line.frontier() == []
    return factors


def near(best, method=None):
    """A score that is highest where the first member's factor is `best`; only of one method, if it is named."""
    return lambda recipe: 1 - (recipe.scaling["a"] - best) ** 2 - (0 if method in (None, recipe.method) else 5)


@pytest.mark.parametrize("scaling", ["per_member", "shared", "per_depth"])
@pytest.mark.parametrize(
    ("best", "factors"),
    [
        (0.3, [0.375, 0.225]),
        (0.44, [0.375, 0.225, 0.45, 0.6]),
        (0.1, [0.375, 0.225, 0.15]),
        (9.0, [0.375, 0.225, 0.45, 0.6, 0.9]),
    ],
)
def test_each_direction_goes_on_while_it_helps(threads, scaling, best, factors):
    value = near(best, method="task_arithmetic")
    assert walk(make_space(scaling), value, threads) == pytest.approx(factors)


def test_it_waits_for_every_baseline(threads):
    space = make_space(task_arithmetic=MethodSpace(), ties=MethodSpace())
    rows = {}
    line = LineSearch(space, lambda recipe: rows.get(recipe.identity))
    for recipe in space.baselines():
        assert line.frontier() == []
        rows[recipe.identity] = measured(recipe, near(0.3)(recipe), threads)
    assert {recipe.method for recipe in line.frontier()} == {"task_arithmetic"}


def test_the_best_baseline_that_the_space_can_scale_is_scaled(threads):
    value = near(0.5, method="average")  # the average is the best by far, and a common factor cancels in it
    space = make_space(
        average=MethodSpace(), task_arithmetic=MethodSpace(), ties=MethodSpace(scaling=Domain(value=1.0))
    )
    assert walk(space, value, threads)[:2] == pytest.approx([0.375, 0.225])
    assert walk(make_space(average=MethodSpace()), value, threads) == []


def test_factors_outside_the_space_are_not_tried(threads):
    space = make_space(task_arithmetic=MethodSpace(scaling=Domain(low=0.28, high=0.5)))
    assert walk(space, near(9.0, method="task_arithmetic"), threads) == pytest.approx([0.375, 0.45])
    assert walk(make_space(task_arithmetic=MethodSpace(scaling=Domain(value=0.3))), near(9.0), threads) == []
    highest = make_space(task_arithmetic=MethodSpace(scaling=Domain(low=0.1, high=0.3)), ties=MethodSpace())
    assert walk(highest, near(0.1, method="task_arithmetic"), threads) == pytest.approx([0.225, 0.15])


def test_a_start_with_a_factor_for_each_member_is_scaled_as_a_whole(threads):
    start = Recipe("task_arithmetic", {"a": 0.4, "b": 0.2})
    space = make_space(starts=[start])
    rows = {
        recipe.identity: measured(recipe, float(recipe.scaling["a"] == 0.4), threads) for recipe in space.baselines()
    }
    up, down = LineSearch(space, lambda recipe: rows.get(recipe.identity)).frontier()
    assert up.scaling == pytest.approx({"a": 0.5, "b": 0.25})
    assert down.scaling == pytest.approx({"a": 0.3, "b": 0.15})


def test_failed_candidates_end_a_direction(threads):
    space = make_space("shared")
    value = near(9.0, method="task_arithmetic")
    rows = {recipe.identity: measured(recipe, value(recipe), threads) for recipe in space.baselines()}
    line = LineSearch(space, lambda recipe: rows.get(recipe.identity))
    up, down = line.frontier()
    rows[up.identity] = measured(up, float("nan"), threads)
    assert rows[up.identity].status == "failed"
    assert line.frontier() == [down]


class Interrupt:
    """Presses Ctrl-C after so many rows."""

    def __init__(self, rows):
        self.rows = rows

    def on_start(self, progress):
        pass

    def on_row(self, row, progress):
        self.rows -= 1
        if not self.rows:
            raise KeyboardInterrupt


class Run:
    """A search in one directory, of the line and then of the sampler; what it measured, in order."""

    def __init__(self, directory, threads, capacity=1):
        self.directory, self.threads, self.capacity = directory, threads, capacity
        self.space = make_space()

    def __call__(self, candidates, observer=None, **budget):
        ledger = Ledger(str(self.directory), "demo")
        value = near(0.44, method="task_arithmetic")
        executor = self.threads(lambda recipe: {"x": value(recipe)}, self.capacity)
        ending = search(
            build_study(ledger, self.space),
            self.space,
            lambda number: make_sampler("tpe", 5, None, number),
            ledger,
            executor,
            OBJECTIVE,
            Provenance("demo"),
            Budget(candidates, **budget),
            observer,
            line_search=True,
        )
        return ending, [(row.trial, row.origin, dict(row.recipe.scaling)) for row in ledger.rows()]


def test_the_search_measures_the_line_before_the_sampler_proposes(tmp_path, threads):
    ending, rows = Run(tmp_path / "one", threads)(12)
    assert ending == "candidates"
    assert len(rows) == 12
    assert [origin for _, origin, _ in rows[:2]] == ["anchor", "anchor"]
    line = [round(scaling["a"], 6) for _, _, scaling in rows if scaling["a"] == scaling["b"]]
    assert line == pytest.approx([1.0, 0.3, 0.375, 0.225, 0.45, 0.6])
    _, parallel = Run(tmp_path / "four", threads, 4)(16)
    shared = sorted(round(scaling["a"], 6) for _, _, scaling in parallel if scaling["a"] == scaling["b"])
    assert shared == pytest.approx([0.225, 0.3, 0.375, 0.45, 0.6, 1.0])


@pytest.mark.parametrize("candidates", [8, 12])  # with room for the line alone, and for the sampler beside it
@pytest.mark.parametrize("after", range(1, 8))
def test_a_search_that_is_interrupted_anywhere_on_the_line_measures_what_an_unbroken_one_does(
    tmp_path, threads, candidates, after
):
    _, unbroken = Run(tmp_path / "unbroken", threads)(candidates)
    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path / "broken", threads)(candidates, Interrupt(after))
    _, broken = Run(tmp_path / "broken", threads)(candidates)
    assert broken == unbroken


def test_budgets_end_the_line_too(tmp_path, threads):
    ending, rows = Run(tmp_path, threads)(12, examples=350)  # 100 a candidate
    assert ending == "examples"
    assert len(rows) == 4


@pytest.mark.parametrize("capacity", [1, 3])
def test_a_small_budget_and_patience_are_for_the_line_first(tmp_path, threads, capacity):
    """Six recipes of two baselines' budget of eight; the third of a direction is seen whatever failed to improve before."""
    _, rows = Run(tmp_path / "budget", threads, capacity)(6)
    line = {round(scaling["a"], 6) for _, _, scaling in rows if scaling["a"] == scaling["b"]}
    assert line == {1.0, 0.3, 0.375, 0.225, 0.45, 0.6}
    ending, rows = Run(tmp_path / "patience", threads, capacity)(99, patience=1, min_delta=9.0)
    line = {round(scaling["a"], 6) for _, _, scaling in rows if scaling["a"] == scaling["b"]}
    assert line == {1.0, 0.3, 0.375, 0.225, 0.45, 0.6}
    assert ending == "plateau"

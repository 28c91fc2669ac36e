import numpy as np
import pytest

from search.ledger.row import Row
from search.objective import make_objective
from search.resolution import clear_best, gap, resolution

TASKS = ("a", "b")


def row(name, scores, error=0.05, origin="anchor", violations=None):
    return Row(
        "c",
        name,
        "validation",
        origin,
        "complete",
        "ties",
        violations=violations or {},
        objective=float(np.mean(list(scores.values()))),
        scores=scores,
        standard_errors=dict.fromkeys(scores, error),
    )


@pytest.fixture
def pair():
    random = np.random.default_rng(0)
    own = {task: random.random(50).astype(np.float32) for task in TASKS}
    others = {task: own[task] + 0.1 * random.standard_normal(50).astype(np.float32) for task in TASKS}
    rows = [row(name, {t: float(v.mean()) for t, v in values.items()}) for name, values in (("x", own), ("y", others))]
    return rows, own, others


@pytest.mark.parametrize(
    ("name", "weights"), [("mean", {"a": 0.5, "b": 0.5}), ("b", {"b": 1.0}), ("weighted", {"a": 0.25, "b": 0.75})]
)
def test_the_error_is_that_of_the_examples_differences(pair, name, weights):
    (one, other), own, others = pair
    objective = make_objective(name, TASKS, weights={"a": 1.0, "b": 3.0} if name == "weighted" else None)
    found = gap(one, other, own, others, objective)
    variance = sum(w**2 * np.var(own[t].astype(float) - others[t], ddof=1) / 50 for t, w in weights.items())
    assert found.standard_error == pytest.approx(np.sqrt(variance), rel=1e-4)
    assert found.is_paired
    assert found.value == pytest.approx(one.objective - other.objective)


def test_where_examples_were_not_kept_both_errors_add_up(pair):
    (one, other), own, _ = pair
    found = gap(one, other, own, {}, make_objective("mean", TASKS))
    assert not found.is_paired
    assert found.standard_error == pytest.approx(np.sqrt(4 * 0.25 * 0.05**2), rel=1e-5)


def test_the_resolution_is_twice_the_error_and_0_where_none_is_known(pair):
    (one, other), own, others = pair
    objective, values = make_objective("mean", TASKS), {"x": own, "y": others}
    assert resolution([one, other], values, objective) == pytest.approx(
        2 * gap(one, other, own, others, objective).standard_error
    )
    unknown = [row(name, {"a": 1.0, "b": 0.5}, float("nan")) for name in "xy"]
    assert resolution(unknown, {}, objective) == 0.0
    assert resolution([one], values, objective) == 0.0


def ranked(*proposals, errors=0.05, default=True):
    """Proposals and a default of 0.5 on two tasks of 50 examples each, and what was kept of the default's examples."""
    rows = [row(name, dict.fromkeys(TASKS, score), errors, "search", more) for name, score, more in proposals]
    rows += [row("default", dict.fromkeys(TASKS, 0.5), errors)] if default else []
    return sorted(rows, key=lambda one: -one.objective)


def right(count):
    """The first so many of 50 examples are right."""
    return {task: (np.arange(50) < count).astype(np.float32) for task in TASKS}


def test_a_proposal_is_gone_on_from_only_where_validation_can_see_that_it_is_better():
    objective = make_objective("mean", TASKS)

    def chosen(*proposals, kept=(), **more):
        values = {"default": right(25)} | dict(kept)
        return clear_best(ranked(*proposals, **more), lambda name: values.get(name, {}), objective).candidate

    # one example more of each task: 0.02 with an error of 0.014; four more: 0.08 with one of 0.027
    near, far = ("near", 0.52, None), ("far", 0.58, None)
    kept = {"near": right(26), "far": right(29)}
    assert chosen(near, kept=kept) == "default"
    assert chosen(near, far, kept=kept) == "far"
    assert chosen(("worse", 0.4, None)) == "default"
    # of an unknown error any difference counts; unpaired, both errors do
    assert chosen(near, errors=float("nan")) == "near"
    assert chosen(far) == "default"
    assert chosen(near, default=False) == "near"


def test_a_proposal_that_breaks_no_constraint_goes_before_a_default_that_does():
    rows = [
        row("holds", dict.fromkeys(TASKS, 0.4), origin="search"),
        row("breaks", dict.fromkeys(TASKS, 0.5), 0.05, "anchor", {"drop": 0.1}),
    ]
    assert clear_best(rows, lambda name: {}, make_objective("mean", TASKS)).candidate == "holds"

import numpy as np
import pytest

from search.ledger.row import Row
from search.objective import make_objective
from search.resolution import gap, resolution

TASKS = ("a", "b")


def row(name, scores, error=0.05):
    return Row(
        "c",
        name,
        "validation",
        "anchor",
        "complete",
        "ties",
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

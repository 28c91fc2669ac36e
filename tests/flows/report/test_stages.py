import numpy as np
import pytest

from flows.report.stages import as_markdown, cells, for_page, in_a_line, smallest_visible, stages
from search.ledger.row import Row
from search.objective import make_objective

OBJECTIVE = make_objective("mean", ["a", "b"])
RANDOM = np.random.default_rng(0)
AVERAGE = {task: (RANDOM.random(400) < 0.6).astype(np.float32) for task in "ab"}
BEST = {task: np.maximum(own, RANDOM.random(400) < 0.2).astype(np.float32) for task, own in AVERAGE.items()}
FOUND = {task: np.where(np.arange(400) == 7, 1 - own, own).astype(np.float32) for task, own in BEST.items()}
VALUES = {"average": AVERAGE, "best": BEST, "found": FOUND, "worse": AVERAGE, "made": BEST}


def row(name, method, origin="anchor", **more):
    scores = {task: float(values.mean()) for task, values in VALUES[name].items()}
    return Row(
        "c",
        name,
        "validation",
        origin,
        "complete",
        method,
        members=("a", "b"),
        scaling={"a": 1.0, "b": 1.0},
        objective=float(np.mean(list(scores.values()))),
        scores=scores,
        standard_errors=dict.fromkeys("ab", 0.02),
        examples=dict.fromkeys("ab", 400),
        cpu_hours=0.1,
        **more,
    )


LEDGER = [
    row("average", "average"),
    row("best", "regmean"),
    row("worse", "ties", "search"),
    row("made", "distilled", "search", parameters={"start": "best"}, proxies={"distil:steps": 400.0}),
]


def found_in(rows):
    return {stage.name: stage for stage in stages(rows, OBJECTIVE, lambda name: VALUES[name], {"Distillation": 12.0})}


def test_each_stage_is_paired_with_the_best_before_it():
    found = found_in(LEDGER)
    assert list(found) == ["plain average", "methods at their defaults", "search", "distillation"]
    assert found["plain average"].gain is None
    gain = found["methods at their defaults"].gain
    assert gain.value == pytest.approx(LEDGER[1].objective - LEDGER[0].objective)
    variance = sum(np.var(BEST[task].astype(float) - AVERAGE[task], ddof=1) / 400 for task in "ab")
    assert gain.standard_error == pytest.approx(np.sqrt(variance) / 2, rel=1e-4)
    assert found["methods at their defaults"].verdict == ""


def test_a_stage_that_gained_nothing_is_said_to():
    found = found_in(LEDGER)
    assert found["search"].row.candidate == "best"
    assert found["search"].verdict == found["distillation"].verdict == "nothing gained"
    assert "nothing gained" in in_a_line(found["search"], 100)
    assert cells(found["distillation"], 100)[-1] == "400 steps, 12 s of distillation"
    if LEDGER[1].objective < row("found", "ties", "search").objective:
        better = found_in([*LEDGER, row("found", "ties", "search")])
        assert better["search"].verdict == "within the error"


def test_what_no_stage_did_is_not_there():
    assert list(found_in(LEDGER[:2])) == ["plain average", "methods at their defaults"]
    assert list(found_in([])) == []


def test_the_tables_say_how_small_a_difference_validation_can_see():
    found = list(found_in(LEDGER).values())
    least = smallest_visible(LEDGER, OBJECTIVE, lambda name: VALUES[name])
    assert least == pytest.approx(2 * found[1].gain.standard_error)
    text = as_markdown(found, 100, least)
    assert f"differences of {100 * least:.2g}" in text
    assert text.count("|") == 6 * (4 + 2)
    assert for_page(found, 100, least)["rows"][1][0] == "methods at their defaults"


def test_what_distillation_gained_is_told_beside_its_start():
    ledger = [*LEDGER[:2], row("found", "ties", "search"), LEDGER[3]]
    made = found_in(ledger)["distillation"]
    assert made.gain.value == pytest.approx(LEDGER[3].objective - LEDGER[1].objective)
    assert "over its start" in in_a_line(made, 100)

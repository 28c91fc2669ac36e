import pytest

from flows.report.figures import Palette, front
from flows.report.page import render
from search.ledger.row import Row


def row(name, **objectives):
    first = next(iter(objectives.values()))
    return Row(
        "c",
        name,
        "validation",
        "search",
        "complete",
        "ties",
        ("a",),
        {"a": 1.0},
        objective=first,
        objectives=objectives,
        scores={"x": first},
    )


def test_the_front_is_drawn_over_all_candidates():
    rows = [row("high", mean=0.9, worst=0.2), row("even", mean=0.5, worst=0.6), row("inside", mean=0.4, worst=0.1)]
    figure = front(rows, Palette(rows))
    line, points = figure.data
    assert list(line.x) == pytest.approx([90, 50])
    assert list(line.y) == pytest.approx([20, 60])
    assert sorted(points.x) == pytest.approx([40, 50, 90])
    assert figure.layout.xaxis.title.text == "mean × 100"
    assert "Pareto front" in render(rows, tasks=["x"])


def test_one_objective_has_no_front():
    rows = [row("one", mean=0.9), row("two", mean=0.5)]
    assert front(rows, Palette(rows)) is None
    assert "Pareto front" not in render(rows, tasks=["x"])

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from search.budget import Budget, Tally, busy_seconds
from search.ledger.row import Row


def row(objective, examples=10, violations=None, **objectives):
    status = "failed" if objective is None else "complete"
    return Row(
        "c",
        f"{objective}",
        "validation",
        "search",
        status,
        "ties",
        objective=objective,
        objectives=objectives,
        violations=violations or {},
        examples={"x": examples, "y": examples},
        cpu_hours=0.5,
        gpu_hours=0.25,
    )


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_rate_and_time_left(clock):
    tally = Tally(Budget(100, seconds=500.0), [row(0.1)], 100, clock=clock)
    assert tally.progress().per_minute is None
    assert tally.progress().seconds_left is None
    for second in range(1, 12):
        clock.now = 2.0 * second
        tally.add(row(0.1))
    progress = tally.progress()
    assert (progress.done, progress.total, progress.examples) == (12, 100, 240)
    assert progress.per_minute == pytest.approx(30)
    assert progress.seconds_left == pytest.approx(176)
    few = Tally(Budget(100, seconds=50.0, examples=400), [row(0.1)], 100, clock=clock)
    for _ in range(3):
        clock.now += 3
        few.add(row(0.1))
    assert few.progress().seconds_left == pytest.approx(41)  # 50 seconds, 9 of them gone; the examples last 48
    hours = Tally(Budget(100, gpu_hours=3.0), [row(0.1)], 100, clock=clock)
    for _ in range(3):
        clock.now += 4
        hours.add(row(0.1))
    assert hours.progress().seconds_left == pytest.approx(8 * 4)  # 2 of 3 hours are left: eight candidates


@pytest.mark.parametrize(
    ("budget", "under_way", "ending"),
    [
        (Budget(5), 0, None),
        (Budget(5), 2, "candidates"),
        (Budget(9, examples=61), 0, None),
        (Budget(9, examples=61), 1, "examples"),
        (Budget(9, gpu_hours=0.75), 0, "gpu_hours"),
        (Budget(9, gpu_hours=1.0), 0, None),
        (Budget(9, gpu_hours=1.0), 1, "gpu_hours"),
        (Budget(9, cpu_hours=1.5), 0, "cpu_hours"),
        (Budget(9, cpu_hours=2.5), 1, None),
        (Budget(9, seconds=4.0), 0, "seconds"),
        (Budget(9, seconds=6.0), 0, None),
        (Budget(9, patience=2), 0, "plateau"),
        (Budget(9, patience=3), 0, None),
    ],
)
def test_what_is_spent(clock, budget, under_way, ending):
    tally = Tally(budget, [row(0.5), row(0.4)], budget.candidates, clock=clock)
    clock.now = 5.0
    tally.add(row(None))
    assert tally.spent(under_way) == ending


def test_improvements_of_any_objective_count_and_broken_constraints_do_not():
    tally = Tally(Budget(99, patience=2, min_delta=0.1), [], 99)
    steps = [
        (row(0.5, a=0.5, b=0.5), None),
        (row(0.5, a=0.5, b=0.55), None),
        (row(0.4, a=0.4, b=0.65), None),  # b by more than 0.1
        (row(0.9, a=0.9, b=0.9, violations={"x": 0.2}), None),
        (row(0.55, a=0.55, b=0.7), "plateau"),
        (row(0.7, a=0.7, b=0.1), None),
    ]
    for step, ending in steps:
        tally.add(step)
        assert tally.spent() == ending
    assert tally.progress().best.objective == 0.7


def test_patience_counts_proposals_and_asks_once_what_an_improvement_is():
    requested = []

    def least():
        requested.append(None)
        return 0.1

    tally = Tally(Budget(99, patience=2, min_delta=least), [], 99)
    for value in (0.5, 0.2, 0.55, 0.3):
        tally.add(replace(row(value), origin="anchor"))
        assert tally.spent() is None
    assert not requested
    for value, ending in ((0.6, None), (0.67, None), (0.7, None), (0.76, "plateau")):
        tally.add(row(value))
        assert tally.spent() == ending
    assert len(requested) == 1


def test_the_time_of_earlier_runs_counts_without_the_pauses(clock):
    start = datetime(2031, 1, 1, tzinfo=UTC)

    def measured(begin, end):
        return replace(row(0.1), started=start + timedelta(seconds=begin), finished=start + timedelta(seconds=end))

    earlier = [measured(0, 10), measured(5, 12), measured(1000, 1008), measured(1002, 1004)]
    assert busy_seconds([]) == 0.0
    assert busy_seconds(reversed(earlier)) == 20.0
    tally = Tally(Budget(100, seconds=30.0), earlier, 100, clock=clock)
    clock.now = 9.0
    assert tally.spent() is None
    clock.now = 10.0
    assert tally.spent() == "seconds"

"""When a search ends: what it may spend, what it has spent, and whether it still gets anywhere."""

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Literal

from search.ledger.row import Row
from search.objective import best, point, violation

Ending = Literal["candidates", "examples", "seconds", "gpu_hours", "cpu_hours", "plateau", "exhausted", "stopped"]
"""Why a search ended: its candidates, examples, time or hours of processors are spent; its best has not got better
for long; its sampler has nothing new to propose; somebody asked for it."""

HOURS: tuple[Literal["gpu_hours", "cpu_hours"], ...] = ("gpu_hours", "cpu_hours")
"""Columns of what a candidate cost."""
RECENT = 50
"""How many rows the rate is taken from."""


@dataclass(frozen=True)
class Budget:
    """When a search ends. Whatever ends it, what was proposed before is measured.

    Args:
        candidates: Rows of baselines and proposals, failed ones included; all baselines are measured in any case.
        seconds: After so many seconds nothing new is proposed, those of earlier runs included.
        examples: After so many evaluated examples, all tasks together, nothing new is proposed.
        gpu_hours: After so many GPU hours of its candidates nothing new is proposed.
        cpu_hours: The same of CPUs.
        patience: So many proposals in a row that did not improve the best are a plateau; baselines do not count.
        min_delta: By how much more than the best so far a proposal must be to improve it, in any of the objectives; what says
            it when the first proposal is there, once.
        identical_errors: So many equal errors in a row are no accident.
        retries: How often a candidate is put back after its worker was lost.
        duplicates: After so many proposals in a row that are known already, the space counts as exhausted.
    """

    candidates: int
    seconds: float | None = None
    examples: int | None = None
    gpu_hours: float | None = None
    cpu_hours: float | None = None
    patience: int | None = None
    min_delta: float | Callable[[], float] = 0.0
    identical_errors: int = 5
    retries: int = 3
    duplicates: int = 100


@dataclass(frozen=True)
class Progress:
    """How a search gets on.

    Args:
        done: Rows of baselines and proposals so far.
        total: How many there will be when the budget's candidates are spent.
        examples: Examples evaluated for them.
        best: The best row so far; None while none is complete.
        per_minute: Rows a minute, lately; None before there are two.
        seconds_left: Until one of the budgets is spent, at that rate; None where that is not known.
    """

    done: int
    total: int
    examples: int
    best: Row | None
    per_minute: float | None
    seconds_left: float | None


def busy_seconds(rows: Iterable[Row]) -> float:
    """Wall time in which at least one of the rows was measured: what a search took, without the pauses between its runs."""
    total, end = 0.0, datetime.min.replace(tzinfo=UTC)
    for row in sorted(rows, key=lambda row: row.started):
        if row.finished > end:
            total += max(0.0, (row.finished - max(row.started, end)).total_seconds())  # clocks of nodes may differ
            end = row.finished
    return total


class Tally:
    """What a search has spent and reached; every row costs the same to add, however many there are.

    Args:
        budget: What it may spend.
        rows: Baselines and proposals that are in the ledger already, in the order in which they finished.
        total: How many rows there will be.
        split: The split that rows are measured on.
        clock: Seconds since some moment.
    """

    def __init__(
        self,
        budget: Budget,
        rows: Iterable[Row],
        total: int,
        split: str = "validation",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._budget, self._split, self._clock = budget, split, clock
        self.total, self.done, self.examples = total, 0, 0
        self.best: Row | None = None
        self._dearest = 0
        self._hours = dict.fromkeys(HOURS, 0.0)
        self._longest = dict.fromkeys(HOURS, 0.0)
        self._since = 0
        self._marks: tuple[float, ...] = ()
        self._recent: deque[tuple[float, int]] = deque(maxlen=RECENT)
        earlier = list(rows)
        for row in earlier:
            self._count(row)
        self._started = clock() - busy_seconds(earlier)

    def add(self, row: Row) -> None:
        """Counts a row."""
        self._count(row)
        self._recent.append((self._clock(), self.examples))

    def spent(self, under_way: int = 0) -> Ending | None:
        """Which budget leaves nothing for another candidate, if one does.

        Args:
            under_way: Candidates that will be counted in any case.
        """
        limits = self._budget
        if self.done + under_way >= self.total:
            return "candidates"
        if limits.examples is not None and self.examples + under_way * self._dearest >= limits.examples:
            return "examples"
        for kind in HOURS:
            limit = getattr(limits, kind)
            if limit is not None and self._hours[kind] + under_way * self._longest[kind] >= limit:
                return kind
        if limits.seconds is not None and self._clock() - self._started >= limits.seconds:
            return "seconds"
        if limits.patience is not None and self._since >= limits.patience:
            return "plateau"
        return None

    def progress(self) -> Progress:
        """How it stands."""
        rate, left = None, []
        if len(self._recent) > 1:
            (first, before), (last, now) = self._recent[0], self._recent[-1]
            span = max(last - first, 1e-9)
            rate = (len(self._recent) - 1) / span
            left.append(max(0, self.total - self.done) / rate)
            if self._budget.examples is not None and now > before:
                left.append(max(0, self._budget.examples - now) * span / (now - before))
            for kind, spent in self._hours.items():
                limit = getattr(self._budget, kind)
                if limit is not None and self.done and spent:
                    left.append(max(0.0, limit - spent) * self.done / spent / rate)
            if self._budget.seconds is not None:
                left.append(max(0.0, self._budget.seconds - (self._clock() - self._started)))
        return Progress(
            self.done, self.total, self.examples, self.best, rate and 60 * rate, min(left) if left else None
        )

    def _count(self, row: Row) -> None:
        cost = sum(row.examples.values())
        self.done += 1
        self.examples += cost
        self._dearest = max(self._dearest, cost)
        for kind in HOURS:
            hours = getattr(row, kind) or 0.0
            self._hours[kind] += hours
            self._longest[kind] = max(self._longest[kind], hours)
        self.best = next(iter(best([self.best, row] if self.best else [row], split=self._split)), None)
        is_proposal = row.origin != "anchor"
        self._since = self._since + 1 if is_proposal else 0
        if row.objective is None or violation(row) > 0:
            return
        here, marks = point(row), self._marks or (float("-inf"),) * len(point(row))
        least = self._min_delta if is_proposal else 0.0
        if any(value > mark + least for value, mark in zip(here, marks, strict=True)):
            self._since = 0
            self._marks = tuple(
                value if value > mark + least else mark for value, mark in zip(here, marks, strict=True)
            )

    @cached_property
    def _min_delta(self) -> float:
        given = self._budget.min_delta
        return given() if callable(given) else given

from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from merging.recipe import Recipe
from search.ledger.row import Row
from search.subsets import dpp_kernel
from search.subsets.choose_subsets import select

TASKS = ("movie", "amazon", "nyt", "tweets")
HEIGHT = {
    "average": 0.59,
    "task_arithmetic": 0.61,
    "ties": 0.62,
    "fisher": 0.6,
    "gradient_matching": 0.63,
    "regmean": 0.66,
}
PARAMETER = {
    "ties": ("density", 0.2),
    "fisher": ("floor", 1e-6),
    "gradient_matching": ("delta", 0.1),
    "regmean": ("rho", 0.9),
}
START = datetime(2026, 1, 5, 12, tzinfo=UTC)


class LedgerMaker:
    """Plausible rows without running anything: equal arguments give equal rows."""

    def __init__(self, tasks=TASKS):
        self.tasks = tasks

    def row(self, method, scaling, score, *, origin="search", split="validation", at=0, worker=0, **changes):
        generator = np.random.default_rng(at)
        scores = {task: float(np.clip(score + 0.03 * generator.normal(), 0, 1)) for task in self.tasks}
        parameters = changes.pop("parameters", {})
        seconds = 3.0 + generator.exponential(0.6)
        started = START + timedelta(seconds=3.9 * (at // 2))
        return Row(
            **{
                "campaign": "sentiment",
                "candidate": Recipe(method, scaling, parameters).identity,
                "split": split,
                "origin": origin,
                "status": "complete",
                "method": method,
                "members": tuple(sorted(scaling)),
                "scaling": scaling,
                "parameters": parameters,
                "objective": sum(scores.values()) / len(scores) if origin in ("anchor", "search") else None,
                "scores": scores,
                "standard_errors": dict.fromkeys(self.tasks, 0.012),
                "merge_seconds": 0.05 + generator.exponential(0.03),
                "evaluate_seconds": seconds,
                "started": started,
                "finished": started + timedelta(seconds=seconds),
                "worker": f"node-{worker}:40{worker} cpu",
                **changes,
            }
        )

    def references(self, split="validation", origin="reference"):
        members = [
            self.row("member", {task: 1.0}, 0.55, split=split, origin=origin, at=i) for i, task in enumerate(self.tasks)
        ]
        return [self.row("base", {}, 0.41, split=split, origin=origin, at=9), *members]

    def candidates(self, count, methods=tuple(HEIGHT)):
        generator = np.random.default_rng(1)
        rows = []
        for at in range(count):
            anchor = at < len(methods)
            method = methods[at % len(methods)]
            size = len(self.tasks) if anchor else int(generator.integers(2, len(self.tasks) + 1))
            names = sorted(generator.choice(self.tasks, size, replace=False).tolist())
            scaling = {name: 1.0 if anchor else float(generator.uniform(0, 1.5)) for name in names}
            score = HEIGHT[method] + 0.03 * size / 4 - 0.08 * sum((a - 0.9) ** 2 for a in scaling.values()) / size
            name, default = PARAMETER.get(method, (None, 0))
            parameters = {name: default if anchor else float(default * generator.uniform(0.2, 1.1))} if name else {}
            origin = "anchor" if anchor else "search"
            row = self.row(method, scaling, score, origin=origin, at=at, worker=at % 2, parameters=parameters, trial=at)
            rows.append(row)
        return rows

    def failed(self, error, at=50, method="ties"):
        return self.row(
            method,
            {self.tasks[-2]: 0.1 + at},
            0,
            at=at,
            status="failed",
            error=error,
            objective=None,
            scores={},
            standard_errors={},
        )

    def final(self, row, at):
        return self.row(
            row.method, dict(row.scaling), sum(row.scores.values()) / len(self.tasks) - 0.01, origin="final", split="test",
            at=at, parameters=dict(row.parameters),
        )  # fmt: skip

    def full(self, count=64):
        rows = [*self.references(), *self.candidates(count)]
        rows += [self.failed("MethodError: α cancel the denominator in 12 % of the entries", 51 + i) for i in range(3)]
        best = sorted((row for row in rows if row.objective is not None), key=lambda row: -row.objective)
        tested = {row.candidate: row for row in best[:3]}
        averages = [row for row in rows if row.origin == "anchor" and row.method == "average"]
        for row in [*(next(row for row in best if row.method == method) for method in HEIGHT), *averages]:
            tested.setdefault(row.candidate, row)
        finals = [self.final(row, 200 + i) for i, row in enumerate(tested.values())]
        return [*rows, *self.references("test", "final"), *finals]

    def selection(self):
        shared = np.random.default_rng(0).normal(size=(30, 8))
        rows = {task: shared + 0.8 * np.random.default_rng(i).normal(size=(30, 8)) for i, task in enumerate(self.tasks)}
        q = dict(zip(self.tasks, [0.42, 0.31, 0.24, 0.55] * len(self.tasks), strict=False))
        return select(self.tasks, "dpp-map", quality=q, similarity=dpp_kernel.similarity_from_representations(rows))


@pytest.fixture(scope="session")
def make():
    return LedgerMaker()


@pytest.fixture(scope="session")
def make_of():
    """Ledgers of so many members and tasks."""
    return lambda count: LedgerMaker(tuple(f"task-{number:02d}" for number in range(count)))

"""What a search hands to whoever evaluates candidates, and what it gets back: any executor will do."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal, Protocol

from merging.evaluation.steps import EvaluationPlan
from merging.evaluation.steps import Measurement as Measurement
from merging.recipe import Recipe
from search.budget import Progress
from search.ledger.row import Origin, Row

Policy = Literal["none", "wilcoxon", "halving"]
"""What gives up candidates before they are measured on everything: see `search.early_stopping.wilcoxon`."""

PARTIAL = "partial:objective"
"""The proxy of a pruned row: the objective over the examples that it was measured on."""

ANCHORS = "anchors"
"""The split of rows that were measured on a few examples of validation, their scores estimates of the whole."""


def searched_split(rows: Iterable[Row]) -> str:
    """The split that a search measured its candidates on: `ANCHORS` where there are such rows, else validation."""
    return ANCHORS if any(row.split == ANCHORS for row in rows) else "validation"


@dataclass(frozen=True)
class Candidate:
    """A recipe to measure.

    Args:
        recipe: What to merge; methods `base` and `member` stand for the unmerged models of reference rows.
        split: What to measure it on: `validation`, `test`, or `ANCHORS`.
        origin: Why.
        trial: Number of its Optuna trial; None where no sampler hears of it.
    """

    recipe: Recipe
    split: str = "validation"
    origin: Origin = "search"
    trial: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a candidate: exactly one of `measurement` and `error`.

    Args:
        candidate: As it was submitted.
        measurement: What was found.
        error: What failed.
        lost: The worker was lost, not the candidate's fault: it is tried again.
        started: When work on it began.
        finished: When its last score was there.
        cpu_hours: CPUs held for it, times hours; None where nobody counts.
        gpu_hours: The same of GPUs.
    """

    candidate: Candidate
    measurement: Measurement | None = None
    error: BaseException | None = None
    lost: bool = False
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    finished: datetime = field(default_factory=lambda: datetime.now(UTC))
    cpu_hours: float | None = None
    gpu_hours: float | None = None


class Executor(Protocol):
    """Evaluates candidates, several at once."""

    @property
    def capacity(self) -> int:
        """How many candidates it can work on at once; may change as workers come and go."""
        ...

    def submit(self, candidate: Candidate) -> None:
        """Takes a candidate and returns at once."""
        ...

    def wait(self, timeout: float) -> list[Outcome]:
        """The outcomes there are, each once; waits up to `timeout` seconds for the first."""
        ...


class Planner(Protocol):
    """Says on which examples candidates are measured, and learns from what was found."""

    def plan(self, candidate: Candidate) -> EvaluationPlan | None:
        """How to measure a candidate, asked when an evaluator is free for it; None for every example at once."""
        ...

    def learn(self, outcome: Outcome) -> Outcome:
        """What to make of an outcome, asked before its row is written."""
        ...


class Observer(Protocol):
    """Is told how a search gets on."""

    def on_start(self, progress: Progress) -> None:
        """The search begins or goes on."""
        ...

    def on_row(self, row: Row, progress: Progress) -> None:
        """A row is in the ledger."""
        ...


@dataclass(frozen=True)
class Provenance:
    """What every row of a campaign says of where it comes from: see `Row`."""

    campaign: str
    code: str = ""
    data: str = ""


def make_row(
    outcome: Outcome,
    objectives: Mapping[str, float],
    error: str | None,
    provenance: Provenance,
    violations: Mapping[str, float] | None = None,
) -> Row:
    """The ledger's row of an outcome; failed where there is an error, pruned where measuring was given up."""
    candidate, recipe = outcome.candidate, outcome.candidate.recipe
    measurement = outcome.measurement or Measurement({})
    scores = measurement.scores
    proxies = {f"entropy:{task}": score.entropy for task, score in scores.items() if math.isfinite(score.entropy)}
    objective = next(iter(objectives.values()), None)
    if measurement.pruned and objective is not None:
        proxies[PARTIAL] = objective
    return Row(
        campaign=provenance.campaign,
        candidate=recipe.identity,
        split=candidate.split,
        origin=candidate.origin,
        status="failed" if error is not None else "pruned" if measurement.pruned else "complete",
        method=recipe.method,
        members=recipe.members,
        scaling={key: recipe.scaling[key] for key in sorted(recipe.scaling)},
        parameters=dict(recipe.parameters),
        trial=candidate.trial,
        error=error,
        objective=objective if error is None and not measurement.pruned else None,
        objectives=dict(objectives) if error is None and not measurement.pruned else {},
        violations=dict(violations or {}),
        scores={task: score.value for task, score in scores.items()},
        standard_errors={task: score.standard_error for task, score in scores.items()},
        losses={task: score.loss for task, score in scores.items()},
        expected_errors={task: score.expected_error for task, score in scores.items()},
        examples={task: score.examples for task, score in scores.items()},
        proxies=proxies | dict(measurement.proxies),
        report=dict(measurement.report),
        merge_seconds=measurement.merge_seconds,
        evaluate_seconds=measurement.evaluate_seconds,
        cpu_hours=outcome.cpu_hours,
        gpu_hours=outcome.gpu_hours,
        started=outcome.started,
        finished=outcome.finished,
        worker=measurement.worker,
        code=provenance.code,
        data=provenance.data,
    )

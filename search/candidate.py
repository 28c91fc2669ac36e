"""What a search hands to whoever evaluates candidates, and what it gets back: any executor will do."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol

from merging.recipe import Recipe
from merging.tasks.base import Score, Split
from search.schema import Origin, Row


@dataclass(frozen=True)
class Candidate:
    """A recipe to measure.

    Args:
        recipe: What to merge; methods `base` and `member` stand for the unmerged models of reference rows.
        split: What to measure it on.
        origin: Why.
        trial: Number of its Optuna trial; None where no sampler hears of it.
    """

    recipe: Recipe
    split: Split = "validation"
    origin: Origin = "search"
    trial: int | None = None


@dataclass(frozen=True)
class Measurement:
    """What an evaluator found.

    Args:
        scores: Task → score.
        merge_seconds: Wall time of the merge.
        evaluate_seconds: Wall time of the evaluation, all tasks.
        worker: Host, process and device that did it.
        report: The method's own figures on the merge.
    """

    scores: Mapping[str, Score]
    merge_seconds: float | None = None
    evaluate_seconds: float | None = None
    worker: str | None = None
    report: Mapping[str, float] = field(default_factory=dict)


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
    """

    candidate: Candidate
    measurement: Measurement | None = None
    error: BaseException | None = None
    lost: bool = False
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    finished: datetime = field(default_factory=lambda: datetime.now(UTC))


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


class Observer(Protocol):
    """Is told how a search gets on."""

    def on_start(self, total: int) -> None:
        """The search begins or goes on; it will have `total` rows when its budget is spent."""
        ...

    def on_row(self, row: Row, best: Row | None, done: int, total: int) -> None:
        """A row is in the ledger; `best` is the best of all so far, None while none is complete."""
        ...


@dataclass(frozen=True)
class Provenance:
    """What every row of a campaign says of where it comes from: see `Row`."""

    campaign: str
    code: str = ""
    data: str = ""


def make_row(outcome: Outcome, objective: float | None, error: str | None, provenance: Provenance) -> Row:
    """The ledger's row of an outcome; failed where there is an error."""
    candidate, recipe = outcome.candidate, outcome.candidate.recipe
    scores = dict(outcome.measurement.scores) if outcome.measurement else {}
    found = outcome.measurement or Measurement({})
    return Row(
        campaign=provenance.campaign,
        candidate=recipe.identity,
        split=candidate.split,
        origin=candidate.origin,
        status="complete" if error is None else "failed",
        method=recipe.method,
        members=recipe.members,
        scaling={member: recipe.scaling[member] for member in recipe.members},
        parameters=dict(recipe.parameters),
        trial=candidate.trial,
        error=error,
        objective=objective if error is None else None,
        scores={task: score.value for task, score in scores.items()},
        standard_errors={task: score.standard_error for task, score in scores.items()},
        losses={task: score.loss for task, score in scores.items()},
        expected_errors={task: score.expected_error for task, score in scores.items()},
        examples={task: score.examples for task, score in scores.items()},
        report=dict(found.report),
        merge_seconds=found.merge_seconds,
        evaluate_seconds=found.evaluate_seconds,
        started=outcome.started,
        finished=outcome.finished,
        worker=found.worker,
        code=provenance.code,
        data=provenance.data,
    )

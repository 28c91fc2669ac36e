"""The search itself: ask the sampler, keep every evaluator busy, write the row, tell the study."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

from optuna import Study, Trial
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import TrialState

from merging.errors import SearchError, SettingsError
from merging.recipe import Recipe
from search.candidate import Candidate, Executor, Observer, Outcome, Provenance
from search.flight import Flight, judge
from search.ledger import Ledger
from search.objective import Objective, best
from search.schema import Origin, Row
from search.space import Space
from search.study import CANDIDATE, DUPLICATE, ORIGIN

Ending = Literal["budget", "seconds", "exhausted"]
"""Why a search ended: its candidates are spent; its time is; its sampler has nothing new to propose."""


@dataclass(frozen=True)
class Budget:
    """When a search ends.

    Args:
        candidates: Rows of anchors and proposals, failed ones included; all anchors are measured in any case.
        seconds: After so many seconds of this run nothing new is proposed; what is under way is finished.
        identical_errors: So many equal errors in a row are no accident.
        retries: How often a candidate is put back after its worker was lost.
        duplicates: After so many proposals in a row that are known already, the space counts as exhausted.
    """

    candidates: int
    seconds: float | None = None
    identical_errors: int = 5
    retries: int = 3
    duplicates: int = 100


def search(
    study: Study,
    space: Space,
    sampler: Callable[[int], BaseSampler],
    ledger: Ledger,
    executor: Executor,
    objective: Objective,
    provenance: Provenance,
    budget: Budget,
    observer: Observer | None = None,
) -> Ending:
    """Measures the anchors, then what the sampler proposes, until the budget is spent.

    It can be killed at any moment: a row is durable before the study is told of it, and `open_study` finds
    out the rest. With an executor of capacity 1, a search that was killed and resumed leaves the rows of an
    unbroken one.

    Args:
        study: As `open_study` yields it.
        space: What may be proposed.
        sampler: Makes the sampler for the trial of this number.
        ledger: Where rows go; candidates that are in it are not measured again.
        executor: Measures candidates.
        objective: What to maximise.
        provenance: What every row says of the campaign.
        budget: When to end.
        observer: Is told of every row.

    Raises:
        SearchError: Every anchor failed, or candidate after candidate with the same error.
        SettingsError: The sampler cannot propose anything from this space.
        StorageError: A row cannot be written.
    """
    return _Search(study, space, sampler, ledger, executor, objective, provenance, budget, observer).run()


class _Search:
    """The state of one run."""

    def __init__(
        self,
        study: Study,
        space: Space,
        sampler: Callable[[int], BaseSampler],
        ledger: Ledger,
        executor: Executor,
        objective: Objective,
        provenance: Provenance,
        budget: Budget,
        observer: Observer | None,
    ) -> None:
        self._study, self._space, self._sampler, self._ledger = study, space, sampler, ledger
        self._objective, self._provenance = objective, provenance
        self._budget, self._observer = budget, observer
        self._flight = Flight(executor, budget.retries)
        anchors = space.anchors()
        self._anchors = [recipe.identity for recipe in anchors]
        # Anchors outside the space go by the sampler; those inside already wait in the study.
        outside = [recipe for recipe in anchors if recipe not in space]
        self._unheard = deque(r for r in outside if not ledger.has(r.identity, "validation"))
        rows = [row for row in ledger.rows() if _counts(row)]
        self._done = len(rows)
        self._best: Row | None = next(iter(best(rows)), None)
        self._total = max(budget.candidates, len(anchors))
        self._known = 0
        self._error: tuple[str, int] = ("", 0)
        self._ending: Ending | None = None
        self._told = RandomSampler(0)

    def run(self) -> Ending:
        started = time.monotonic()
        if self._observer:
            self._observer.on_start(self._total)
        self._known = self._trailing_duplicates()
        while True:
            late = self._budget.seconds is not None and time.monotonic() - started >= self._budget.seconds
            while self._flight.has_room and (candidate := self._next(late)) is not None:
                self._flight.submit(candidate)
            if not len(self._flight):
                return self._ending or "budget"
            for outcome in self._flight.wait():
                self._settle(outcome)

    def _next(self, late: bool) -> Candidate | None:
        """The next candidate to measure; None where there is none for now."""
        if self._unheard:
            return Candidate(self._unheard.popleft(), "validation", "anchor")
        waiting = self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if self._ending is None and self._done + len(self._flight) >= self._total:
            return None
        if self._ending is None and late and not waiting:
            self._ending = "seconds"
        if self._ending is None and not self._space.searchable:
            self._ending = "exhausted"
        return self._ask() if self._ending is None else None

    def _ask(self) -> Candidate | None:
        """The next recipe that is not in the ledger and not under way."""
        while self._known < self._budget.duplicates:
            trial, recipe = self._propose()
            origin = cast(Origin, trial.user_attrs.get(ORIGIN, "search"))
            measured = self._ledger.has(recipe.identity, "validation")
            if not measured and not self._flight.holds(recipe, "validation"):
                self._known = 0
                if CANDIDATE not in trial.user_attrs:
                    trial.set_user_attr(CANDIDATE, recipe.identity)
                return Candidate(recipe, "validation", origin, trial.number)
            # A score told twice would count twice in the sampler's model, and draw it back to where it was.
            self._known += 1
            trial.set_user_attr(DUPLICATE, True)
            self._tell(trial.number, None)
        self._ending = "exhausted"
        return None

    def _propose(self) -> tuple[Trial, Recipe]:
        trials = self._study.get_trials(deepcopy=False)
        waiting = [trial.number for trial in trials if trial.state == TrialState.WAITING]
        self._study.sampler = self._sampler(min(waiting, default=len(trials)))
        try:
            trial = self._study.ask()
            return trial, self._space.suggest(trial)
        except ValueError as error:
            raise SettingsError(
                f"the sampler cannot propose from this search space: {error}. Use 'tpe', or give ranges a `step`"
            ) from error

    def _settle(self, outcome: Outcome) -> None:
        """Writes the row, and only then tells the study."""
        row = judge(outcome, self._objective, self._provenance)
        self._ledger.append(row)
        if row.trial is not None:
            self._tell(row.trial, row.objective)
        self._done += 1
        self._best = next(iter(best([self._best, row] if self._best else [row])), None)
        if self._observer:
            self._observer.on_row(row, self._best, self._done, self._total)
        if row.status == "failed":
            self._count_failure(row, outcome)
        else:
            self._error = ("", 0)

    def _tell(self, number: int, value: float | None) -> None:
        # Some samplers call Study.stop after a trial, which Optuna allows only inside optimize().
        self._study.sampler = self._told
        self._study.tell(number, value, TrialState.FAIL if value is None else TrialState.COMPLETE)

    def _count_failure(self, row: Row, outcome: Outcome) -> None:
        text = row.error or ""
        self._error = (text, self._error[1] + 1 if text == self._error[0] else 1)
        if self._error[1] >= self._budget.identical_errors:
            raise SearchError(
                f"{self._error[1]} candidates in a row failed with the same error, the last one {row.method} "
                f"of {', '.join(row.members)}: {text}\n"
                f"The ledger keeps what was measured before: mend the cause and resume"
            ) from outcome.error
        found = [self._ledger.get(identity, "validation") for identity in self._anchors]
        failed = all(anchor is not None and anchor.status == "failed" for anchor in found)
        if row.origin == "anchor" and failed:
            raise SearchError(
                f"every anchor failed, the plain average too; the last one ({row.method}): {text}\n"
                f"Mend the cause and begin anew in another directory: this one keeps its failed rows"
            ) from outcome.error

    def _trailing_duplicates(self) -> int:
        """How many known recipes were proposed last, before this run."""
        count = 0
        for trial in reversed(self._study.get_trials(deepcopy=False)):
            if DUPLICATE not in trial.user_attrs:
                break
            count += 1
        return count


def _counts(row: Row) -> bool:
    return row.split == "validation" and row.origin in ("anchor", "search")

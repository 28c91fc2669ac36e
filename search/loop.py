"""The search itself: ask the sampler, keep every evaluator busy, write the rows, tell the study."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from optuna import Study, Trial
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import TrialState

from merging.errors import MergequestError, SearchError, SettingsError
from merging.recipe import Recipe
from search.budget import Budget, Ending, Tally
from search.candidate import PARTIAL, Candidate, Executor, Observer, Outcome, Provenance
from search.in_flight import InFlight, to_row
from search.ledger.ledger import Ledger
from search.ledger.row import Origin, Row
from search.line_search import LineSearch
from search.objective import Objective
from search.samplers.history_window import Memory
from search.samplers.windowed_study import WindowedStudy
from search.space.search_space import Space
from search.steering import Steering
from search.study import CANDIDATE, NOTES, ORIGIN, PARAMS, VOID, recordable


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
    *,
    history: Sequence[Memory] | None = None,
    split: str = "validation",
    describe: Callable[[Recipe], Mapping[str, float]] = lambda recipe: {},
    steering: Steering | None = None,
    line_search: bool = False,
) -> Ending:
    """Measures the baselines, then what the sampler proposes, until a budget is spent.

    One candidate more than the executor takes is always asked ahead, while the evaluators are at work, so that none
    of them waits for the sampler. It can be killed at any moment: a row is durable before the study is told of it,
    and `build_study` finds out the rest. With an executor that gives candidates back in the order in which it took them, a
    search that was killed and resumed leaves the rows of an unbroken one.

    Args:
        study: As `build_study` makes it.
        space: What may be proposed.
        sampler: Makes the sampler for the trial of this number.
        ledger: Where rows go; candidates that are in it are not measured again.
        executor: Measures candidates.
        objective: What to maximise.
        provenance: What every row says of the campaign.
        budget: When to end.
        observer: Is told of every row.
        history: What the sampler sees of finished trials, see `search.samplers.make_sampler.memories`; None for all.
        split: What candidates are measured on.
        describe: Further `proxies` of a recipe's row, known without measuring it.
        steering: Asked between candidates whether to stop, and for recipes that somebody wants measured.
        line_search: Begin with the best baseline, scaled (`search.line_search`).

    Raises:
        SearchError: Every baseline failed, or candidate after candidate with the same error.
        SettingsError: The sampler cannot propose anything from this space.
        StorageError: A row cannot be written.
    """
    done = [row.trial for row in ledger.rows() if row.split == split and row.trial is not None]
    windowed = WindowedStudy(study, history, done[-max(1, executor.capacity) :])
    run = _Search(
        windowed,
        space,
        sampler,
        ledger,
        executor,
        objective,
        provenance,
        budget,
        observer,
        split,
        describe,
        steering or Steering(),
        line_search,
    )
    return run.run()


class _Search:
    """The state of one run."""

    def __init__(
        self,
        study: WindowedStudy,
        space: Space,
        sampler: Callable[[int], BaseSampler],
        ledger: Ledger,
        executor: Executor,
        objective: Objective,
        provenance: Provenance,
        budget: Budget,
        observer: Observer | None,
        split: str,
        describe: Callable[[Recipe], Mapping[str, float]],
        steering: Steering,
        line_search: bool,
    ) -> None:
        self._steering = steering
        self._describe = describe
        self._study, self._space, self._sampler, self._ledger = study, space, sampler, ledger
        self._objective, self._provenance, self._split = objective, provenance, split
        self._budget, self._observer = budget, observer
        self._in_flight, self._capacity = InFlight(executor, budget.retries), max(1, executor.capacity)
        self._ahead: Candidate | None = None
        self._line = LineSearch(space, self._seen) if line_search else None
        self._trials: dict[int, Trial] = {}
        self._notes: dict[int, Mapping[str, Any]] = {}
        self._void: dict[str, Mapping[str, Any]] = {}
        baselines = space.baselines()
        self._baselines = [recipe.identity for recipe in baselines]
        # Baselines outside the space go by the sampler; those inside already wait in the study.
        outside = [recipe for recipe in baselines if recipe not in space]
        self._unheard = deque(r for r in outside if not ledger.has(r.identity, split))
        counted = [row for row in ledger.rows() if row.split == split and row.origin in ("anchor", "search")]
        self._tally = Tally(budget, counted, max(budget.candidates, len(baselines)), split)
        self._known = 0
        self._error: tuple[str, int] = ("", 0)
        self._exhausted = not space.searchable
        self._ending: Ending | None = None
        self._plain = RandomSampler(0)

    def run(self) -> Ending:
        if self._observer:
            self._observer.on_start(self._tally.progress())
        while True:
            self._submit(self._next)
            self._ahead = self._ahead or self._next()
            if not len(self._in_flight):
                return self._ending or "candidates"
            outcomes = self._in_flight.wait()
            try:
                self._submit(lambda: None)  # what was asked ahead goes out before anything is written
            finally:
                self._settle(outcomes)

    def _submit(self, more: Callable[[], Candidate | None]) -> None:
        """Keeps evaluators busy: with the candidate that was asked ahead, then with `more` of them."""
        if self._steering.stopping():
            self._ahead, self._ending = None, "stopped"
            return
        while self._in_flight.has_room and (candidate := self._ahead or more()) is not None:
            self._ahead = None
            self._in_flight.submit(candidate)

    def _next(self) -> Candidate | None:
        """The next candidate to measure; None where there is none for now."""
        self._queue()
        under_way = len(self._in_flight) + (self._ahead is not None)
        self._study.hold(max(0, self._capacity - under_way))
        if self._steering.stopping():
            self._ending = "stopped"
            return None
        if self._unheard:
            recipe = self._unheard.popleft()
            return Candidate(recipe, self._split, "anchor" if recipe.identity in self._baselines else "search")
        spent = self._tally.spent(under_way)
        if self._study.has_waiting:
            return None if spent == "candidates" else self._ask()
        if spent in (None, "plateau") and self._scale():
            return self._ask()
        # Decided anew once nothing is under way: the last rows may hold an improvement.
        self._ending = "exhausted" if self._exhausted else spent
        if self._ending:
            return None
        if self._line and self._tally.spent(under_way + self._line.left):  # the rest is for the line search
            if under_way:
                return None
            if self._study.hold(0):
                return self._next()
        return self._ask()

    def _queue(self) -> None:
        """Takes recipes that somebody wants measured: those of the space are trials, which the sampler learns from."""
        for recipe in self._steering.queued():
            if self._is_known(recipe):
                continue
            if recipe in self._space:
                self._study.enqueue(self._space.params(recipe), {CANDIDATE: recipe.identity})
            elif recipe.identity not in {waiting.identity for waiting in self._unheard}:
                self._unheard.append(recipe)

    def _scale(self) -> bool:
        """Has the line search's next recipe asked before the sampler, where there is one."""
        ahead = self._line.frontier() if self._line else []
        recipe = next((recipe for recipe in ahead if not self._is_known(recipe)), None)
        if recipe:
            self._study.enqueue(self._space.params(recipe), {CANDIDATE: recipe.identity})
        return recipe is not None

    def _seen(self, recipe: Recipe) -> Row | None:
        """A recipe's row, unless it is held back from samplers."""
        row = self._ledger.get(recipe.identity, self._split)
        return None if row is None or self._study.holds_back(row.trial) else row

    def _is_known(self, recipe: Recipe) -> bool:
        """Whether a recipe is in the ledger or under way."""
        return self._ledger.has(recipe.identity, self._split) or self._in_flight.holds(recipe, self._split)

    def _ask(self) -> Candidate | None:
        """The next recipe that is not in the ledger and not under way."""
        while self._known < self._budget.duplicates:
            trial, recipe = self._propose()
            if recipe is None:
                continue
            origin = cast(Origin, trial.user_attrs.get(ORIGIN, "search"))
            if not self._is_known(recipe):
                self._known = 0
                if CANDIDATE not in trial.user_attrs:
                    trial.set_user_attr(CANDIDATE, recipe.identity)
                self._study.under_way(trial)
                self._trials[trial.number] = trial
                noted = {NOTES: self._noted(trial), VOID: self._void}
                self._notes[trial.number] = {name: value for name, value in noted.items() if value}
                self._void = {}
                return Candidate(recipe, self._split, origin, trial.number)
            # A score told twice would count twice in the sampler's model, and draw it back to where it was.
            self._known += 1
            self._give_up(trial)
        self._exhausted, self._ending = True, "exhausted"
        return None

    def _propose(self) -> tuple[Trial, Recipe | None]:
        """A trial and its recipe; without one if there is none of these parameters."""
        self._study.sampler = self._sampler(self._study.next_number)
        trial = None
        try:
            trial = self._study.ask()
            return trial, self._space.suggest(trial)
        except ValueError as error:
            raise SettingsError(
                f"the sampler cannot propose from this search space: {error}. Use 'tpe', or give ranges a `step`"
            ) from error
        except MergequestError as error:
            if trial is None:
                raise
            self._give_up(trial)
            self._known += 1
            if self._repeats(f"{type(error).__name__}: {error}"):
                raise SearchError(f"{self._error[1]} proposals in a row are no recipes: {error}") from error
            if self._known >= self._budget.duplicates:
                raise SearchError(
                    f"{self._known} proposals in a row led to nothing new; the last one is no recipe: {error}"
                ) from error
            return trial, None

    def _give_up(self, trial: Trial) -> None:
        """Ends a trial that leads to no candidate; the next row says what there was of it."""
        params = self._study._storage.get_trial_params(trial._trial_id)
        self._void[str(trial.number)] = {NOTES: self._noted(trial), PARAMS: params}
        self._tell(trial)

    def _noted(self, trial: Trial) -> dict[str, Any]:
        return recordable(self._study._storage.get_trial_system_attrs(trial._trial_id))

    def _settle(self, outcomes: Sequence[Outcome]) -> None:
        """Writes the rows, and only then tells the study."""
        rows = [to_row(outcome, self._objective, self._provenance) for outcome in outcomes]
        rows = [
            replace(
                row,
                proxies={**row.proxies, **self._describe(row.recipe)},
                sampler=None if row.trial is None else self._notes.pop(row.trial),
            )
            for row in rows
        ]
        self._ledger.extend(rows)
        for row in rows:
            if row.trial is not None:
                self._tell(self._trials.pop(row.trial), row)
            self._tally.add(row)
        for row, outcome in zip(rows, outcomes, strict=True):
            if self._observer:
                self._observer.on_row(row, self._tally.progress())
            if row.status == "failed":
                self._count_failure(row, outcome)
            else:
                self._error = ("", 0)

    def _tell(self, trial: Trial, row: Row | None = None) -> None:
        """Ends a trial as its row did; without one it failed."""
        # Some samplers call Study.stop after a trial, which Optuna allows only inside optimize().
        self._study.sampler = self._plain
        for name, value in (row.violations if row else {}).items():
            trial.set_constraint(name, value)
        if row is not None and row.status == "complete":
            self._study.tell(trial, list(row.objectives.values()))
        elif row is not None and row.status == "pruned":
            if PARTIAL in row.proxies and len(self._objective.names) == 1:
                trial.report(row.proxies[PARTIAL], sum(row.examples.values()))
            self._study.tell(trial, state=TrialState.PRUNED)
        else:
            self._study.tell(trial, state=TrialState.FAIL)
        self._study.finished(trial)

    def _repeats(self, error: str) -> bool:
        """Counts an error; whether it has come so often in a row that it is no accident."""
        self._error = (error, self._error[1] + 1 if error == self._error[0] else 1)
        return self._error[1] >= self._budget.identical_errors

    def _count_failure(self, row: Row, outcome: Outcome) -> None:
        text = row.error or ""
        if self._repeats(text):
            raise SearchError(
                f"{self._error[1]} candidates in a row failed with the same error, the last one {row.method} "
                f"of {', '.join(row.members)}: {text}\n"
                f"The ledger keeps what was measured before: mend the cause and resume, with --retry-failed to measure "
                f"these again"
            ) from outcome.error
        baselines = [self._ledger.get(identity, self._split) for identity in self._baselines]
        failed = all(baseline is not None and baseline.status == "failed" for baseline in baselines)
        if row.origin == "anchor" and failed:
            raise SearchError(
                f"every baseline failed, the plain average too; the last one ({row.method}): {text}\n"
                f"Mend the cause and resume with --retry-failed"
            ) from outcome.error

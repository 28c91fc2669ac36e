"""Candidates under way: submitted, put back when their worker is lost, judged when they are there."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from merging.errors import ClusterError
from merging.io.secrets import described, storable
from merging.recipe import Recipe
from merging.tasks.task import Score
from search.candidate import Candidate, Executor, Outcome, Provenance, make_row
from search.ledger.ledger import Ledger, to_table
from search.ledger.row import Row
from search.objective import Objective
from search.steering import Steering

POLL_SECONDS = 1.0
MAX_ERROR_LENGTH = 2000


class InFlight:
    """What an executor is working on.

    Args:
        executor: Does the work.
        retries: How often a candidate is put back after its worker was lost, before it counts as failed.
    """

    def __init__(self, executor: Executor, retries: int) -> None:
        self._executor = executor
        self._retries = retries
        self._losses: dict[tuple[str, str], int] = {}
        self._lost: dict[tuple[str, str], Outcome] = {}

    def __len__(self) -> int:
        return len(self._losses)

    def holds(self, recipe: Recipe, split: str) -> bool:
        """Whether this recipe is under way on this split."""
        return (recipe.identity, split) in self._losses

    @property
    def has_room(self) -> bool:
        """Whether the executor can take another candidate; one always, or nothing would ever come back."""
        return len(self) < max(1, self._executor.capacity)

    def submit(self, candidate: Candidate) -> None:
        """Hands a candidate to the executor."""
        self._losses[_key(candidate)] = 0
        self._executor.submit(candidate)

    def wait(self) -> list[Outcome]:
        """Outcomes that are final; lost candidates are put back in the meantime."""
        final = []
        for outcome in self._executor.wait(POLL_SECONDS):
            key = _key(outcome.candidate)
            if key not in self._losses:
                continue  # of an earlier search that was given up
            outcome = _with_cost_of(outcome, self._lost.pop(key, None))
            if not outcome.lost:
                final.append(outcome)
            elif self._losses[key] < self._retries:
                self._losses[key] += 1
                self._lost[key] = outcome
                self._executor.submit(outcome.candidate)
                continue
            else:
                times = self._losses[key] + 1
                reason = f": {outcome.error}" if outcome.error else ""
                error = ClusterError(f"the worker was lost {times} time{'s' * (times > 1)}{reason}")
                final.append(replace(outcome, measurement=None, error=error, lost=False))
            del self._losses[key]
        return final


def _with_cost_of(outcome: Outcome, lost: Outcome | None) -> Outcome:
    """An outcome that says what the attempts before it cost, too."""
    if lost is None:
        return outcome
    cpu, gpu = (
        None if before is None and now is None else (before or 0.0) + (now or 0.0)
        for before, now in ((lost.cpu_hours, outcome.cpu_hours), (lost.gpu_hours, outcome.gpu_hours))
    )
    return replace(outcome, cpu_hours=cpu, gpu_hours=gpu)


def to_row(outcome: Outcome, objective: Objective | None, provenance: Provenance) -> Row:
    """The row of an outcome: failed where there was an error, a task without a score, or no finite objective.

    Args:
        outcome: What came back.
        objective: What is maximised; None for rows that are only read beside the others.
        provenance: What every row says.
    """
    if outcome.error is not None or outcome.measurement is None:
        text = described(outcome.error, MAX_ERROR_LENGTH) if outcome.error else "no measurement came back"
        return make_row(replace(outcome, measurement=None), {}, text, provenance)
    try:
        row = _measured(outcome, outcome.measurement.scores, objective, provenance)
        to_table([row])
    except Exception as error:  # evaluators are the user's own code: an answer that no row holds is a failed candidate
        text = storable(f"TaskError: the evaluator's answer cannot be recorded ({described(error)})", MAX_ERROR_LENGTH)
        return make_row(replace(outcome, measurement=None), {}, text, provenance)
    return row


def _measured(
    outcome: Outcome, scores: Mapping[str, Score], objective: Objective | None, provenance: Provenance
) -> Row:
    """The row of a measurement."""
    if objective is None:
        return make_row(outcome, {}, None, provenance)
    try:
        values, violations = objective(scores), objective.violations(scores)
    except KeyError as task:
        return make_row(outcome, {}, f"TaskError: no score came back for task {task}", provenance)
    for name, value in (values | violations).items():
        if not math.isfinite(value):
            # without the scores: equal failures have equal errors
            spoilt = [task for task, score in scores.items() if not math.isfinite(score.value)]
            of = f": no finite score of {', '.join(spoilt)}" if spoilt else ""
            return make_row(outcome, {}, f"TaskError: '{name}' is {value}{of}", provenance)
    return make_row(outcome, values, None, provenance, violations)


def measure(
    candidates: Iterable[Candidate],
    executor: Executor,
    ledger: Ledger,
    objective: Objective | None,
    provenance: Provenance,
    retries: int = 3,
    steering: Steering | None = None,
    describe: Callable[[Recipe], Mapping[str, float]] = lambda recipe: {},
    progress: Callable[[int], None] = lambda done: None,
) -> list[Row]:
    """Measures candidates that no sampler proposed (references, winners on test) and records them.

    What the ledger has already is not measured again. `describe` gives further `proxies` of a recipe's row; `progress` is
    called with how many different candidates have one.

    Returns:
        The row of every candidate, failed ones included, in the order given.

    Raises:
        StoppedError: `steering` said so, and some were not measured.
    """
    wanted = list(candidates)
    missing = {_key(c): c for c in wanted if not ledger.has(*_key(c))}
    done = len({_key(c) for c in wanted}) - len(missing)
    progress(done)
    queue, in_flight = deque(missing.values()), InFlight(executor, retries)
    while queue or len(in_flight):
        if steering is not None and steering.stopping():
            queue.clear()
        while queue and in_flight.has_room:
            in_flight.submit(queue.popleft())
        for outcome in in_flight.wait():
            row = to_row(outcome, objective, provenance)
            ledger.append(replace(row, proxies={**row.proxies, **describe(row.recipe)}))
            done += 1
            progress(done)
    rows = {(row.candidate, row.split): row for row in ledger.rows()}
    if steering is not None and not missing.keys() <= rows.keys():
        steering.stop_here()
    return [rows[_key(candidate)] for candidate in wanted]


def _key(candidate: Candidate) -> tuple[str, str]:
    return candidate.recipe.identity, candidate.split

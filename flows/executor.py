"""Hands the search's candidates to Ray's evaluators, and their answers back."""

from merging.errors import MergequestError
from ray_tasks.evaluation import Assignment, EvaluatorPool
from search.candidate import Candidate, Measurement, Outcome


class EvaluationError(MergequestError):
    """What failed inside an evaluator, as it was told: `Type: message`."""


class RayExecutor:
    """The search's executor on a pool of evaluators.

    Args:
        evaluators: A started pool.
        limit: Validation examples a task; None for all. The test split is always measured whole.
    """

    def __init__(self, evaluators: EvaluatorPool, limit: int | None) -> None:
        self._evaluators = evaluators
        self._limit = limit
        self._out: dict[str, Candidate] = {}
        self._count = 0

    @property
    def capacity(self) -> int:
        """How many candidates are worked on at once."""
        return self._evaluators.capacity

    def submit(self, candidate: Candidate) -> None:
        """Takes a candidate and returns at once."""
        self._count += 1
        ticket = str(self._count)
        self._out[ticket] = candidate
        limit = self._limit if candidate.split == "validation" else None
        self._evaluators.submit(Assignment(ticket, candidate.recipe, candidate.split, limit))

    def wait(self, timeout: float) -> list[Outcome]:
        """The outcomes there are; waits up to `timeout` seconds for the first."""
        outcomes = []
        for done in self._evaluators.wait(timeout):
            candidate = self._out.pop(done.ticket)
            if done.measurement is None:
                error = EvaluationError(done.error or "no answer")
                outcomes.append(Outcome(candidate, error=error, lost=done.lost, started=done.started))
                continue
            found = done.measurement
            measured = Measurement(found.scores, found.merge_seconds, found.evaluate_seconds, done.worker, found.report)
            outcomes.append(Outcome(candidate, measured, started=done.started))
        return outcomes

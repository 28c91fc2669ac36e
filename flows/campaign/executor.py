"""Hands the search's candidates to Ray's evaluators, and their answers back."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import cast

from merging.errors import MergequestError, StorageError
from merging.io import addresses, atomic
from merging.io.secrets import described, storable
from merging.tasks.task import Split
from ray_tasks.evaluators.evaluator import Answer, Assignment
from ray_tasks.evaluators.evaluator_pool import EvaluatorPool
from search.candidate import ANCHORS, Candidate, Outcome, Planner


class EvaluationError(MergequestError):
    """What failed inside an evaluator, as it was told: `Type: message`."""


class RayExecutor:
    """The search's executor on a pool of evaluators.

    More candidates may be submitted than there are evaluators; they wait in a queue, so that none of them idles.

    Args:
        evaluators: A started pool.
        limit: Validation examples per task; None for all. The test split is always measured whole.
        logs: Directory for the logs of candidates that failed, `CANDIDATE-SPLIT.log`; None to keep none.
        note: Told once of each kept score that cannot be read or written.
    """

    def __init__(
        self,
        evaluators: EvaluatorPool,
        limit: int | None,
        logs: str | None = None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._logs, self._note = logs, note
        self._noted: set[str] = set()
        self._evaluators = evaluators
        self._limit = limit
        self._planner: Planner | None = None
        self._queue: deque[Candidate] = deque()
        self._out: dict[str, Candidate] = {}
        self._count = 0
        self._fresh = False
        self.precision: str | None = None
        """Of evaluation; None for that which evaluators were set up with."""

    @property
    def capacity(self) -> int:
        """How many candidates are worked on at once."""
        return self._evaluators.capacity

    @contextmanager
    def planned(self, planner: Planner | None) -> Iterator[None]:
        """Within the block, a planner says on which examples candidates are measured."""
        before, self._planner = self._planner, planner
        try:
            yield
        finally:
            self._planner = before

    @contextmanager
    def afresh(self, precision: str) -> Iterator[None]:
        """Within the block, candidates are measured in a precision, also those whose scores are kept."""
        before = self.precision, self._fresh
        self.precision, self._fresh = precision, True
        try:
            yield
        finally:
            self.precision, self._fresh = before

    def everywhere(self, probe: Callable[[], bool]) -> bool:
        """Whether something holds in the process of every evaluator that is there."""
        return self._evaluators.everywhere(probe)

    def submit(self, candidate: Candidate) -> None:
        """Takes a candidate and returns at once."""
        self._queue.append(candidate)
        self._hand_out()

    def wait(self, timeout: float) -> list[Outcome]:
        """The outcomes there are; waits up to `timeout` seconds for the first."""
        outcomes = [self._outcome(done) for done in self._evaluators.wait(timeout)]
        self._hand_out()
        return outcomes

    def _hand_out(self) -> None:
        """Plans are made as late as this, so that they know all that was learnt."""
        while self._queue and self._evaluators.free:
            candidate = self._queue.popleft()
            self._count += 1
            ticket = str(self._count)
            self._out[ticket] = candidate
            plan = self._planner.plan(candidate) if self._planner else None
            split = cast(Split, "validation" if candidate.split == ANCHORS else candidate.split)
            limit = self._limit if split == "validation" else None
            self._evaluators.submit(
                Assignment(ticket, candidate.recipe, split, limit, plan, self.precision, self._fresh)
            )

    def _outcome(self, answer: Answer) -> Outcome:
        candidate = self._out.pop(answer.ticket)
        if answer.log and self._logs is not None:
            name = f"{candidate.recipe.identity}-{candidate.split}.log"
            with suppress(StorageError):  # the row has the error; the log is for looking at
                atomic.write_text(addresses.join(self._logs, name), storable(answer.log, len(answer.log)))
        for problem in answer.measurement.problems if answer.measurement else ():
            if problem not in self._noted:
                self._noted.add(problem)
                self._note(problem)
        group, hours = self._evaluators.group, answer.seconds / 3600
        outcome = Outcome(
            candidate,
            answer.measurement,
            EvaluationError(answer.error or "no answer") if answer.measurement is None else None,
            answer.lost,
            answer.started,
            cpu_hours=group.threads * hours,
            gpu_hours=group.gpus * hours,
        )
        if self._planner is None or answer.measurement is None:
            return outcome
        try:
            return self._planner.learn(outcome)
        except MergequestError:
            raise
        except Exception as error:  # answers are the user's own code's: numbers of another kind, or of fewer examples
            return replace(outcome, measurement=None, error=EvaluationError(described(error)))

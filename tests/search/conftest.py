from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_futures

import pytest

from merging.methods.method import METHODS, Method, Parameter
from merging.recipe import Recipe
from merging.tasks.task import Score
from search.candidate import Candidate, Measurement, Outcome


class Declared(Method):
    """A method that is declared and never merged: a search reads declarations only."""

    summary = "toy"

    def prepare(self, weights, context):
        raise AssertionError("the search merges nothing")


class Curve(Declared):
    name = "toy_curve"
    scaling = Parameter(0.3, "factor", low=0.0, high=1.5)
    parameters: Mapping[str, Parameter] = {
        "rho": Parameter(0.9, "a share", low=0.0, high=1.0, minimum=0.0, maximum=1.0),
        "floor": Parameter(1e-6, "log range", low=1e-8, high=1e-2, log=True, minimum=0.0),
        "steps": Parameter(4, "whole number", low=1, high=9, minimum=1),
        "mode": Parameter("plain", "choice", choices=("plain", "signed")),
        "norm": Parameter(True, "switch", choices=(True, False)),
        "quiet": Parameter(7.0, "not searched"),
    }


class Free(Declared):
    name = "toy_free"
    scaling = Parameter(1.0, "relative weight", low=0.1, high=1.0)
    scale_free = True


@pytest.fixture(scope="module", autouse=True)
def toys():
    """The toys, registered while a module's tests run: other modules list the methods when they are collected."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(METHODS, "_entries", dict.copy(METHODS._entries))
        for toy in (Curve, Free):
            METHODS.register(toy.name, toy())
        yield


class Threads:
    """Evaluates candidates in threads: a real executor, asynchronous and out of order."""

    def __init__(self, evaluate: Callable[[Recipe], Mapping[str, float]], capacity: int = 1) -> None:
        self.capacity = capacity
        self.submitted: list[Candidate] = []
        self._evaluate = evaluate
        self._pool = ThreadPoolExecutor(capacity)
        self._running: dict[Future, Candidate] = {}

    def submit(self, candidate: Candidate) -> None:
        self.submitted.append(candidate)
        self._running[self._pool.submit(self._evaluate, candidate.recipe)] = candidate
        assert len(self._running) <= self.capacity

    def wait(self, timeout: float) -> list[Outcome]:
        done, _ = wait_futures(self._running, timeout, FIRST_COMPLETED)
        return [self._outcome(future, self._running.pop(future)) for future in done]

    def _outcome(self, future: Future, candidate: Candidate) -> Outcome:
        error = future.exception()
        if error is not None:
            return Outcome(candidate, error=error, lost=isinstance(error, ConnectionError))
        scores = {task: Score(value, 0.01, 100, "accuracy", 0.5, 0.2, 0.1) for task, value in future.result().items()}
        return Outcome(candidate, Measurement(scores, 0.001, 0.01, "host/1/cpu"))


@pytest.fixture
def threads():
    return Threads

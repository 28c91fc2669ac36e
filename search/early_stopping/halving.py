"""Successive halving over examples: at a rung only the better half of what came as far is measured further."""

import math
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from merging.evaluation.steps import EvaluationPlan, Trace
from search.candidate import Candidate, Outcome
from search.ledger.row import Row
from search.objective import Objective, Part

ETA = 2
RUNG = "partial:objective@"
"""Proxy of a row of a halving search: the objective at a rung, by the rung's number of examples."""


class Halving:
    """Asynchronous successive halving (ASHA, Li et al. 2020) over examples.

    At a rung a candidate goes on only if it is among the best half of all that came as far; the next rung has twice as many
    examples. The first to come always goes on, so that no evaluator waits for another. Every row notes its objective at
    the rungs that it reached, from which the rungs are made again after a restart.

    Args:
        objective: What is maximised; of several, the first decides.
        step: Examples of each task in the first rung.
        rows: The ledger's.
        eta: One in so many goes on.
    """

    def __init__(self, objective: Objective, step: int, rows: Sequence[Row] = (), eta: int = ETA) -> None:
        self._value, self._step, self._eta = decisive(objective), step, eta
        self._rungs: dict[int, list[float]] = {}
        for row in rows:
            self._note({name: value for name, value in row.proxies.items() if name.startswith(RUNG)})

    def plan(self, candidate: Candidate) -> EvaluationPlan | None:
        """See `Planner.plan`."""
        if not is_stepwise(candidate):
            return None
        rungs = {examples: tuple(values) for examples, values in self._rungs.items()}
        gate = Behind(rungs, self._value, self._step, self._eta) if candidate.origin == "search" else None
        return EvaluationPlan(self._step, gate)

    def learn(self, outcome: Outcome) -> Outcome:
        """Notes the objective at every rung; see `Planner.learn`."""
        measurement = outcome.measurement
        if measurement is None or measurement.trace is None or not is_stepwise(outcome.candidate):
            return outcome
        values = [self._value(scores) for scores in measurement.trace.scores]
        reached = {
            f"{RUNG}{number * self._step}": value
            for number, value in enumerate(values, start=1)
            if is_rung(number, self._eta) and math.isfinite(value)
        }
        self._note(reached)
        return replace(outcome, measurement=replace(measurement, proxies={**measurement.proxies, **reached}))

    def _note(self, reached: Mapping[str, float]) -> None:
        for name, value in reached.items():
            self._rungs.setdefault(int(name.removeprefix(RUNG)), []).append(value)


@dataclass(frozen=True)
class Behind:
    """A gate that stops a candidate at a rung where it is not among the best.

    Args:
        rungs: Examples of a task at a rung → the objectives of all that reached it.
        value: What is maximised.
        step: Examples of each task in a step.
        eta: One in so many goes on.
    """

    rungs: Mapping[int, Sequence[float]]
    value: Part
    step: int
    eta: int

    def __call__(self, trace: Trace) -> bool:
        """Whether to stop; see `merging.evaluation.steps.Gate`."""
        if not is_rung(len(trace.scores), self.eta):
            return False
        others = sorted(self.rungs.get(len(trace.scores) * self.step, ()))
        better = len(others) - bisect(others, self.value(trace.scores[-1]))
        return better >= math.ceil((len(others) + 1) / self.eta)


def is_rung(number: int, eta: int) -> bool:
    """Whether the step of this number, from 1, is a power of `eta`."""
    while number % eta == 0:
        number //= eta
    return number == 1


def decisive(objective: Objective) -> Part:
    """The part of an objective that decides which candidate wins."""
    return objective.parts[objective.names[0]]


def is_stepwise(candidate: Candidate) -> bool:
    """Whether a candidate is one of the search's own, that step by step tell each other apart."""
    return candidate.split == "validation" and candidate.origin in ("anchor", "search")

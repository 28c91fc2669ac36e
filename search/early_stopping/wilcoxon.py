"""Candidates that are clearly worse are given up before all examples are measured; the good are measured on all.

All candidates see the same examples in the same order, so that the k-th step of one is paired with the k-th of another.
References and baselines are never pruned: tables and plots are read beside them.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.stats import wilcoxon

from merging.evaluation.steps import EvaluationPlan, Trace
from merging.io import addresses, atomic, documents, storage
from merging.tasks.task import Score
from search.candidate import Candidate, Outcome, Planner, Policy
from search.early_stopping.halving import Halving, decisive, is_stepwise
from search.ledger.row import Row
from search.objective import Objective, Part, best, violation

THRESHOLD = 0.02
"""Level of one test: Pocock's, for a level of 0.1 over eight looks at growing samples."""


def make_pruning(policy: Policy, objective: Objective, step: int, rows: Sequence[Row], path: str) -> Planner | None:
    """The policy of that name, knowing what the rows of an earlier run tell.

    Args:
        policy: `none`; `wilcoxon`, against the best so far; `halving`, against all that came as far.
        objective: What is maximised; of several, the first decides.
        step: Examples of each task in a step; in a halving's first rung.
        rows: The ledger's.
        path: Directory for what must outlive the driver.
    """
    if policy == "wilcoxon":
        return Wilcoxon(objective, step, path, rows)
    if policy == "halving":
        return Halving(objective, step, rows)
    return None


class Wilcoxon:
    """Instance-wise pruning: a candidate is given up once its examples say that it is worse than the best so far.

    Only one that breaks no constraint is a bar for others. Its trace lies in a file that is there before its row, so that a
    search that was killed prunes as if it had not been; if the file is lost, the next complete candidate is the bar.

    Args:
        objective: What is maximised; of several, the first decides.
        step: Examples of each task in a step.
        path: Directory for the traces of those that were the best.
        rows: The ledger's.
        threshold: The level of the test.
    """

    def __init__(
        self, objective: Objective, step: int, path: str, rows: Sequence[Row] = (), threshold: float = THRESHOLD
    ) -> None:
        self._objective, self._value = objective, decisive(objective)
        self._step, self._path, self._threshold = step, path, threshold
        self._bar: Trace | None = None
        for row in best(rows):
            if violation(row) == 0 and storage.exists(self._file(row.candidate)):
                self._bar = documents.read_as(self._file(row.candidate), Trace.from_dict)

    def plan(self, candidate: Candidate) -> EvaluationPlan | None:
        """See `Planner.plan`."""
        if not is_stepwise(candidate):
            return None
        if self._bar is None or candidate.origin != "search":
            return EvaluationPlan(self._step)
        return EvaluationPlan(self._step, WorseThan(self._bar, self._value, self._threshold))

    def learn(self, outcome: Outcome) -> Outcome:
        """Remembers the best; see `Planner.learn`."""
        measurement = outcome.measurement
        if measurement is None or measurement.trace is None or measurement.pruned or not is_stepwise(outcome.candidate):
            return outcome
        value = self._value(measurement.scores)
        holds = all(violation <= 0 for violation in self._objective.violations(measurement.scores).values())
        if math.isfinite(value) and holds and (self._bar is None or value > self._value(self._bar.scores[-1])):
            self._bar = measurement.trace
            text = json.dumps(measurement.trace.as_dict(), separators=(",", ":"))
            atomic.write_text(self._file(outcome.candidate.recipe.identity), text)
        return outcome

    def _file(self, candidate: str) -> str:
        return addresses.join(self._path, f"{candidate}.json")


@dataclass(frozen=True)
class WorseThan:
    """A gate that stops a candidate whose examples say that it is worse than another.

    The paired differences of single examples, each weighted as the objective weights its task, go through a one-sided
    Wilcoxon signed-rank test. Answers that are right or wrong are compared by their surrogate: most of two merges' agree, and a
    test on those that differ (McNemar's) sees too little. But a surrogate may fall where the score does not, so a candidate
    whose objective over these examples is no lower than the other's goes on whatever the test says.

    Args:
        bar: The other's trace, of the same steps.
        value: What is maximised.
        threshold: The level of the test.
    """

    bar: Trace
    value: Part
    threshold: float

    def __call__(self, trace: Trace) -> bool:
        """Whether to stop; see `merging.evaluation.steps.Gate`."""
        step = len(trace.scores) - 1
        if step >= len(self.bar.scores) or self.value(trace.scores[step]) >= self.value(self.bar.scores[step]):
            return False
        return p_worse(paired_differences(trace, self.bar, self.value)) < self.threshold


def paired_differences(trace: Trace, bar: Trace, value: Part) -> npt.NDArray[np.float64]:
    """Weighted differences of the single examples that both traces hold [N]; negative is worse than the bar.

    How much a task's score counts is the objective's slope at the trace's scores: one over the number of tasks for a mean,
    1 for the worst task and 0 for all others. A metric that grades single examples is compared by its own numbers, one that
    calls them right or wrong, or is of all predictions together, by the surrogate where there is one.
    """
    scores = trace.scores[-1]
    parts = [np.zeros(0)]
    for task, values in trace.values.items():
        count = min(len(values), len(bar.values[task]))
        smooth = trace.surrogates.get(task, values), bar.surrogates.get(task, bar.values[task])
        graded = not np.isin(values, (0, 1)).all()
        for slope, own, other in (
            (_slope(value, scores, task, metric=True), trace.values[task], bar.values[task]),
            (_slope(value, scores, task, metric=False), *smooth),
        ):
            if slope and own is values and not graded:
                own, other = smooth
            if slope:
                parts.append(slope * (own[:count].astype(np.float64) - other[:count]) / count)
    return np.concatenate(parts)


def p_worse(differences: npt.NDArray[np.float64]) -> float:
    """The probability of differences as far below zero as these [N], were they as likely above it."""
    nonzero = differences[differences != 0]
    return float(wilcoxon(nonzero, alternative="less").pvalue) if len(nonzero) else 1.0


def _slope(value: Part, scores: Mapping[str, Score], task: str, metric: bool, size: float = 1e-3) -> float:
    """How much the objective gains where a task's metric, or its expected error, is better by one."""
    score = scores[task]
    better = (
        replace(score, value=score.value + size)
        if metric
        else replace(score, expected_error=score.expected_error - size)
    )
    slope = (value({**scores, task: better}) - value(scores)) / size
    return slope if abs(slope) > 1e-6 else 0.0

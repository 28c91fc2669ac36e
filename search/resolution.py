"""How small a difference validation can see: the error of a difference of candidates that saw the same examples."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from statistics import median
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from merging.tasks.task import Score
from search.ledger.row import Row
from search.objective import Objective, violation

Values: TypeAlias = Mapping[str, npt.NDArray[np.float32]]
"""Task → what each example contributes to the score [N] (`Task.influences`), where the kind of task says it."""
RIVALS = 3
"""How many candidates behind the best one its differences are looked at with."""


@dataclass(frozen=True)
class Gap:
    """By how much the objective of one candidate is above another's.

    Args:
        value: The difference.
        standard_error: Over the choice of examples; NaN where nothing is known of it.
        is_paired: Whether the examples were compared one by one, in every task that counts.
    """

    value: float
    standard_error: float
    is_paired: bool

    @property
    def least(self) -> float:
        """The smallest difference that these examples can see: twice the standard error; 0 where nothing is known of it."""
        return 2.0 * self.standard_error if isfinite(self.standard_error) else 0.0


def gap(one: Row, other: Row, own: Values, others: Values, objective: Objective) -> Gap:
    """The difference of two complete rows in what decides which candidate wins.

    A task counts as much as the objective changes with its score. Tasks are independent of each other.

    Args:
        one: A row.
        other: Another, measured on the same examples.
        own: What was kept of the first one's examples.
        others: Of the second one's.
        objective: What is maximised.
    """
    variance, is_paired = 0.0, True
    for task, slope in _slopes(one, objective).items():
        if not slope:
            continue
        paired = paired_variance(task, own, others)
        if paired is None:
            is_paired = False
            errors = (row.standard_errors.get(task, float("nan")) for row in (one, other))
            paired = sum(error**2 for error in errors)
        variance += slope**2 * paired
    return Gap((one.objective or 0.0) - (other.objective or 0.0), sqrt(variance), is_paired)


def paired_variance(task: str, own: Values, others: Values) -> float | None:
    """The variance of the difference of two models' scores on a task, over the choice of examples.

    It is that of the mean of the examples' differences, s²/N: what both get right or wrong adds nothing to it.

    Args:
        task: The task.
        own: What was kept of one model's examples.
        others: Of the other's, the same examples in the same order.

    Returns:
        The variance; None where examples cannot be compared one by one.
    """
    if task not in own or task not in others or not len(own[task]) == len(others[task]) > 1:
        return None
    differences = own[task].astype(np.float64) - others[task]
    return float(differences.var(ddof=1)) / len(differences)


def resolution(ranked: Sequence[Row], values: Mapping[str, Values], objective: Objective) -> float:
    """Twice the standard error of the best candidate's difference from those behind it; 0 where nothing is known of it.

    Args:
        ranked: Complete rows, the best first.
        values: Candidate → what was kept of its examples.
        objective: What is maximised.
    """
    first, rest = ranked[:1], ranked[1 : 1 + RIVALS]
    errors = [
        gap(one, other, values.get(one.candidate, {}), values.get(other.candidate, {}), objective).standard_error
        for one in first
        for other in rest
    ]
    known = [error for error in errors if isfinite(error)]
    return 2.0 * median(known) if known else 0.0


def clear_best(ranked: Sequence[Row], values: Callable[[str], Values], objective: Objective) -> Row:
    """The candidate to go on from: the best baseline, or the best proposal that is better by more than validation can see.

    The best of many proposals is partly lucky; baselines are few. A proposal that breaks constraints less goes before them.

    Args:
        ranked: Complete rows, the best first; where no baseline is among them, the first it is.
        values: Candidate → what was kept of its examples.
        objective: What is maximised.
    """
    default = next((row for row in ranked if row.origin == "anchor"), ranked[0])
    own = values(default.candidate)
    for row in ranked[: ranked.index(default)]:
        step = gap(row, default, values(row.candidate), own, objective)
        if violation(row) < violation(default) or step.value > step.least:
            return row
    return default


def _slopes(row: Row, objective: Objective, size: float = 1e-6) -> dict[str, float]:
    """How much the first objective changes with each task's score; of an expected error, as if it were the score."""
    part = next(iter(objective.parts.values()))
    scores = {
        task: Score(value, 0.0, 0, "", expected_error=row.expected_errors.get(task, float("nan")))
        for task, value in row.scores.items()
    }
    slopes = {}
    for task, score in scores.items():
        higher = Score(score.value + size, 0.0, 0, "", expected_error=score.expected_error - size)
        slopes[task] = (part({**scores, task: higher}) - part(scores)) / size
    return {task: slope if isfinite(slope) else 1.0 / len(slopes) for task, slope in slopes.items()}

"""How a model is measured step by step over the examples, and what every step showed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from merging.tasks.task import Score

Floats: TypeAlias = npt.NDArray[np.float32]
Positions: TypeAlias = npt.NDArray[np.int64]
CACHED = "cached:"
"""Before a task's name in `Measurement.proxies`: how many of its examples were not measured, for their scores were kept."""


@dataclass(frozen=True)
class Trace:
    """What the steps of a measurement showed. The k-th steps of two candidates saw the same examples.

    Args:
        scores: After each step, task → score over all examples so far.
        values: Task → `Predictions.values` [N]. Tasks that give no predictions have none.
        surrogates: Task → `Predictions.surrogates` [N], where it has them.
        losses: Task → `Predictions.losses` [N], where it has them.
        influences: Task → `Task.influences` [N], where it has them; after the last step only.
    """

    scores: Sequence[Mapping[str, Score]]
    values: Mapping[str, Floats] = field(default_factory=dict)
    surrogates: Mapping[str, Floats] = field(default_factory=dict)
    losses: Mapping[str, Floats] = field(default_factory=dict)
    influences: Mapping[str, Floats] = field(default_factory=dict)

    @property
    def examples(self) -> int:
        """Examples of the task that was measured on most of them."""
        return max((score.examples for score in self.scores[-1].values()), default=0)

    def as_dict(self) -> dict[str, Any]:
        """JSON-like values, without influences."""
        return {
            "scores": [{task: score.as_dict() for task, score in step.items()} for step in self.scores],
            "values": _lists(self.values),
            "surrogates": _lists(self.surrogates),
            "losses": _lists(self.losses),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Trace":
        """The inverse of `as_dict`."""
        return cls(
            [{task: Score(**score) for task, score in step.items()} for step in fields["scores"]],
            _arrays(fields["values"]),
            _arrays(fields["surrogates"]),
            _arrays(fields["losses"]),
        )


@dataclass(frozen=True)
class Measurement:
    """What an evaluator measured of a recipe.

    Args:
        scores: Task → score.
        merge_seconds: Wall time of the merge, with the preparation of a method that is asked for first; where weights come
            from elsewhere, of taking them over. None where all predictions were known.
        evaluate_seconds: Wall time of the evaluation, all tasks.
        worker: Host, process and device that did it.
        report: The method's own figures on the merge.
        proxies: Figures that need no labels, or fewer examples than the scores.
        trace: What every step showed, if it was measured in steps.
        pruned: Whether measuring was given up: the scores are those of the examples so far.
        problems: What is to be said of kept scores that could not be read or written.
    """

    scores: Mapping[str, Score]
    merge_seconds: float | None = None
    evaluate_seconds: float | None = None
    worker: str | None = None
    report: Mapping[str, float] = field(default_factory=dict)
    proxies: Mapping[str, float] = field(default_factory=dict)
    trace: Trace | None = None
    pruned: bool = False
    problems: tuple[str, ...] = ()


def _lists(arrays: Mapping[str, Floats]) -> dict[str, list[float]]:
    return {task: array.tolist() for task, array in arrays.items()}


def _arrays(lists: Mapping[str, Sequence[float]]) -> dict[str, Floats]:
    return {task: np.array(values, np.float32) for task, values in lists.items()}


Gate: TypeAlias = Callable[[Trace], bool]
"""Whether to stop measuring, asked after every step but the last."""


@dataclass(frozen=True)
class EvaluationPlan:
    """Which examples a candidate is measured on, and in which steps.

    Args:
        step: Examples of each task in a step; None for all in one.
        gate: Whether to stop after a step; None to go on to the end.
        positions: Task → places in its split's fixed order [N], where not all of them are wanted.
    """

    step: int | None = None
    gate: Gate | None = None
    positions: Mapping[str, Positions] = field(default_factory=dict)

    def steps(self, sizes: Mapping[str, int]) -> Iterator[dict[str, Positions]]:
        """Task → the places of each step; a task with fewer examples than another is through sooner.

        Args:
            sizes: Task → examples of the split to measure, where `positions` names none.
        """
        places = {task: self.positions.get(task, np.arange(size)) for task, size in sizes.items()}
        most = max((len(own) for own in places.values()), default=0)
        step = self.step or max(most, 1)
        for first in range(0, most, step):
            yield {task: own[first : first + step] for task, own in places.items() if first < len(own)}

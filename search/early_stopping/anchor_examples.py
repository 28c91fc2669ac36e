"""A few anchor examples in place of the whole validation set, chosen and weighted by what the unmerged models said of all.

The references (base and members) are measured on everything before the search, so that for every example it is known how
likely each of them finds it right. Examples on which they disagree, or of which they are unsure, tell merges apart: they are
drawn with a probability in proportion to that, over the whole range of difficulty. A candidate's predictions on them are
regressed on the references' and so predict those on all other examples; what the regression leaves on the anchors, each
counted by the inverse of its chance to be drawn, corrects the mean of the predictions. That is survey sampling's generalised
regression estimator (Särndal, Swensson and Wretman 1992, ch. 6): right on average whatever the regression is worth, and with
a standard error of its own. Item response models (tinyBenchmarks, MERGE³) need more models than a pool has members.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from merging.checkpoints.formats.safetensors_file import read_arrays
from merging.evaluation.steps import EvaluationPlan, Positions, Trace
from merging.io import atomic, documents
from merging.tasks.task import Score
from search.candidate import ANCHORS, Candidate, Outcome

Floats: TypeAlias = npt.NDArray[np.float64]
FLOOR = 0.3
"""Least chance of an example to be drawn, over the mean chance: bounds the weights."""
RIDGE = 3.0
"""Prior of the regression, in examples: keeps it from following so few outcomes too closely."""


@dataclass(frozen=True)
class TaskAnchors:
    """The anchor examples of a task.

    Args:
        positions: Their places in the validation split's fixed order [n], sorted.
        chances: The chance that each had to be drawn [n].
        features: The surrogate of each example under each reference, of all examples [N, R].
    """

    positions: Positions
    chances: Floats
    features: Floats

    def estimate(self, values: Floats) -> tuple[float, float]:
        """The mean over all examples from values on the anchors [n], and its standard error."""
        count, (size, references) = len(values), self.features.shape
        if count == size:
            return float(values.mean()), 0.0
        centre = self.features.mean(axis=0)
        inputs = np.hstack([np.ones((size, 1)), self.features - centre])
        own, weights = inputs[self.positions], 1 / self.chances
        prior = np.diag([0.0, *[RIDGE * weights.mean()] * references])
        solution = np.linalg.solve(own.T @ (weights[:, None] * own) + prior, own.T @ (weights * values))
        left = values - own @ solution
        estimate = (inputs @ solution).mean() + (weights * left).sum() / size
        freedom = count / max(1, count - references - 1)
        variance = freedom * ((1 - self.chances) * (weights * left) ** 2).sum() / size**2
        return float(estimate), float(np.sqrt(variance))


def choose(features: Floats, count: int, seed: int, *, equal: bool = False) -> TaskAnchors:
    """Draws a task's anchor examples.

    Args:
        features: The surrogate of each example (its value, where there is none) under each reference [N, R].
        count: How many to draw; all, where there are no more.
        seed: Of the draw.
        equal: Whether every example has the same chance, for metrics that no mean of examples gives.
    """
    size = len(features)
    if count >= size:
        return TaskAnchors(np.arange(size), np.ones(size), features)
    difficulty = features.mean(axis=1)
    doubt = np.ones(size) if equal else np.sqrt(_own_variance(difficulty) + features.var(axis=1))
    chances = _chances(np.maximum(doubt, FLOOR * doubt.mean()), count)
    # Systematic sampling along the difficulty: every stretch of it has its share of the draw.
    order = np.argsort(difficulty, kind="stable")
    ends = np.cumsum(chances[order])
    ends *= count / ends[-1]
    marks = np.arange(count) + np.random.default_rng(seed).random()
    positions = np.sort(order[np.searchsorted(ends, marks, side="right").clip(max=size - 1)])
    return TaskAnchors(positions, chances[positions], features)


def _own_variance(difficulty: Floats) -> Floats:
    """How uncertain an example of this difficulty is in itself [N]: p(1 − p) of probabilities, else the same for all."""
    if ((difficulty >= 0) & (difficulty <= 1)).all():
        return difficulty * (1 - difficulty)
    return np.full(len(difficulty), difficulty.var())


def _chances(sizes: Floats, count: int) -> Floats:
    """Chances to be drawn in proportion to sizes that sum to `count`, none above 1."""
    certain = np.zeros(len(sizes), bool)
    while True:
        free = sizes * ~certain
        chances: Floats = np.where(certain, 1.0, free * (count - certain.sum()) / free.sum())
        if not (chances > 1).any():
            return chances
        certain |= chances >= 1


class Anchors:
    """A planner that measures candidates of the split `anchors` on anchor examples, and estimates their scores.

    Args:
        tasks: Task → its anchor examples. Tasks that give no predictions of single examples have none: they are measured whole.
    """

    def __init__(self, tasks: Mapping[str, TaskAnchors]) -> None:
        self.tasks = tasks

    def plan(self, candidate: Candidate) -> EvaluationPlan | None:
        """See `Planner.plan`."""
        if candidate.split != ANCHORS:
            return None
        return EvaluationPlan(positions={task: anchors.positions for task, anchors in self.tasks.items()})

    def learn(self, outcome: Outcome) -> Outcome:
        """Puts estimates in the place of scores; see `Planner.learn`."""
        measurement = outcome.measurement
        if measurement is None or measurement.trace is None or outcome.candidate.split != ANCHORS:
            return outcome
        scores = {task: self._estimate(task, score, measurement.trace) for task, score in measurement.scores.items()}
        return replace(outcome, measurement=replace(measurement, scores=scores))

    def _estimate(self, task: str, score: Score, trace: Trace) -> Score:
        if task not in self.tasks:
            return score
        anchors = self.tasks[task]
        if len(trace.values[task]) == len(anchors.features):  # measured whole
            return score

        def estimate(examples: Mapping[str, npt.NDArray[np.float32]]) -> tuple[float, float]:
            if task not in examples:
                return math.nan, math.nan
            return anchors.estimate(examples[task].astype(np.float64))

        score = replace(score, expected_error=1 - estimate(trace.surrogates)[0], loss=estimate(trace.losses)[0])
        if not score.is_mean:
            return score
        value, error = estimate(trace.values)
        return replace(score, value=value, standard_error=error)

    def write(self, path: str) -> None:
        """Writes them as a safetensors file."""
        tensors: dict[str, npt.NDArray[np.generic]] = {}
        for task, anchors in self.tasks.items():
            tensors |= {f"{task}/{name}": value for name, value in vars(anchors).items()}
        atomic.write_bytes(path, save(tensors))

    @classmethod
    def read(cls, path: str) -> "Anchors":
        """What `write` wrote."""
        tensors = read_arrays(path)
        tasks = sorted({name.rpartition("/")[0] for name in tensors})
        names = TaskAnchors.__match_args__
        return documents.made_from(
            tensors,
            lambda stored: cls({t: TaskAnchors(*(stored[f"{t}/{name}"] for name in names)) for t in tasks}),
            path,
        )


def make_anchors(references: Sequence[Trace], count: int, seed: int) -> Anchors:
    """Chooses every task's anchor examples.

    Args:
        references: Traces of base and members on the whole validation split.
        count: Anchor examples of each task.
        seed: Of the draw.
    """
    tasks = {}
    for task in references[0].values:
        traced = [trace.surrogates.get(task, trace.values[task]) for trace in references]
        features = np.stack([array.astype(np.float64) for array in traced], axis=1)
        tasks[task] = choose(features, count, seed, equal=not references[0].scores[-1][task].is_mean)
    return Anchors(tasks)


class Traces:
    """A planner that measures everything at once, and keeps the traces."""

    def __init__(self) -> None:
        self.by_recipe: dict[str, Trace] = {}
        """Identity of a recipe → its trace."""

    def plan(self, candidate: Candidate) -> EvaluationPlan | None:
        """See `Planner.plan`."""
        return EvaluationPlan()

    def learn(self, outcome: Outcome) -> Outcome:
        """See `Planner.learn`."""
        if outcome.measurement is not None and outcome.measurement.trace is not None:
            self.by_recipe[outcome.candidate.recipe.identity] = outcome.measurement.trace
        return outcome

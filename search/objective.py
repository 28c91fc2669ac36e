"""What a search maximises: one number or several from the scores of all tasks, and the rows that have most of it."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from merging.errors import SettingsError
from merging.recipe import REFERENCE_MEMBER
from merging.registry import did_you_mean
from merging.tasks.task import Score
from search.ledger.row import Row

OBJECTIVES = ("mean", "worst", "normalized", "weighted", "unseen")
"""What an objective may be called, besides a task's name."""
EXPECTED = "expected_"
"""Before any of these names: of 1 − expected error, which varies smoothly where the metric is flat."""

Part = Callable[[Mapping[str, Score]], float]
Constraints = Callable[[Mapping[str, float]], Mapping[str, float]]
"""Scores by task to by how much each constraint is broken; 0 or less where it holds."""


@dataclass(frozen=True)
class Objective:
    """What a search maximises, and what it must not break.

    Args:
        parts: Name → function of the tasks' scores. The first one decides which candidate wins.
        constraints: What has to hold besides.
    """

    parts: Mapping[str, Part]
    constraints: Constraints | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """What is maximised, the first being what decides."""
        return tuple(self.parts)

    def __call__(self, scores: Mapping[str, Score]) -> dict[str, float]:
        """Name → value of everything that is maximised.

        Raises:
            KeyError: A task has no score.
        """
        return {name: part(scores) for name, part in self.parts.items()}

    def violations(self, scores: Mapping[str, Score]) -> dict[str, float]:
        """Name of a constraint → by how much it is broken; 0 or less where it holds."""
        if self.constraints is None:
            return {}
        return dict(self.constraints({task: score.value for task, score in scores.items()}))


def make_objective(
    names: str | Sequence[str],
    tasks: Sequence[str],
    references: Mapping[str, float] | None = None,
    expected_references: Mapping[str, float] | None = None,
    weights: Mapping[str, float] | None = None,
    constraints: Constraints | None = None,
    unseen: Sequence[str] = (),
) -> Objective:
    """The objective of that name, or of these names.

    Args:
        names: `mean` of all tasks, the `worst` of them, `normalized` (mean of each score over the score of the
            task's own member), `weighted` (mean by `weights`), `unseen` (mean of those that belong to no member), or one
            task's name; each also with `expected_` before it. Of several the first decides which candidate wins.
        tasks: Names of all tasks.
        references: Score of each task's own member; only `normalized` asks for it.
        expected_references: The same of 1 − expected error; only `expected_normalized` asks for it.
        weights: Task → weight, zero where it is not named; only `weighted` asks for it.
        constraints: What has to hold besides.
        unseen: Tasks that only `unseen`, `weighted` and their own names count.

    Raises:
        SettingsError: A name is unknown or there twice, `unseen` has no task, `normalized` lacks a task's reference or divides
            by a zero one, `weighted` has no positive weight or one of an unknown task.
    """
    chosen = [names] if isinstance(names, str) else list(names)
    if not chosen or len(set(chosen)) < len(chosen):
        raise SettingsError(f"objective: name at least one, each once (found {chosen})")
    parts: dict[str, Part] = {}
    for name in chosen:
        plain, expected = split_name(name, tasks)
        own = expected_references if expected else references
        counted = list(unseen) if plain == "unseen" else [task for task in tasks if task not in unseen]
        if not counted:
            role = "unseen" if plain == "unseen" else "seen"
            raise SettingsError(
                f"objective '{name}' counts {role} tasks, and there are none: set `role: {role}` of a task"
            )
        if plain in (*tasks, "weighted"):
            counted = list(tasks)
        parts[name] = _part(plain, _figure(expected), counted, own or {}, weights or {})
    return Objective(parts, constraints)


def split_name(name: str, tasks: Sequence[str]) -> tuple[str, bool]:
    """An objective's name without `expected_`, and whether that was before it.

    Raises:
        SettingsError: It is no objective's name.
    """
    known = (*OBJECTIVES, *tasks)
    if name in known:
        return name, False
    if name.removeprefix(EXPECTED) in known:
        return name.removeprefix(EXPECTED), True
    raise SettingsError(f"unknown '{name}'. {did_you_mean(name, [*known, *(EXPECTED + k for k in known)])}")


def own_scores(
    rows: Iterable[Row], tasks_of: Mapping[str, str], split: str, *, expected: bool = False
) -> dict[str, float]:
    """Each task's score of the member that was fine-tuned on it, the best one where there are several.

    Args:
        rows: A ledger's; only complete reference rows of single members count.
        tasks_of: Member → its task.
        split: Which split's scores.
        expected: 1 − expected error instead of the score.
    """
    highest: dict[str, float] = {}
    for row in rows:
        alone = row.method == REFERENCE_MEMBER and row.origin == "reference"
        if alone and row.status == "complete" and row.split == split:
            task = tasks_of.get(row.members[0], "")
            scores = {t: 1 - error for t, error in row.expected_errors.items()} if expected else row.scores
            if task in scores:
                highest[task] = max(scores[task], highest.get(task, -math.inf))
    return highest


def violation(row: Row) -> float:
    """By how much a row breaks its constraints, summed; 0 where all hold."""
    return math.fsum(max(0.0, value) for value in row.violations.values())


def best(rows: Iterable[Row], top: int = 1, split: str = "validation") -> list[Row]:
    """The candidates to keep, at most `top`: those that break no constraint first, then the highest objective.

    Only complete baselines and proposals on that split count. Of equal ones the earliest is first; rows that no
    sampler heard of are earlier than any trial.
    """
    ranked = [
        (violation(row), -(row.objective or 0.0), -1 if row.trial is None else row.trial, position, row)
        for position, row in enumerate(rows)
        if is_candidate(row, split)
    ]
    return [row for *_, row in sorted(ranked, key=lambda entry: entry[:4])[:top]]


def pareto(
    rows: Iterable[Row], split: str = "validation", values: Callable[[Row], tuple[float, ...]] | None = None
) -> list[Row]:
    """The candidates than which none is better in one objective and as good in all others, best first.

    Rows that break a constraint are left out as long as there is one that breaks none. Of candidates with equal
    objectives the earliest is kept.

    Args:
        rows: A ledger's.
        split: Where they were measured.
        values: What is compared of a row; by default its objectives. `lambda row: tuple(row.scores.values())` compares tasks.
    """
    values = values or point
    ranked = best(rows, len(rows := list(rows)), split)
    least = violation(ranked[0]) if ranked else 0.0
    front: list[tuple[tuple[float, ...], Row]] = []
    # By decreasing objectives, so that whatever beats a row comes before it.
    for row in sorted((r for r in ranked if violation(r) <= least), key=values, reverse=True):
        here = values(row)
        if not any(all(a >= b for a, b in zip(there, here, strict=True)) for there, _ in front):
            front.append((here, row))
    return [row for _, row in front]


def point(row: Row) -> tuple[float, ...]:
    """A complete row's objectives, the first one first."""
    return tuple(row.objectives.values()) or (row.objective or 0.0,)


def is_candidate(row: Row, split: str = "validation") -> bool:
    """Whether a row is a complete baseline or proposal on a split: what winners are chosen among."""
    return row.split == split and row.origin in ("anchor", "search") and row.objective is not None


def _figure(expected: bool) -> Callable[[Score], float]:
    return (lambda score: 1 - score.expected_error) if expected else (lambda score: score.value)


def _part(
    name: str,
    figure: Callable[[Score], float],
    tasks: Sequence[str],
    own: Mapping[str, float],
    weights: Mapping[str, float],
) -> Part:
    """One number from all tasks."""
    if name in tasks:
        return lambda scores: figure(scores[name])
    if name == "worst":
        # min() would let a NaN pass unless it comes first
        return lambda scores: min(
            (figure(scores[task]) for task in tasks), key=lambda s: -math.inf if math.isnan(s) else s
        )
    if name == "normalized":
        if lacking := [task for task in tasks if not own.get(task, 0.0) > 0.0]:
            raise SettingsError(
                f"objective 'normalized' divides by the score of each task's own member, and that of task "
                f"'{lacking[0]}' is {own.get(lacking[0], 'not there')}: use 'mean'"
            )
        return lambda scores: math.fsum(figure(scores[task]) / own[task] for task in tasks) / len(tasks)
    if name == "weighted":
        counted = _weights(tasks, weights)
        try:
            whole = math.fsum(counted.values())
        except OverflowError as error:
            raise SettingsError("weights: their sum is beyond all numbers") from error
        return lambda scores: math.fsum(weight * figure(scores[task]) for task, weight in counted.items()) / whole
    return lambda scores: math.fsum(figure(scores[task]) for task in tasks) / len(tasks)


def _weights(tasks: Sequence[str], weights: Mapping[str, float]) -> dict[str, float]:
    """The weights that are not zero."""
    for task, weight in weights.items():
        if task not in tasks:
            raise SettingsError(f"weights: unknown task '{task}'. {did_you_mean(task, list(tasks))}")
        if not (math.isfinite(weight) and weight >= 0):
            raise SettingsError(f"weights: that of task '{task}' is {weight}; weights are numbers from 0")
    counted = {task: weight for task, weight in weights.items() if weight}
    if not counted:
        raise SettingsError("objective 'weighted' needs `weights`: a number from 0 for each task that counts")
    return counted

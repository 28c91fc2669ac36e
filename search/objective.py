"""What a search maximises: one number from the scores of all tasks, and the rows that have most of it."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from merging.errors import SettingsError
from merging.registry import did_you_mean
from search.schema import Row

Objective = Callable[[Mapping[str, float]], float]
"""Scores by task to the number that the search maximises."""

OBJECTIVES = ("mean", "worst", "normalized")
"""What an objective may be called, besides a task's name."""


def make_objective(name: str, tasks: Sequence[str], references: Mapping[str, float] | None = None) -> Objective:
    """The objective of that name.

    Args:
        name: `mean` of all tasks, the `worst` of them, `normalized` (mean of each score over the score of the
            task's own member), or one task's name.
        tasks: Names of all tasks.
        references: Score of each task's own member; only `normalized` asks for it.

    Raises:
        SettingsError: The name is unknown, or `normalized` lacks a task's reference or divides by a zero one.
    """
    if name in tasks:
        return lambda scores: scores[name]
    if name == "mean":
        return lambda scores: math.fsum(scores[task] for task in tasks) / len(tasks)
    if name == "worst":
        # min() would let a NaN pass unless it comes first
        return lambda scores: min((scores[task] for task in tasks), key=lambda s: -math.inf if math.isnan(s) else s)
    if name == "normalized":
        own = dict(references or {})
        if lacking := [task for task in tasks if not own.get(task, 0.0) > 0.0]:
            raise SettingsError(
                f"objective 'normalized' divides by the score of each task's own member, and that of task "
                f"'{lacking[0]}' is {own.get(lacking[0], 'not there')}: use 'mean'"
            )
        return lambda scores: math.fsum(scores[task] / own[task] for task in tasks) / len(tasks)
    raise SettingsError(f"unknown objective '{name}'. {did_you_mean(name, [*OBJECTIVES, *tasks])}")


def own_scores(rows: Iterable[Row], tasks_of: Mapping[str, str], split: str) -> dict[str, float]:
    """Each task's score of the member that was fine-tuned on it, the best one where there are several.

    Args:
        rows: A ledger's; only complete reference rows of single members count.
        tasks_of: Member → its task.
        split: Which split's scores.
    """
    found: dict[str, float] = {}
    for row in rows:
        if row.origin == "reference" and row.status == "complete" and row.split == split and len(row.members) == 1:
            task = tasks_of.get(row.members[0], "")
            if task in row.scores:
                found[task] = max(row.scores[task], found.get(task, -math.inf))
    return found


def best(rows: Iterable[Row], top: int = 1) -> list[Row]:
    """The candidates to keep: highest objective on validation, of equal ones the earliest; at most `top`.

    Only complete anchors and proposals count. Rows that no sampler heard of are earlier than any trial.
    """
    ranked = [
        (-row.objective, -1 if row.trial is None else row.trial, position, row)
        for position, row in enumerate(rows)
        if row.split == "validation" and row.origin in ("anchor", "search") and row.objective is not None
    ]
    return [row for *_, row in sorted(ranked, key=lambda entry: entry[:3])][:top]

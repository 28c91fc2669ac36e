"""Models that no recipe gives, measured as tasks of the cluster: ensembles, and checkpoints that were trained on all data."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from merging.evaluation.ensemble import Mean, measure_ensemble
from merging.evaluation.live_models import best_device
from merging.optimization.fine_tuning import TrainingSettings
from merging.optimization.label_tuning import tune
from merging.recipe import Recipe
from merging.tasks.predictions import Predictions
from merging.tasks.task import Score, Split, Task
from ray_tasks.evaluators.evaluator import Setup
from ray_tasks.jobs.parallel import Report
from ray_tasks.jobs.statistics import BoundTask

Measured = dict[str, tuple[Score, npt.NDArray[np.float32] | None]]
"""Task → its score, and what every example contributes to it, where the kind of task says it."""


def ensemble(
    setup: Setup, members: Sequence[str], split: Split, mean: Mean, limit: int | None, report: Report
) -> Measured:
    """`merging.evaluation.ensemble.measure_ensemble` over all tasks that have the split."""
    tasks = [task for task in setup.open_tasks() if task.has_split(split)]
    measured_of = measure_ensemble(
        setup.material(resident=True),
        tasks,
        setup.owners,
        members,
        split,
        best_device(),
        mean=mean,
        limit=limit,
        precision=setup.precision,
    )
    return {task.name: _measured(task, *measured_of[task.name]) for task in tasks}


def checkpoints(
    tasks: Mapping[str, BoundTask], split: Split, limit: int | None, precision: str, report: Report
) -> Measured:
    """Every task on the checkpoint that it is bound to, as that stands on disk.

    Args:
        tasks: Task → itself, bound to a checkpoint with its head.
        split: Which examples; tasks without it are left out.
        limit: At most this many examples per task.
        precision: `float32` or `bfloat16`.
        report: Told the share of the work that is done.
    """
    measured: Measured = {}
    for number, (name, bound) in enumerate(tasks.items(), start=1):
        task = bound.open()
        if task.has_split(split):
            model = task.load_model().to(best_device())
            measured[name] = _measured(task, *task.measure(model, split, limit=limit, precision=precision))
        report(number / len(tasks))
    return measured


def fine_tuned(setup: Setup, start: Recipe, settings: TrainingSettings, split: Split, report: Report) -> Measured:
    """A merge whose weights are fine-tuned on the validation split's labels, measured on another split.

    Args:
        setup: Pool, statistics and tasks.
        start: The merge to start from.
        settings: How to train.
        split: Which examples to measure on; tasks without it are left out.
        report: Told the share of the training that is done.
    """
    every = [task for task in setup.open_tasks() if task.has_logits and task.has_split("validation")]
    seen = [task for task in every if task.settings.role == "seen"]
    tasks = [*seen, *(task for task in every if task not in seen)]
    models = tune(
        setup.material(resident=True),
        seen,
        setup.owners,
        start,
        settings,
        best_device(),
        lambda done, total: report(done / total),
        also=tasks[len(seen) :],
    )
    return {
        task.name: _measured(task, *task.measure(model, split, precision=setup.precision))
        for task, model in zip(tasks, models, strict=True)
        if task.has_split(split)
    }


def _measured(
    task: Task, score: Score, predictions: Predictions | None
) -> tuple[Score, npt.NDArray[np.float32] | None]:
    influences = None if predictions is None else task.influences(predictions)
    return score, None if influences is None else influences.astype(np.float32)

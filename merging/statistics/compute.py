"""Measures a statistic of a task's model in this process; a cluster measures shards and combines them."""

import torch
from torch import nn

from merging.errors import StatisticsError
from merging.statistics.statistic import Partial, Statistic
from merging.tasks.task import Split, Task


def number_of_examples(task: Task, statistic: Statistic, split: Split = "train") -> int:
    """How many examples the statistic is measured on: as its settings say, or all there are.

    Raises:
        StatisticsError: The task cannot give statistics, or its split is empty.
    """
    if not task.has_logits:
        raise StatisticsError(
            f"task '{task.name}' ({task.kind}) only scores whole models, so no {statistic.kind} can be "
            "measured on it: bring a statistics file, or use a method that needs none"
        )
    size = task.size(split)
    if not size:
        raise StatisticsError(
            f"task '{task.name}' has no {split} examples to measure the {statistic.kind} on: add some"
        )
    return min(int(statistic.settings.examples), size)


def measure_shard(
    task: Task,
    statistic: Statistic,
    split: Split,
    start: int,
    stop: int,
    device: str | torch.device = "cpu",
    model: nn.Module | None = None,
) -> Partial:
    """A statistic of examples [start, stop) of a split; shards combine, in any order, into the whole.

    Args:
        task: Bound to the member's checkpoint, which it loads.
        statistic: What to measure.
        split: Which examples.
        start: First position.
        stop: Position after the last.
        device: Where the model runs; the result is on the CPU.
        model: The model to measure, for representations of another task's examples; by default the task's own.

    Raises:
        StatisticsError: The statistic does not fit the task or the model.
        TaskError: The task's data or model cannot be loaded.
    """
    live = (task.load_model() if model is None else model).to(device).eval()
    batches = task.batches(split, start, stop, int(statistic.settings.batch_size))
    return statistic.measure(live, task, batches)


def measure(task: Task, statistic: Statistic, split: Split = "train", device: str | torch.device = "cpu") -> Partial:
    """A statistic of as many examples of a split as its settings say.

    Raises:
        StatisticsError: The statistic does not fit the task or the model, or there are no examples.
        TaskError: The task's data or model cannot be loaded.
    """
    return measure_shard(task, statistic, split, 0, number_of_examples(task, statistic, split), device)

"""A merge fine-tuned on the labels that a search may see: the baseline of whoever would rather spend them on training."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from merging.errors import TaskError
from merging.mergers.material import Material
from merging.mergers.resident import ResidentMerger
from merging.optimization.fine_tuning import TrainingSettings
from merging.optimization.losses import Endless, GradientModels
from merging.optimization.schedule import rate
from merging.recipe import Recipe
from merging.tasks.task import Task


def tune(
    material: Material,
    tasks: Sequence[Task],
    owners: Mapping[str, str],
    start: Recipe,
    settings: TrainingSettings,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    also: Sequence[Task] = (),
) -> Sequence[nn.Module]:
    """Trains all merged weights on the tasks' validation labels, a batch of every task a step; heads that are kept stay.

    Args:
        material: Pool and statistics.
        tasks: Each gives logits and has a validation split.
        owners: Task → the member whose head it has.
        start: The merge to start from.
        settings: How to train; the head's factor and `autocast` do not count.
        device: Where models run.
        progress: Told how many of how many steps are done.
        also: Tasks that nothing is trained on, but whose models are wanted.

    Returns:
        The live models of `tasks` and `also`, all on the same weights.

    Raises:
        TaskError: There is no task, or the loss is not finite.
    """
    if not tasks:
        raise TaskError("there is nothing to fine-tune on: no task gives logits of a validation split")
    live = GradientModels(material.pool, [*tasks, *also], owners, "cross_entropy", device)
    ResidentMerger(material, live.weights).merge(material.check(start))
    groups = [
        {"params": [weight], "weight_decay": settings.weight_decay if weight.ndim > 1 else 0.0}
        for weight in live.weights.values()
    ]
    adam = torch.optim.AdamW(groups, lr=settings.learning_rate)
    batches = [Endless(task, "validation", settings.batch_size) for task in tasks]
    steps = settings.epochs * max(-(-task.size("validation") // settings.batch_size) for task in tasks)
    for step in range(steps):
        _, gradients = live.gradients([next(batch) for batch in batches])
        for name, weight in live.weights.items():
            weight.grad = gradients.get(name)
        nn.utils.clip_grad_norm_([weight for weight in live.weights.values() if weight.grad is not None], 1.0)
        for group in adam.param_groups:
            group["lr"] = settings.learning_rate * rate(step, steps, settings.warm_up)
        adam.step()
        progress(step + 1, steps)
    for weight in live.weights.values():
        weight.grad = None
    return live.models

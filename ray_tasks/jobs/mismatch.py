"""The gradient mismatch of a recipe as one task of the cluster."""

from collections.abc import Callable, Mapping

import torch

from merging.evaluation.live_models import best_device
from merging.mergers.resident import ResidentMerger
from merging.optimization.gradient_mismatch import Mismatch, gradient_mismatch
from merging.recipe import Recipe
from ray_tasks.evaluators.evaluator import Setup
from ray_tasks.jobs.statistics import BoundTask


def measure_mismatch(
    setup: Setup, tasks: Mapping[str, BoundTask], recipe: Recipe, report: Callable[[float], None]
) -> Mismatch:
    """Merges, and takes the gradients of the members' tasks there.

    Args:
        setup: Pool and statistics.
        tasks: Member → its own task.
        recipe: What to merge; its own members take part, with its own factors. Of base and members as they are, all take part.
        report: Told the share of the work that is done.

    Raises:
        MethodError: The recipe has no merge, or a gradient is not finite.
    """
    material = setup.material(resident=True)
    device = best_device()
    out = {name: torch.empty(info.shape, device=device) for name, info in material.pool.weights.items()}
    complete = material.check(recipe)
    ResidentMerger(material, out).merge(complete)
    report(0.5)
    opened = {member: task.open() for member, task in tasks.items()}
    return gradient_mismatch(material, opened, out, complete)

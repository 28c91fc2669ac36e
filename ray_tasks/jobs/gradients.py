"""What `merging.optimization` computes, as tasks of the cluster, from paths and settings."""

from collections.abc import Callable, Mapping, Sequence

import torch

from merging.evaluation.live_models import best_device
from merging.mergers.linear_basis import compute_basis
from merging.mergers.resident import ResidentMerger
from merging.optimization import descent, quadratic_model
from merging.optimization.gradient_mismatch import Mismatch, gradient_mismatch
from merging.optimization.quadratic_model import Quadratic
from merging.recipe import Recipe
from merging.tasks import make_task
from merging.tasks.task import Task
from ray_tasks.evaluators.evaluator import Setup
from ray_tasks.jobs.parallel import Report
from ray_tasks.jobs.statistics import BoundTask


def descend(setup: Setup, start: Recipe, settings: descent.DescentSettings, report: Report) -> list[descent.Waypoint]:
    """`merging.optimization.descent.descend` over all seen tasks that give logits; without labels, over the sources."""
    unlabelled = settings.loss == "distil"
    tasks, owners = sources_with_logits(setup) if unlabelled else (_seen(setup), setup.owners)
    return descent.descend(setup.material(resident=True), tasks, owners, start, settings, best_device(), _share(report))


def predict(
    setup: Setup, start: Recipe, groups: Sequence[Sequence[str]], kind: str, report: Report
) -> dict[str, Quadratic]:
    """Every member's quadratic loss in the scaling factors of a linear method: see `quadratic_model`.

    Args:
        setup: Pool and statistics.
        start: Gives method, members and parameters.
        groups: Weights that share a factor.
        kind: The statistic that stands for curvature.
        report: Told the share of the work that is done.
    """
    material = setup.material(resident=True)
    complete = material.check(start)
    basis = compute_basis(material, complete.method, complete.members, complete.parameters, best_device())
    report(0.5)
    return quadratic_model.quadratics(material, basis, groups, kind)


def measure_mismatch(setup: Setup, tasks: Mapping[str, BoundTask], recipe: Recipe, report: Report) -> Mismatch:
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


def sources_with_logits(setup: Setup) -> tuple[list[Task], dict[str, str]]:
    """What statistics are computed from, and whose heads run on it."""
    opened = [
        make_task(name, settings, setup.members[owner], setup.base) for name, (settings, owner) in setup.sources.items()
    ]
    return _with_logits(opened), {name: owner for name, (_, owner) in setup.sources.items()}


def _with_logits(tasks: Sequence[Task]) -> list[Task]:
    return [task for task in tasks if task.has_logits]


def _seen(setup: Setup) -> list[Task]:
    """The tasks that members were trained on: nothing is trained on the others' labels."""
    return [task for task in _with_logits(setup.open_tasks()) if task.settings.role == "seen"]


def _share(report: Report) -> Callable[[int, int], None]:
    return lambda done, total: report(done / total)

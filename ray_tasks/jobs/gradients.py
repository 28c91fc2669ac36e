"""Gradients, quadratic models and distillation as tasks of the cluster: what `merging` computes, from paths and settings."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from merging.evaluation.live_models import best_device
from merging.mergers.linear_basis import compute_basis
from merging.optimization import descent, distillation, quadratic_model
from merging.optimization.quadratic_model import Quadratic
from merging.recipe import Recipe
from merging.statistics import Partial, save_tensors
from merging.tasks import make_task
from merging.tasks.task import Task
from ray_tasks.evaluators.evaluator import Setup

Report = Callable[[float], None]


def descend(setup: Setup, start: Recipe, settings: descent.DescentSettings, report: Report) -> list[descent.Waypoint]:
    """`merging.optimization.descent.descend` over all tasks that give logits; without labels, over the sources."""
    tasks, owners = _sources(setup) if settings.loss == "distil" else (_tasks(setup), setup.owners)
    return descent.descend(setup.material(resident=True), tasks, owners, start, settings, best_device(), _share(report))


def distil(
    setup: Setup,
    start: Recipe,
    settings: distillation.DistillationSettings,
    key: Mapping[str, Any],
    path: str,
    checkpoint: str,
    data: str,
    report: Report,
) -> str:
    """`merging.optimization.distillation.distil`, kept as a statistics file of the kind `distilled`.

    Args:
        setup: Pool, statistics and tasks.
        start: The merge to start from.
        settings: Steps and step size.
        key: What the numbers depend on, kept in the file.
        path: The file to write.
        checkpoint: Fingerprint of base and members.
        data: Fingerprint of the examples.
        report: Told the share of the work that is done.

    Returns:
        The path.
    """
    tasks, owners = _sources(setup)
    material = setup.material(resident=True)
    weights = distillation.distil(material, tasks, owners, start, settings, best_device(), _share(report))
    counts = {"examples": settings.steps * settings.batch * len(tasks)}
    save_tensors(path, "distilled", key, weights, Partial(counts=counts), checkpoint=checkpoint, data=data)
    return path


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


def _tasks(setup: Setup) -> list[Task]:
    opened = [
        make_task(name, settings, setup.members[setup.owners[name]], setup.base)
        for name, settings in setup.tasks.items()
    ]
    return [task for task in opened if task.has_logits]


def _sources(setup: Setup) -> tuple[list[Task], dict[str, str]]:
    """What statistics are computed from, and whose heads run on it."""
    opened = [
        make_task(name, settings, setup.members[owner], setup.base) for name, (settings, owner) in setup.sources.items()
    ]
    return [task for task in opened if task.has_logits], {name: owner for name, (_, owner) in setup.sources.items()}


def _share(report: Report) -> Callable[[int, int], None]:
    return lambda done, total: report(done / total)

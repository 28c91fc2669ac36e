"""First order beside black box: scaling factors by gradient descent.

Where merged weights are θ_0 + Σ α_t u_t, the gradient of any loss in all factors comes from one backward pass:
∂L/∂α_t = ⟨∇L(θ), u_t⟩, summed over the weights that share the factor.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from merging.errors import TaskError
from merging.mergers import weight_groups
from merging.mergers.linear_basis import compute_basis
from merging.mergers.material import Material
from merging.mergers.resident import ResidentMerger
from merging.optimization.losses import Endless, GradientModels, Loss
from merging.recipe import Recipe
from merging.tasks.task import Task


class DescentSettings(BaseModel):
    """How scaling factors are found by gradient descent."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    loss: Loss = Field(
        "expected_error",
        description="What is minimised, mean over tasks: expected_error (1 − p of the label, a smooth stand-in for accuracy), "
        "cross_entropy, or distil (KL divergence from each task's own member on unlabelled inputs of its train split).",
    )
    steps: int = Field(40, ge=1, description="Steps of Adam.")
    batch: int = Field(16, ge=1, description="Examples per task and step, in turn from the whole split.")
    learning_rate: float = Field(0.05, gt=0, description="Of Adam, for every scaling factor.")
    waypoints: int = Field(
        2, ge=1, description="Recipes that come of it: factors averaged over so many equal parts of the steps."
    )


@dataclass(frozen=True)
class Waypoint:
    """Where a descent came by.

    Args:
        recipe: Start's method and parameters with the factors averaged over a part of the steps.
        loss: Mean loss over that part.
        examples: Examples that were run forward and backward up to its end.
    """

    recipe: Recipe
    loss: float
    examples: int


def descend(
    material: Material,
    tasks: Sequence[Task],
    owners: Mapping[str, str],
    start: Recipe,
    settings: DescentSettings,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Waypoint]:
    """Improves a recipe's scaling factors; deterministic on the CPU.

    Args:
        material: Pool and statistics.
        tasks: What the loss is the mean over; each gives batches and logits.
        owners: Task → the member whose head it has.
        start: A recipe of a method that is linear in its factors; each of its factors is free.
        settings: Loss, steps and step size.
        device: Where models run.
        progress: Told how many of how many steps are done.

    Raises:
        MethodError: The method is not linear.
        TaskError: There is no task, one has no batches, or the loss is not finite.
    """
    if not tasks:
        raise TaskError("there is no gradient to follow: no task gives batches and logits")
    complete = material.check(start)
    basis = compute_basis(material, complete.method, complete.members, complete.parameters, device)
    keys = sorted(complete.scaling)
    places = {name: own for names, own in weight_groups.split_keys(material.pool.weights, complete) for name in names}
    live = GradientModels(material.pool, tasks, owners, settings.loss, device)
    merger = ResidentMerger(material, live.weights)
    factors = torch.tensor([complete.scaling[key] for key in keys], dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([factors], lr=settings.learning_rate)
    batches = [Endless(task, "train" if settings.loss == "distil" else "validation", settings.batch) for task in tasks]
    waypoints: list[Waypoint] = []
    recent: list[tuple[Tensor, float]] = []
    examples = 0
    for step in range(settings.steps):
        recipe = Recipe(complete.method, _scaling(keys, factors.detach()), complete.parameters)
        chosen = [next(batch) for batch in batches]
        merger.merge(recipe)
        loss, gradients = live.gradients(chosen)
        examples += sum(len(batch.indices) for batch in chosen)
        factors.grad = torch.zeros_like(factors)
        for name, gradient in gradients.items():
            moves = basis.vectors[name].flatten(1)
            products = (moves @ gradient.reshape(-1)).double().cpu()
            for index, member in enumerate(basis.members):
                factors.grad[keys.index(places[name][member])] += products[index]
        adam.step()
        recent.append((factors.detach().clone(), loss))
        if (step + 1) * settings.waypoints // settings.steps > len(waypoints):
            mean = torch.stack([kept for kept, _ in recent]).mean(0)
            away = sum(kept for _, kept in recent) / len(recent)
            waypoints.append(
                Waypoint(Recipe(complete.method, _scaling(keys, mean), complete.parameters), away, examples)
            )
            recent = []
        progress(step + 1, settings.steps)
    return waypoints


def _scaling(keys: Sequence[str], factors: Tensor) -> dict[str, float]:
    """Factors by their keys, rounded so that a recipe file can say them."""
    return {key: round(float(factor), 6) for key, factor in zip(keys, factors, strict=True)}

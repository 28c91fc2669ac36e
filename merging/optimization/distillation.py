"""The last step that labels are not needed for: the members' outputs are distilled into all merged weights."""

from collections.abc import Callable, Mapping, Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from merging.errors import TaskError
from merging.mergers.material import Material
from merging.mergers.resident import ResidentMerger
from merging.optimization.losses import Endless, GradientModels
from merging.recipe import Recipe
from merging.tasks.task import Task


class DistillationSettings(BaseModel):
    """How members' outputs are distilled into a merged model."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    steps: int = Field(60, ge=1, description="Steps of Adam on all merged weights.")
    batch: int = Field(16, ge=1, description="Unlabelled train examples per task and step.")
    learning_rate: float = Field(2e-5, gt=0, description="Of Adam; falls linearly to 0.")


def distil(
    material: Material,
    tasks: Sequence[Task],
    owners: Mapping[str, str],
    start: Recipe,
    settings: DistillationSettings,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Tensor]:
    """Minimises the mean KL divergence of the merged model from each task's own member, on that task's train inputs.

    Args:
        material: Pool and statistics.
        tasks: Each gives batches and logits; their labels are not looked at.
        owners: Task → the member whose head it has, and whose outputs are wanted.
        start: The merge to start from.
        settings: Steps and step size.
        device: Where models run; holds two models per task, the weights and Adam's two moments.
        progress: Told how many of how many steps are done.

    Returns:
        Every merged weight by the base's name, float32, on the CPU.

    Raises:
        TaskError: There is no task, one has no train batches, or the loss is not finite.
    """
    if not tasks:
        raise TaskError("there is nothing to distil on: no task gives batches and logits")
    live = GradientModels(material.pool, tasks, owners, "distil", device)
    ResidentMerger(material, live.weights).merge(material.check(start))
    adam = torch.optim.Adam(list(live.weights.values()), lr=settings.learning_rate)
    batches = [Endless(task, "train", settings.batch) for task in tasks]
    for step in range(settings.steps):
        _, gradients = live.gradients([next(batch) for batch in batches])
        for name, weight in live.weights.items():
            weight.grad = gradients.get(name)
        adam.param_groups[0]["lr"] = settings.learning_rate * (1 - step / settings.steps)
        adam.step()
        progress(step + 1, settings.steps)
    return {name: weight.detach().cpu() for name, weight in live.weights.items()}

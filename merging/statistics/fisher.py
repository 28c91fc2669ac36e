"""Diagonal Fisher information of a member on its own data (METHODS: F_t), per example and per class."""

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from merging.checkpoints.models.parameter_names import checkpoint_names, in_checkpoint
from merging.statistics.capture.layers import device_of, means, token_count
from merging.statistics.capture.per_example import PerExample
from merging.statistics.likelihood import LikelihoodSettings, objectives
from merging.statistics.statistic import Partial, Statistic, StatisticSettings, register
from merging.tasks.task import Batch, Task


@register
class Fisher(Statistic):
    """F = (1/N) Σ_x E_y (∇ log p(y|x))², y from the model's p(y|x), for every parameter of the task's model, head included.

    An example's gradient is squared by itself: squaring a batch's would keep cross terms between examples.
    A parameter that the output does not depend on has zeros.
    """

    kind: ClassVar[str] = "fisher"
    version: ClassVar[int] = 2
    settings_type: ClassVar[type[StatisticSettings]] = LikelihoodSettings
    settings: LikelihoodSettings

    def measure(self, model: nn.Module, task: Task, batches: Iterable[Batch]) -> Partial:
        """One forward pass a batch, and a backward pass for every class but one (`exact`), or one.

        The first batch runs once more, forward and backward, to see that its single examples' gradients add up to torch's
        own, and two of its examples once more together and alone. Where something is amiss, every example runs alone.

        Raises:
            StatisticsError: The estimator does not fit the task.
        """
        device = device_of(model)
        likelihood = task.likelihood(model)
        names = checkpoint_names(model)
        sums = {
            names[id(parameter)]: torch.zeros(
                parameter.shape, dtype=torch.promote_types(parameter.dtype, torch.float32), device=device
            )
            for parameter in model.parameters()
        }
        counts = {"examples": 0, "tokens": 0}
        with PerExample(model, task.logits) as passes:
            for batch in batches:
                batch = batch.to(device)
                todo = objectives(passes.forward(batch), batch, self.settings, likelihood)
                for number, objective in enumerate(todo, start=1):
                    passes.add_squares(objective, sums, last=number == len(todo))
                counts["examples"] += len(batch.indices)
                counts["tokens"] += token_count(batch)
        if not counts["examples"]:
            return Partial()
        by_parameter = {name: sums[names[id(parameter)]].cpu() for name, parameter in model.named_parameters()}
        return Partial(in_checkpoint(model, by_parameter), counts)

    def finalize(self, partial: Partial) -> dict[str, Tensor]:
        """Means over examples, float32, in each parameter's shape.

        Raises:
            StatisticsError: It was computed over no examples, or holds NaN or Inf.
        """
        return means(self.kind, partial)

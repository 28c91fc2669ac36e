"""Losses of merged weights and their gradients in all of them, over several tasks at once."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from merging.checkpoints.pool import Pool
from merging.errors import TaskError
from merging.evaluation.shared_weights import SharedWeights, share_weights
from merging.statistics.capture.layers import layer_names
from merging.tasks.likelihood import divergences, losses
from merging.tasks.task import IGNORED, Batch, Split, Task

Loss = Literal["expected_error", "cross_entropy", "distil"]
"""1 − p of the label, a smooth stand-in for accuracy (see `likelihood.surrogates`); − log p of the label, or the loss that
transformers trains several labels or numbers with; KL divergence from the task's own member, which needs no labels."""


class Endless:
    """A split's batches, again and again.

    Args:
        task: Gives batches.
        split: Which examples.
        size: Examples a batch.

    Raises:
        TaskError: The task has no batches of that split.
    """

    def __init__(self, task: Task, split: Split, size: int) -> None:
        self._task, self._split, self._size = task, split, size
        self._next, self._total = 0, task.size(split)
        if not task.has_logits or not self._total:
            raise TaskError(f"task '{task.name}' has no {split} batches to follow a gradient on: leave the stage out")

    def __next__(self) -> Batch:
        if self._next >= self._total:
            self._next = 0
        start, self._next = self._next, self._next + self._size
        return next(self._task.batches(self._split, start, self._next, self._size))


class SharedModels:
    """Live models, one per task, on shared merged weights that take gradients.

    Args:
        pool: Base and members.
        tasks: What the models are of.
        owners: Task → the member whose head it has.
        device: Where models run.
    """

    def __init__(self, pool: Pool, tasks: Sequence[Task], owners: Mapping[str, str], device: torch.device) -> None:
        self.weights = {name: torch.empty(info.shape, device=device) for name, info in pool.weights.items()}
        """The merged weights, to be overwritten by whoever merges, float32."""
        self.models: list[nn.Module] = []
        """A model for each task, in evaluation mode: without dropout."""
        self._shared: list[SharedWeights] = []
        for task in tasks:
            model = task.load_model().requires_grad_(False).eval()
            shared = share_weights(model, pool, pool.members[owners[task.name]], self.weights)
            shared.track_gradients()
            self._shared.append(shared)
            self.models.append(model.to(device))
        for shared in self._shared:
            shared.check(self.weights)

    @property
    def linear(self) -> set[str]:
        """Names of the weights of linear layers."""
        names = {(value.data_ptr(), value.numel()): name for name, value in self.weights.items()}
        every = {
            names.get((module.weight.data_ptr(), module.weight.numel()))
            for model in self.models
            for module in layer_names(model)
            if isinstance(module.weight, Tensor)
        }
        return {name for name in every if name is not None}

    def take_gradients(self) -> dict[str, Tensor]:
        """The gradients of all models, summed by weight; they are cleared."""
        gradients: dict[str, Tensor] = {}
        for shared in self._shared:
            for name, gradient in shared.take_gradients().items():
                gradients[name] = gradients[name].add_(gradient) if name in gradients else gradient
        return gradients


class GradientModels:
    """Losses of live models on shared merged weights, and their gradients in them.

    Args:
        pool: Base and members.
        tasks: What losses are of.
        owners: Task → the member whose head it has.
        loss: What is minimised; `distil` keeps each owner's own model beside the merged one.
        device: Where models run.
    """

    def __init__(
        self, pool: Pool, tasks: Sequence[Task], owners: Mapping[str, str], loss: Loss, device: torch.device
    ) -> None:
        self._shared = SharedModels(pool, tasks, owners, device)
        self.weights, self._models = self._shared.weights, self._shared.models
        self._tasks, self._loss, self._device = tasks, loss, device
        own = tasks if loss == "distil" else ()
        self._teachers = [task.load_model().requires_grad_(False).to(device) for task in own]

    @property
    def models(self) -> Sequence[nn.Module]:
        """Every task's model, in the tasks' order."""
        return self._models

    def gradients(self, batches: Sequence[Batch]) -> tuple[float, dict[str, Tensor]]:
        """The mean loss over tasks, a batch each, and its gradient in the merged weights, float32.

        Raises:
            TaskError: The loss is not a number.
        """
        total = 0.0
        for number, batch in enumerate(batches):
            loss = self._task_loss(number, batch.to(self._device)) / len(batches)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        if total != total:
            raise TaskError("the loss is NaN: the merged model's logits are not finite")
        return total, self._shared.take_gradients()

    def _task_loss(self, number: int, batch: Batch) -> Tensor:
        """A task's mean loss on a batch."""
        task, model = self._tasks[number], self._models[number]
        likelihood, logits, labels = task.likelihood(model), task.logits(model, batch), batch.labels
        wanted = logits
        if self._loss == "distil":
            with torch.no_grad():
                wanted = task.logits(self._teachers[number], batch)
        if batch.is_sequential:  # target positions alone: what is said of padding means nothing
            targets = labels != IGNORED
            logits, wanted, labels = logits[targets], wanted[targets], labels[targets]
        if self._loss == "distil":
            return divergences(likelihood, logits, wanted).sum() / max(len(logits), 1)
        known = labels.isfinite().all(1) if labels.is_floating_point() else labels != IGNORED
        logits, labels = logits[known], labels[known]
        if self._loss == "cross_entropy":
            return losses(likelihood, logits, labels).mean()
        return 1.0 - task.surrogates(model, logits, labels).mean()

"""Several members as one model that says what they say on average: the ensemble that merges are compared with."""

import inspect
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from merging.errors import TaskError
from merging.evaluation.shared_weights import SharedWeights, sharing_model
from merging.mergers.material import Material
from merging.mergers.resident import ResidentMerger
from merging.recipe import member_recipe
from merging.tasks.likelihood import Likelihood
from merging.tasks.predictions import Predictions
from merging.tasks.task import Score, Split, Task

Mean: TypeAlias = Literal["probabilities", "logits"]
"""What is averaged over members."""


class Ensemble(nn.Module):
    """A model whose logits are the mean of several models', or those of the mean of their probabilities.

    Numbers (a regression) are averaged as they are.

    Args:
        models: Models of one task, with the same inputs.
        likelihood: What their logits are parameters of.
        mean: What is averaged.
    """

    def __init__(self, models: Sequence[nn.Module], likelihood: Likelihood, mean: Mean = "probabilities") -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.config: Any = models[0].config
        self._likelihood = likelihood
        self._mean = mean

        def forward(*args: Any, **inputs: Any) -> Any:
            return self._together(*args, **inputs)

        # tasks look at the arguments of `forward`: they are the members'
        forward.__signature__ = inspect.signature(models[0].forward)  # type: ignore[attr-defined]
        self.forward = forward

    def generate(self, *args: Any, **inputs: Any) -> Any:
        """Refused: decoding keeps the state of one model.

        Raises:
            TaskError: Always.
        """
        raise TaskError("an ensemble gives likelihoods, not texts: judge it by likelihood or by choices")

    def _together(self, *args: Any, **inputs: Any) -> Any:
        each = [model(*args, **inputs).logits for model in self.models]
        return SimpleNamespace(logits=mean_logits(each, self._likelihood, self._mean))


def mean_logits(each: Sequence[Tensor], likelihood: Likelihood, mean: Mean) -> Tensor:
    """The mean of several models' logits [..., C], or the logits of the mean of their probabilities; in float32 or better.

    Args:
        each: Of every model, all of one shape.
        likelihood: What they are parameters of.
        mean: What is averaged; of a regression always the numbers themselves.
    """
    logits = torch.stack([value.double() if value.dtype == torch.float64 else value.float() for value in each])
    if mean == "logits" or likelihood == "gaussian":
        return logits.mean(0)
    if likelihood == "categorical":
        return logits.log_softmax(-1).logsumexp(0)  # up to a constant, which no softmax sees
    positive, negative = (nn.functional.logsigmoid(sign * logits).logsumexp(0) for sign in (1, -1))
    return positive - negative


def measure_ensemble(
    material: Material,
    tasks: Sequence[Task],
    owners: Mapping[str, str],
    members: Sequence[str],
    split: Split,
    device: torch.device,
    *,
    mean: Mean = "probabilities",
    limit: int | None = None,
    precision: str = "float32",
) -> dict[str, tuple[Score, Predictions | None]]:
    """Measures the ensemble of members on every task, each with the head of the task's owner where heads are not merged.

    Args:
        material: The pool.
        tasks: What to measure on; each gives logits.
        owners: Task → the member whose head it is evaluated with.
        members: Who takes part.
        split: Which examples.
        device: Holds every member once.
        mean: What is averaged.
        limit: At most this many examples per task.
        precision: `float32`, or `bfloat16` for autocast.

    Raises:
        TaskError: A task gives no logits, or is judged by what models generate.
    """
    pool = material.pool
    weights: dict[str, dict[str, Tensor]] = {}
    for member in members:
        out = {name: torch.empty(info.shape, dtype=torch.float32, device=device) for name, info in pool.weights.items()}
        ResidentMerger(material, out).merge(member_recipe(member))
        weights[member] = out
    measured = {}
    for task in tasks:
        if not task.has_logits:
            raise TaskError(f"task '{task.name}' ({task.kind}) gives no logits, so there is no ensemble on it")
        owner = pool.members[owners[task.name]]
        models: list[nn.Module] = []
        for member in members:
            model, shared = _model(task, material, owner, weights[member])
            shared.check(weights[member])
            models.append(model.to(device))
        together = Ensemble(models, task.likelihood(models[0]), mean).eval()
        measured[task.name] = task.measure(together, split, limit=limit, precision=precision)
    return measured


def _model(task: Task, material: Material, owner: Any, weights: dict[str, Tensor]) -> tuple[nn.Module, SharedWeights]:
    """A task's model on a member's weights."""
    model, shared = sharing_model(task, material.pool, owner, weights)
    shared.refresh()
    return model, shared

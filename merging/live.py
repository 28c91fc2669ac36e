"""Live models, one a task, that all run on the same merged weights."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from merging.errors import PoolError
from merging.merge import Material, ResidentMerger
from merging.pool import Member, Pool
from merging.recipe import Recipe
from merging.statistics.names import checkpoint_names
from merging.tasks.base import Score, Split, Task


def best_device() -> torch.device:
    """The accelerator that this process may use, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("cpu")


@dataclass(frozen=True)
class Measurement:
    """A recipe's scores.

    Args:
        scores: By task.
        merge_seconds: Wall time of the merge, with the preparation of a method that is asked for first.
        evaluate_seconds: Wall time of the evaluation of all tasks.
        report: The method's figures on the merge.
    """

    scores: Mapping[str, Score]
    merge_seconds: float
    evaluate_seconds: float
    report: Mapping[str, float]


class LiveModels:
    """Merges a recipe into live models and measures them; nothing is written to disk.

    Args:
        material: Pool and statistics.
        tasks: The tasks to evaluate; each brings its head.
        owners: Task → the member whose head it is evaluated with.
        device: Where models and prepared state lie.
        precision: `float32`, or `bfloat16` for autocast in evaluation.
    """

    def __init__(
        self,
        material: Material,
        tasks: Sequence[Task],
        owners: Mapping[str, str],
        device: torch.device,
        precision: str = "float32",
    ) -> None:
        self._tasks = tasks
        self._precision = precision
        pool = material.pool
        self._out = {
            name: torch.empty(info.shape, dtype=torch.float32, device=device) for name, info in pool.weights.items()
        }
        self._models: dict[str, nn.Module] = {}
        used: set[str] = set()
        for task in tasks:
            model = task.load_model().requires_grad_(False)
            used |= share_weights(model, pool, pool.members[owners[task.name]], self._out)
            self._models[task.name] = model.to(device)
        if not used:
            raise PoolError("no task's model holds any of the merged weights: is its `head` a member of this pool?")
        self._merger = ResidentMerger(material, self._out)

    def measure(self, recipe: Recipe, split: Split, limit: int | None = None) -> Measurement:
        """Merges, then evaluates every task.

        Raises:
            MethodError: The recipe is wrong, or has no merge.
            TaskError: An evaluator failed or gave no finite number.
        """
        start = time.perf_counter()
        report = self._merger.merge(recipe)
        merged = time.perf_counter()
        scores = {
            task.name: task.evaluate(self._models[task.name], split, limit=limit, precision=self._precision)
            for task in self._tasks
        }
        return Measurement(scores, merged - start, time.perf_counter() - merged, report)


def share_weights(model: nn.Module, pool: Pool, member: Member, out: Mapping[str, Tensor]) -> set[str]:
    """Replaces a model's parameters and buffers by the tensors of `out`, so that a merge changes the model itself.

    A model may lack weights that the checkpoint has (a pooler that this task does not use), and name them with or without
    the backbone's prefix.

    Returns:
        The base's names of the weights that the model holds.
    """
    saved = checkpoint_names(model)
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    names: dict[str, int] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for local, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None:
                places.setdefault(id(value), []).append((module, local))
                names.setdefault(saved.get(id(value), f"{prefix}.{local}" if prefix else local), id(value))
    held = set()
    for name in pool.weights:
        own = member.names[name]
        spellings = (own, name, own.partition(".")[2], name.partition(".")[2])
        found = next((names[spelling] for spelling in spellings if spelling in names), None)
        if found is None:
            continue
        held.add(name)
        module, local = places[found][0]
        is_parameter = isinstance(getattr(module, local), nn.Parameter)
        shared = nn.Parameter(out[name], requires_grad=False) if is_parameter else out[name]
        for module, local in places[found]:
            setattr(module, local, shared)
    return held

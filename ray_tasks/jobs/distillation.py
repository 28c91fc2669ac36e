"""A distillation whose steps' parts are computed by actors side by side, each with a copy of the weights."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch
from torch import Tensor

from merging.evaluation.live_models import best_device
from merging.io import storage
from merging.optimization.distillation import DistillationResult, train
from merging.optimization.distillation_settings import DistillationSettings
from merging.optimization.distiller import Distiller, GradientPart
from merging.recipe import Recipe
from merging.statistics import Partial, save_tensors
from merging.tasks.task import Task
from ray_tasks.cluster_errors import surfaced
from ray_tasks.connect import ANY_NODE, NodeKind
from ray_tasks.evaluators.evaluator import Setup
from ray_tasks.jobs.gradients import sources_with_logits
from ray_tasks.jobs.lockstep import in_lockstep

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class DistillationJob:
    """The distillation into a merge.

    Args:
        setup: Pool, statistics and tasks.
        start: The merge to start from.
        settings: What to do.
        key: What the numbers depend on, kept in the file.
        path: The statistics file to write; teachers' outputs are kept beside it, and how far it is while it is made.
        checkpoint: Fingerprint of base and members.
        data: Fingerprint of the examples.
    """

    setup: Setup
    start: Recipe
    settings: DistillationSettings
    key: Mapping[str, Any]
    path: str
    checkpoint: str
    data: str

    @property
    def resume(self) -> str:
        """The file that says how far it is."""
        return f"{self.path}.part"

    @property
    def cache(self) -> str:
        """Where teachers' outputs are kept."""
        return self.path.rpartition("/")[0]


def sources_to_distil(setup: Setup) -> tuple[list[Task], dict[str, str]]:
    """What there is to distil on, and whose heads run on it: a task of no member's may have no train examples."""
    tasks, owners = sources_with_logits(setup)
    return [task for task in tasks if task.size("train")], owners


def distil(
    job: DistillationJob,
    *,
    workers: int | None = None,
    threads: int = 1,
    gpus: float = 0.0,
    retries: int = 3,
    nodes: NodeKind = ANY_NODE,
    progress: Callable[[float], None] = lambda share: None,
) -> DistillationResult:
    """Distils, and keeps the result as a statistics file of the kind `distilled`.

    Args:
        job: What to do.
        workers: Actors, at most one for each part of a step; by default as many as the cluster has room for. The result does
            not depend on their number.
        threads: CPUs and torch threads of each.
        gpus: GPUs of each.
        retries: How often the work goes on from its last state after an actor was lost.
        nodes: Which nodes they may be started on.
        progress: Told the share of the work that is done.

    Raises:
        MergequestError: A task is unusable, or the loss is no number.
        ClusterError: Actors were lost more than `retries` times.
    """

    def work(actors: Sequence[Any]) -> DistillationResult:
        with surfaced("distilling"):
            together = _Actors(actors, job.settings.parts, *ray.get(actors[0].about.remote()))
            return train(together, job.settings, job.path, progress, resume=job.resume)

    result = in_lockstep(
        _DistillationWorker,
        lambda room: [(job, threads)] * max(1, min(workers or room, job.settings.parts)),
        work,
        what="the distillation",
        threads=threads,
        gpus=gpus,
        retries=retries,
        nodes=nodes,
    )
    about = {
        **job.key,
        "steps": result.steps,
        "best": result.best,
        "looks": [[k.step, k.held_out] for k in result.looks],
    }
    counts = Partial(counts={"examples": result.examples})
    save_tensors(job.path, "distilled", about, result.weights, counts, checkpoint=job.checkpoint, data=job.data)
    if storage.exists(job.resume):
        storage.remove(job.resume)
    return result


class _Actors:
    """`merging.optimization.distillation.DistillationWorkers` that are actors."""

    def __init__(self, actors: Sequence[Any], parts: int, steps: int, sizes: tuple[int, int], teachers: int) -> None:
        self._actors, self._parts, self._teachers = actors, range(parts), teachers
        self.steps, self.sizes = steps, sizes

    def teach(self, progress: Callable[[int, int], None]) -> None:
        """Runs the teachers, one an actor."""
        waiting = [self._of(number).run_teacher.remote(number) for number in range(self._teachers)]
        while waiting:
            ready, waiting = ray.wait(waiting)
            ray.get(ready)
            progress(self._teachers - len(waiting), self._teachers)

    def step(self, step: int) -> float:
        """Takes a step; every actor sums the parts in their order."""
        parts = [self._of(part).gradient.remote(step, part) for part in self._parts]
        losses: list[float] = ray.get([actor.apply.remote(step, *parts) for actor in self._actors])
        return losses[0]

    def look(self) -> float:
        """The mean loss on the held-out examples."""
        losses: list[float] = ray.get([self._of(part).look.remote(part) for part in self._parts])
        return sum(losses)

    def weights(self) -> dict[str, Tensor]:
        """The merged weights."""
        return _tensors(ray.get(self._actors[0].weights.remote()))

    def state(self) -> dict[str, Tensor]:
        """See `Distiller.state`."""
        return _tensors(ray.get(self._actors[0].state.remote()))

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See `Distiller.restore`."""
        kept = ray.put(_arrays(state))
        ray.get([actor.restore.remote(kept) for actor in self._actors])

    def _of(self, number: int) -> Any:
        return self._actors[number % len(self._actors)]


class _DistillationWorker:
    """A distiller in a process of its own; what leaves it lies on the CPU."""

    def __init__(self, job: DistillationJob, threads: int) -> None:
        torch.set_num_threads(threads)
        self._job = job

    @cached_property
    def _distiller(self) -> Distiller:
        """Made by the first call: an error of a call keeps its type, one of an actor's making does not."""
        job = self._job
        tasks, owners = sources_to_distil(job.setup)
        material = job.setup.material(resident=True)
        return Distiller(material, tasks, owners, job.start, job.settings, best_device(), job.cache)

    def about(self) -> tuple[int, tuple[int, int], int]:
        """Steps, examples of a step and held out, number of teachers."""
        made = self._distiller
        return made.steps, made.sizes, made.teachers

    def run_teacher(self, number: int) -> None:
        """See `Distiller.run_teacher`."""
        self._distiller.run_teacher(number)

    def gradient(self, step: int, part: int) -> tuple[float, Arrays]:
        """See `Distiller.gradient`."""
        part_gradient = self._distiller.gradient(step, part)
        return part_gradient.loss, _arrays(part_gradient.gradients)

    def apply(self, step: int, *parts: tuple[float, Arrays]) -> float:
        """See `Distiller.apply`."""
        return self._distiller.apply(step, [GradientPart(loss, _tensors(gradients)) for loss, gradients in parts])

    def look(self, part: int) -> float:
        """See `Distiller.look`."""
        return self._distiller.look(part)

    def weights(self) -> Arrays:
        """See `Distiller.weights`."""
        return _arrays(self._distiller.weights())

    def state(self) -> Arrays:
        """See `Distiller.state`."""
        return _arrays(self._distiller.state())

    def restore(self, state: Arrays) -> None:
        """See `Distiller.restore`."""
        self._distiller.restore(_tensors(state))


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, npt.NDArray[Any]]:
    """Tensors on the CPU as arrays, which processes of a node share without a copy."""
    return {name: value.numpy() for name, value in tensors.items()}


def _tensors(arrays: Arrays) -> dict[str, Tensor]:
    """Arrays as tensors without a copy; what Ray shares between processes is read only, and nothing here writes into it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return {name: torch.from_numpy(np.asarray(value)) for name, value in arrays.items()}

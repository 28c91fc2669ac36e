"""The members' outputs, on their own unlabelled inputs, are distilled into a merged model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from merging.io import hashing
from merging.mergers.material import Material
from merging.optimization.distillation_record import Look, Record
from merging.optimization.distillation_settings import DistillationSettings
from merging.optimization.distiller import Distiller
from merging.recipe import Recipe
from merging.tasks.task import Task


@dataclass(frozen=True)
class DistillationResult:
    """What came of a distillation.

    Args:
        weights: Every merged weight by the base's name, float32, on the CPU: those that the held-out examples liked best.
        looks: All looks at the held-out examples; none where none were held out.
        steps: Steps that were taken.
        best: Steps behind the weights.
        examples: Examples that were run forward and backward.
    """

    weights: Mapping[str, Tensor]
    looks: tuple[Look, ...]
    steps: int
    best: int
    examples: int


class DistillationWorkers(Protocol):
    """Who computes a distillation: workers that all hold the same weights."""

    @property
    def steps(self) -> int:
        """Steps in all."""
        ...

    @property
    def sizes(self) -> tuple[int, int]:
        """Examples of a step, and held-out examples."""
        ...

    def teach(self, progress: Callable[[int, int], None]) -> None:
        """Runs all teachers that have not been run."""
        ...

    def step(self, step: int) -> float:
        """Takes a step; returns its loss."""
        ...

    def look(self) -> float:
        """The mean loss on the held-out examples."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """The merged weights, which no later step changes."""
        ...

    def state(self) -> dict[str, Tensor]:
        """See `Distiller.state`."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See `Distiller.restore`."""
        ...


class OneWorker:
    """One worker, in this process."""

    def __init__(self, distiller: Distiller) -> None:
        self._distiller = distiller

    @property
    def steps(self) -> int:
        """Steps in all."""
        return self._distiller.steps

    @property
    def sizes(self) -> tuple[int, int]:
        """Examples of a step, and held-out examples."""
        return self._distiller.sizes

    def teach(self, progress: Callable[[int, int], None]) -> None:
        """Runs all teachers that have not been run."""
        for number in range(self._distiller.teachers):
            self._distiller.run_teacher(number)
            progress(number + 1, self._distiller.teachers)

    def step(self, step: int) -> float:
        """Takes a step; returns its loss."""
        parts = [self._distiller.gradient(step, part) for part in range(self._distiller.settings.parts)]
        return self._distiller.apply(step, parts)

    def look(self) -> float:
        """The mean loss on the held-out examples."""
        return sum(self._distiller.look(part) for part in range(self._distiller.settings.parts))

    def weights(self) -> dict[str, Tensor]:
        """The merged weights."""
        return self._distiller.weights()

    def state(self) -> dict[str, Tensor]:
        """See `Distiller.state`."""
        return self._distiller.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See `Distiller.restore`."""
        self._distiller.restore(state)


def distil(
    material: Material,
    tasks: Sequence[Task],
    owners: Mapping[str, str],
    start: Recipe,
    settings: DistillationSettings,
    device: torch.device,
    progress: Callable[[float], None] = lambda share: None,
    *,
    cache: str | None = None,
    resume: str | None = None,
    every: int = 50,
) -> DistillationResult:
    """Minimises the mean divergence of the merged model from each task's own member, on that task's train inputs.

    Args:
        material: Pool and statistics.
        tasks: Each gives batches and logits; their labels are not looked at.
        owners: Task → the member whose head it has, and whose outputs are wanted.
        start: The merge to start from.
        settings: What to do.
        device: Where models run.
        progress: Told the share of the work that is done.
        cache: Directory that teachers' outputs are kept in; None to run them live.
        resume: File that says how far it is; a run that was killed goes on from there, to the result of an unbroken one.
        every: Steps between two writes of that file.

    Raises:
        TaskError: There is no task, one has too few train examples, or the loss is not finite.
    """
    distiller = Distiller(material, tasks, owners, start, settings, device, cache)
    key = hashing.fingerprint([start.as_dict(), settings.model_dump(mode="json"), material.pool.fingerprints()])
    return train(OneWorker(distiller), settings, key, progress, resume=resume, every=every)


def train(
    workers: DistillationWorkers,
    settings: DistillationSettings,
    key: str,
    progress: Callable[[float], None] = lambda share: None,
    *,
    resume: str | None = None,
    every: int = 50,
) -> DistillationResult:
    """The loop of a distillation over workers; see `distil`.

    Args:
        workers: Who computes.
        settings: What to do.
        key: What the numbers depend on: `resume` is only read where it was written under the same one.
        progress: Told the share of the work that is done.
        resume: See `distil`.
        every: See `distil`.
    """
    record, state = (resume and Record.read(resume, key)) or (Record(key), None)
    if state is not None:
        workers.restore(state)
    workers.teach(lambda done, total: progress(0.1 * done / total))
    steps, (batch, held_out) = workers.steps, workers.sizes
    between = max(1, -(-steps // settings.evaluations))

    def look() -> None:
        if not held_out:
            return
        training = float(np.mean(record.losses)) if record.losses else float("nan")
        now = Look(record.step, workers.look(), training)
        if record.step and now.held_out < min([np.inf, *(past.held_out for past in record.looks if past.step)]):
            record.best = record.step, workers.weights()
        record.looks.append(now)
        record.losses = []

    if not record.step:
        look()
    while record.step < steps and record.waited < settings.patience:
        record.losses.append(workers.step(record.step))
        record.step += 1
        if record.step % between == 0 or record.step == steps:
            look()
        progress(0.1 + 0.9 * record.step / steps)
        if resume and record.step % every == 0 and record.step < steps:
            record.write(resume, workers.state())
    best, weights = record.best or (record.step, workers.weights())
    return DistillationResult(weights, tuple(record.looks), record.step, best, record.step * batch)

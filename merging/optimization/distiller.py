"""What one worker of a distillation computes: its parts of a step, and the step by the sum of all parts.

A step's examples are cut into fixed parts, and the parts' gradients are summed in their order: whoever computes them, one
process or several, comes to the same weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from merging.errors import TaskError
from merging.mergers.material import Material
from merging.mergers.resident import ResidentMerger
from merging.optimization.distillation_settings import DistillationSettings
from merging.optimization.divergence import divergence, example_means, hidden_distance, target_rows
from merging.optimization.losses import SharedModels
from merging.optimization.low_rank import LowRank
from merging.optimization.schedule import Places, Schedule, lengths_of, parted, rate
from merging.optimization.teachers import Teacher, hidden_and_logits
from merging.recipe import Recipe
from merging.tasks.task import Task

USUAL, USUAL_OF_TOKENS, PASSES = (400, 2000), (100, 500), 10
"""Steps where the settings name none: a pass over all inputs, within these bounds (of tasks that have a target at every token
within the second ones), and at most so many passes."""
MOST_HELD_OUT = 128
"""Held-out examples of a member: enough to see where the loss turns, cheap enough to be looked at often."""
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of each weight."""


@dataclass(frozen=True)
class GradientPart:
    """A part of a step: its loss and the gradient in what is trained, by name, on the CPU."""

    loss: float
    gradients: Mapping[str, Tensor]


class Distiller:
    """The model that is distilled into, its optimizer, and the members' outputs: what one worker holds.

    All workers hold the same weights, for each applies the sum of all parts.

    Args:
        material: Pool and statistics.
        tasks: Each gives batches and logits; their labels are not looked at.
        owners: Task → the member whose head it has, and whose outputs are wanted.
        start: The merge to start from.
        settings: See there.
        device: Where models run; holds a model per task, the weights, their gradient and Adam's two moments.
        cache: Directory that teachers' outputs are kept in; None to run teachers live.

    Raises:
        TaskError: There is no task, or one has too few train examples.
    """

    def __init__(
        self,
        material: Material,
        tasks: Sequence[Task],
        owners: Mapping[str, str],
        start: Recipe,
        settings: DistillationSettings,
        device: torch.device,
        cache: str | None,
    ) -> None:
        if not tasks:
            raise TaskError("there is nothing to distil on: no task gives batches and logits")
        self.settings, self._tasks, self._device = settings, list(tasks), device
        self._owners = [owners[task.name] for task in tasks]
        sizes = [min(task.size("train"), settings.examples or task.size("train")) for task in tasks]
        for task, size in zip(tasks, sizes, strict=True):
            if size < 2:
                raise TaskError(f"task '{task.name}' has {size} train examples to distil on: add some")
        kept = [min(MOST_HELD_OUT, round(size * settings.held_out)) for size in sizes]
        # From the end of the split's order: statistics are computed from its beginning, and a merge fits these best.
        self.held_out: list[Places] = [np.arange(size - number, size) for number, size in zip(kept, sizes, strict=True)]
        trained = [np.arange(size - number) for number, size in zip(kept, sizes, strict=True)]
        lengths = [lengths_of(task, places) for task, places in zip(tasks, trained, strict=True)]
        self.schedule = Schedule(trained, lengths, settings.batch, settings.seed)
        fewest, most = USUAL if all(task.one_label for task in tasks) else USUAL_OF_TOKENS
        once = self.schedule.steps_a_pass
        self.steps = settings.steps or min(max(fewest, min(once, most)), PASSES * once)
        weights = np.array([settings.weights.get(owner, 1.0) for owner in self._owners])
        if not weights.sum() > 0:
            raise TaskError(
                "distil.weights: all are 0, so that nothing is left to distil: give some member a positive one"
            )
        counts = np.array([len(places) for places in trained])
        # Every member counts by its weight alone, however many examples it has.
        self._importance = weights * counts.sum() / (weights.sum() * counts)
        self._shares = weights / weights.sum()
        live = settings.teachers == "live" or settings.hidden > 0 or cache is None
        bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        self._autocast = settings.precision == "bfloat16" or (settings.precision == "auto" and bfloat16)
        self._teachers = [
            Teacher(
                task,
                material.pool.members[owner].checkpoint.fingerprint,
                size,
                device,
                temperature=settings.temperatures.get(owner, settings.temperature),
                top_k=settings.top_k,
                whole=settings.targets == "all",
                cache=None if live else cache,
                autocast=self._autocast,
            )
            for task, owner, size in zip(tasks, self._owners, sizes, strict=True)
        ]
        self._models = SharedModels(material.pool, tasks, owners, device)
        ResidentMerger(material, self._models.weights).merge(material.check(start))
        self._low_rank = (
            LowRank(self._models.weights, self._models.linear, settings.rank, settings.seed) if settings.rank else None
        )
        trainable = self._low_rank.factors if self._low_rank else self._models.weights
        self.trained: dict[str, Tensor] = dict(sorted(trainable.items()))
        for value in self.trained.values():
            value.requires_grad_(False)
        self._adam = torch.optim.AdamW(
            list(self.trained.values()),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=device.type == "cpu",  # a ninth of the time there; on a GPU it wants its step count on the device
        )

    @property
    def teachers(self) -> int:
        """How many there are."""
        return len(self._teachers)

    @property
    def sizes(self) -> tuple[int, int]:
        """Examples of a step, and held-out examples."""
        return self.settings.batch, sum(len(places) for places in self.held_out)

    def run_teacher(self, number: int) -> None:
        """Runs a teacher over all its examples and keeps its outputs, unless they are there, or are not to be kept."""
        self._teachers[number].run()

    def gradient(self, step: int, part: int) -> GradientPart:
        """The loss and the gradient of a part of a step.

        Raises:
            TaskError: The loss is not a number.
        """
        total = 0.0
        units = self.schedule.step(step)
        size = sum(len(places) for places in units)
        for number, places in self._chunks(units, part, size):
            loss = self._losses(number, places).sum() * (float(self._importance[number]) / size)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        if total != total:
            raise TaskError("the distillation's loss is NaN: the merged model's logits are not finite")
        gradients = self._models.take_gradients()
        if self._low_rank:
            gradients = self._low_rank.gradients(gradients)
        return GradientPart(total, {name: value.cpu() for name, value in gradients.items()})

    def apply(self, step: int, parts: Sequence[GradientPart]) -> float:
        """Takes a step by the sum of its parts' gradients; returns its loss."""
        for name, value in self.trained.items():
            gradients = [part.gradients[name].to(self._device) for part in parts if name in part.gradients]
            value.grad = reduce(torch.add, gradients) if gradients else None
        settings = self.settings
        self._adam.param_groups[0]["lr"] = settings.learning_rate * rate(step, self.steps, settings.warm_up)
        self._adam.step()
        if self._low_rank:
            self._low_rank.write()
        return sum(part.loss for part in parts)

    @torch.no_grad()
    def look(self, part: int) -> float:
        """A part's contribution to the mean loss on the held-out examples."""
        total = 0.0
        for number, places in self._chunks(self.held_out, part, self.settings.batch):
            losses = self._losses(number, places)
            total += float(losses.double().sum()) * float(self._shares[number]) / len(self.held_out[number])
        return total

    def weights(self) -> dict[str, Tensor]:
        """A copy of the merged weights, on the CPU."""
        return {name: value.detach().to("cpu", copy=True) for name, value in self._models.weights.items()}

    def state(self) -> dict[str, Tensor]:
        """What a worker that takes over must know: what is trained, and the optimizer's moments."""
        values = {f"trained:{name}": value.detach() for name, value in self.trained.items()}
        for name, value in self.trained.items():
            for key, moment in self._adam.state.get(value, {}).items():
                values[f"{key}:{name}"] = moment
        return {name: value.to("cpu", copy=True).contiguous() for name, value in values.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from `state`."""
        for name, value in self.trained.items():
            value.copy_(state[f"trained:{name}"])
            moments = {key: state[f"{key}:{name}"] for key in MOMENTS if f"{key}:{name}" in state}
            self._adam.state[value] = {
                key: moment.clone() if key == "step" else moment.to(self._device, copy=True)
                for key, moment in moments.items()
            }
        if self._low_rank:
            self._low_rank.write()

    def _chunks(self, units: Sequence[Places], part: int, most: int) -> Iterator[tuple[int, Places]]:
        """A part's examples, task by task, as many at once as the settings say, or else at most so many."""
        at_once = self.settings.at_once or most
        for number, places in parted(units, part, self.settings.parts):
            for first in range(0, len(places), at_once):
                yield number, places[first : first + at_once]

    def _losses(self, number: int, places: Places) -> Tensor:
        """The loss of each of a task's examples [N]."""
        task, teacher, model = self._tasks[number], self._teachers[number], self._models.models[number]
        batch = teacher.batch(places).to(self._device)
        hidden = self.settings.hidden
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            states, logits = hidden_and_logits(task, model, batch, hidden > 0)
            wanted, taught = teacher.wanted(places, batch, hidden > 0)
        rows, counts = target_rows(logits.float(), batch)
        apart = divergence(rows, wanted, teacher.likelihood, teacher.temperature)
        losses = example_means(apart, counts)
        if states is not None and taught is not None:
            losses = losses + hidden * hidden_distance(states.float(), taught.float(), batch)
        return losses

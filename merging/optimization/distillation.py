"""The members' outputs, on their own unlabelled inputs, are distilled into a merged model.

A step's examples are cut into fixed parts, and the parts' gradients are summed in their order: whoever computes them, one
process or several, comes to the same weights.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save as serialize
from torch import Tensor

from merging.checkpoints.formats.safetensors_file import SafetensorsFile
from merging.errors import MergequestError, TaskError
from merging.io import atomic, hashing, storage
from merging.mergers.material import Material
from merging.mergers.resident import ResidentMerger
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


class DistillationSettings(BaseModel):
    """How members' outputs are distilled into a merged model."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    steps: int | None = Field(
        None,
        ge=1,
        description="Steps of AdamW on all merged weights; by default one pass over all inputs, but at least 400 and at most "
        "2,000 steps (100 and 500 where every token has a target), and never more than ten passes.",
    )
    batch: int = Field(32, ge=1, description="Unlabelled train examples a step, shuffled over all members.")
    at_once: int | None = Field(
        None,
        ge=1,
        description="Examples of one member that run at once; by default all of a part's. Gradients are accumulated, so that "
        "fewer take less memory and change rounding only.",
    )
    learning_rate: float = Field(
        5e-5, gt=0, description="Of AdamW at its peak: it rises linearly from 0 and falls linearly to 0."
    )
    warm_up: float = Field(0.1, ge=0, le=1, description="Share of the steps in which the rate rises.")
    weight_decay: float = Field(0.01, ge=0, description="Of AdamW.")
    examples: int | None = Field(
        None, ge=2, description="Train examples of each member that are used at most; by default all."
    )
    held_out: float = Field(
        0.1,
        ge=0,
        le=0.5,
        description="Share of each member's examples, at most 128, that is not trained on: the weights that it likes best are "
        "kept, and distillation stops early by it. 0: all are trained on, to the end.",
    )
    evaluations: int = Field(8, ge=1, description="How often the held-out examples are looked at.")
    patience: int = Field(3, ge=1, description="Stop after so many looks in a row that were no better than the best.")
    temperature: float = Field(1.0, gt=0, description="Of teachers and model.")
    temperatures: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="Member → its own temperature, where it is another."
    )
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict, description="Member → its weight in the loss; by default 1. Only ratios matter."
    )
    hidden: float = Field(
        0.0,
        ge=0,
        description="Weight of the last hidden states' distance (relative, squared) beside the outputs' divergence; above 0 "
        "teachers run live.",
    )
    top_k: int | None = Field(
        64,
        ge=1,
        description="Of more classes than these (a vocabulary) a teacher's likeliest are kept, and all others as one class; "
        "null for every class.",
    )
    targets: Literal["completion", "all"] = Field(
        "completion", description="Which tokens of a causal language model's examples count: completions, or all."
    )
    rank: int | None = Field(
        None, ge=1, description="Train low-rank additions (LoRA) of this rank to every matrix instead of all weights."
    )
    teachers: Literal["cached", "live"] = Field(
        "cached",
        description="cached: each member runs once over its examples, and its outputs are kept on disk; live: all members stay "
        "in memory and run in every step, where outputs are too large to be kept.",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Of the forward pass (bfloat16 is autocast; weights and sums stay float32); auto: bfloat16 on a GPU that "
        "has it.",
    )
    parts: int = Field(
        2,
        ge=1,
        description="Into how many parts a step is cut, which workers compute side by side: at most so many work.",
    )
    seed: int = Field(0, ge=0, lt=1 << 63, description="Of the order of examples.")


@dataclass(frozen=True)
class Look:
    """What a look at the held-out examples showed.

    Args:
        step: Steps taken before it.
        held_out: Mean loss on the held-out examples.
        training: Mean loss of the steps since the look before; NaN before the first step.
    """

    step: int
    held_out: float
    training: float


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
            list(self.trained.values()), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )

    @property
    def teachers(self) -> int:
        """How many there are."""
        return len(self._teachers)

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
        for number, places in parted(units, part, self.settings.parts):
            at_once = self.settings.at_once or len(places)
            for first in range(0, len(places), at_once):
                losses = self._losses(number, places[first : first + at_once])
                loss = losses.sum() * (float(self._importance[number]) / size)
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
        for number, places in parted(self.held_out, part, self.settings.parts):
            at_once = self.settings.at_once or self.settings.batch
            for first in range(0, len(places), at_once):
                losses = self._losses(number, places[first : first + at_once])
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
            if not moments:
                del self._adam.state[value]
        if self._low_rank:
            self._low_rank.write()

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


MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of each weight."""


@dataclass
class Record:
    """How far a distillation is, as it is kept on disk.

    Args:
        key: What the numbers depend on: another distillation does not go on from here.
        step: Steps that were taken.
        looks: Looks at the held-out examples so far.
        losses: Losses of the steps since the last look.
        best: Weights that were best so far, and the steps behind them.
    """

    key: str
    step: int = 0
    looks: list[Look] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    best: tuple[int, Mapping[str, Tensor]] | None = None

    @property
    def waited(self) -> int:
        """Looks since the best one. The start itself is not compared: it may have been fitted to these very examples."""
        losses = [look.held_out for look in self.looks if look.step]
        return len(losses) - 1 - int(np.argmin(losses)) if losses else 0

    def write(self, path: str, state: Mapping[str, Tensor]) -> None:
        """Keeps itself and the workers' state in one file, whole or not at all."""
        tensors = dict(state)
        if self.best is not None:
            tensors |= {f"best:{name}": value for name, value in self.best[1].items()}
        about = {
            "key": self.key,
            "step": self.step,
            "looks": [[look.step, look.held_out, look.training] for look in self.looks],
            "losses": self.losses,
            "best": None if self.best is None else self.best[0],
        }
        atomic.write_bytes(path, serialize(tensors, {"distillation": json.dumps(about)}))

    @classmethod
    def read(cls, path: str, key: str) -> "tuple[Record, dict[str, Tensor]] | None":
        """What was kept under this key; None where there is nothing, or of another distillation."""
        if not storage.exists(path):
            return None
        try:
            file = SafetensorsFile.open(path)
            about: dict[str, Any] = json.loads(file.metadata["distillation"])
            if about["key"] != key:
                return None
            tensors = {name: file.read(name).clone() for name in file.tensors}
        except (MergequestError, KeyError, ValueError):
            return None
        best = {name.removeprefix("best:"): value for name, value in tensors.items() if name.startswith("best:")}
        record = cls(
            key,
            about["step"],
            [Look(*look) for look in about["looks"]],
            about["losses"],
            None if about["best"] is None else (about["best"], best),
        )
        return record, {name: value for name, value in tensors.items() if not name.startswith("best:")}


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
        return self._distiller.settings.batch, sum(len(places) for places in self._distiller.held_out)

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

"""Live models, one per task, that all run on the same merged weights."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from merging.checkpoints.pool import Pool
from merging.errors import PoolError, TaskError
from merging.evaluation.score_cache import KnownScores, ScoreCache
from merging.evaluation.shared_weights import SHOWN, SharedWeights, sharing_model
from merging.evaluation.spread_models import Spread
from merging.evaluation.steps import CACHED, EvaluationPlan, Measurement, Trace
from merging.evaluation.untouched import Contents, structure
from merging.mergers.dtypes import model_dtype, rounded_dtype
from merging.mergers.material import Material
from merging.mergers.resident import ResidentMerger
from merging.mergers.spread import SpreadMerger
from merging.recipe import Recipe
from merging.tasks.predictions import Floats, Predictions
from merging.tasks.task import Score, Split, Task


def best_device() -> torch.device:
    """The accelerator that this process may use, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("cpu")


def best_devices() -> list[torch.device]:
    """The accelerators that this process may use, where there are several that a model may be spread over."""
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]


class WeightSource(Protocol):
    """Where merged weights come from: this process, or shards that lie elsewhere."""

    def merge(self, recipe: Recipe) -> dict[str, float]:
        """Overwrites the weights that the source was made for, and gives the method's figures."""
        ...


MakeSource: TypeAlias = Callable[[Material, Mapping[str, Tensor]], WeightSource]
"""From a pool's material and weights to overwrite to a source."""


@dataclass
class _Merge:
    """A candidate's merge, made when a task is first measured.

    Args:
        merged: Makes it; gives the method's figures.
        report: These, once it is made.
        seconds: How long it took.
    """

    merged: Callable[[], Mapping[str, float]]
    report: Mapping[str, float] | None = None
    seconds: float | None = None

    def make(self) -> None:
        """Makes it, unless it is."""
        if self.report is None:
            start = time.perf_counter()
            self.report = self.merged()
            self.seconds = time.perf_counter() - start


class CandidateModels(ABC):
    """What holds one candidate after another, and measures it on all tasks.

    Args:
        tasks: The tasks to evaluate.
        precision: `float32`, or `bfloat16` for autocast in evaluation.
    """

    scores: ScoreCache | None = None
    """Where predictions are kept and looked for; None to measure everything."""

    def __init__(self, tasks: Sequence[Task], precision: str) -> None:
        self._tasks = tasks
        self._precision = self._usual = precision

    @abstractmethod
    def _merge(self, recipe: Recipe) -> Mapping[str, float]:
        """Makes what is measured the recipe's; gives the method's figures on the merge."""

    @abstractmethod
    def _lent(self, task: Task) -> AbstractContextManager[Any]:
        """What a task measures, for the time of an evaluation."""

    def measure(
        self,
        recipe: Recipe,
        split: Split,
        limit: int | None = None,
        plan: EvaluationPlan | None = None,
        progress: Callable[[float], None] = lambda share: None,
        precision: str | None = None,
        fresh: bool = False,
    ) -> Measurement:
        """Merges, then evaluates every task; of examples whose predictions are kept in `scores`, neither.

        Args:
            recipe: What to merge.
            split: Which examples.
            limit: At most this many examples per task, the same ones at every call.
            plan: Measures step by step and keeps a trace; None for every task at once, without one.
            progress: Told the share of the tasks, or of the plan's steps, that is done.
            precision: For this measurement; None for the usual one.
            fresh: Whether `scores` is left alone.

        Raises:
            MethodError: The recipe is wrong, or has no merge.
            TaskError: An evaluator failed or gave no finite number.
        """
        start = time.perf_counter()
        merge = _Merge(lambda: self._merge(recipe))
        self._precision = precision or self._usual
        cache = None if fresh else self.scores
        known = cache.of(recipe, split, self._precision) if cache is not None else KnownScores({})
        if not known.paths:
            merge.make()
        if plan is None and not known.paths:
            scores = {}
            for number, task in enumerate(self._tasks, 1):
                scores[task.name] = self._whole(task, split, limit)[0]
                progress(number / len(self._tasks))
            seconds = merge.seconds, time.perf_counter() - start - (merge.seconds or 0.0)
            return Measurement(scores, *seconds, report=merge.report or {})
        trace, pruned = self._in_steps(plan or EvaluationPlan(), split, limit, progress, merge, known)
        seconds = merge.seconds, time.perf_counter() - start - (merge.seconds or 0.0)
        report = known.report if merge.report is None else merge.report
        known.keep(report)
        return Measurement(
            trace.scores[-1],
            *seconds,
            report=report,
            proxies={f"{CACHED}{task}": float(count) for task, count in known.used.items()},
            trace=trace,
            pruned=pruned,
            problems=tuple(known.problems),
        )

    def _whole(self, task: Task, split: Split, limit: int | None) -> tuple[Score, Predictions | None]:
        with self._lent(task) as model:
            return task.measure(model, split, limit=limit, precision=self._precision)

    def _in_steps(
        self,
        plan: EvaluationPlan,
        split: Split,
        limit: int | None,
        progress: Callable[[float], None],
        merge: _Merge,
        known: KnownScores,
    ) -> tuple[Trace, bool]:
        """The trace of a measurement, and whether the plan's gate ended it early.

        A task that gives no predictions of chosen examples is measured whole, before the first step's end.
        """
        stepwise = {task.name: task for task in self._tasks if task.has_predictions}
        whole: dict[str, Score] = {}
        seen: dict[str, Predictions] = {}
        for task in self._tasks:
            if task.name not in stepwise:
                merge.make()
                whole[task.name], predictions = self._whole(task, split, limit)
                if predictions is not None:
                    seen[task.name] = predictions
                progress(len(whole) / len(self._tasks))
        sizes = {name: min(task.size(split), limit or task.size(split)) for name, task in stepwise.items()}
        steps = list(plan.steps(sizes))
        total, measured = sum(len(own) for step in steps for own in step.values()), 0
        trace = _trace([whole], seen)
        for number, step in enumerate(steps):
            for name, positions in step.items():
                part = known.take(name, positions)
                if part is None:
                    merge.make()
                    with self._lent(stepwise[name]) as model:
                        part = stepwise[name].predict(model, split, positions, precision=self._precision)
                    known.add(name, positions, part)
                seen[name] = Predictions.join([seen[name], part]) if name in seen else part
                measured += len(part)
                progress((len(whole) + len(stepwise) * measured / total) / len(self._tasks))
            scores = whole | {name: task.score(seen[name]) for name, task in stepwise.items() if name in seen}
            trace = _trace([*(trace.scores if number else []), scores], seen)
            if plan.gate is not None and number < len(steps) - 1 and plan.gate(trace):
                return trace, True
        influences = {task.name: task.influences(seen[task.name]) for task in self._tasks if task.name in seen}
        return replace(trace, influences=_arrays(influences)), False


class LiveModels(CandidateModels):
    """Merges a recipe into live models and measures them; nothing is written to disk.

    What the models hold are the weights that an export has: a weight that the base stores in 16 bits is rounded to these, also
    where the models compute in float32.

    Args:
        material: Pool and statistics.
        tasks: The tasks to evaluate; each brings its head.
        owners: Task → the member whose head it is evaluated with.
        device: Where models and prepared state lie.
        precision: `float32`, or `bfloat16` for autocast in evaluation.
        source: Where merged weights come from; by default they are merged here, and the pool lies on the device.
        dtype: Of the models; by default the checkpoints' own.
        devices: Several that each model is spread over, in place of `device`.
    """

    def __init__(
        self,
        material: Material,
        tasks: Sequence[Task],
        owners: Mapping[str, str],
        device: torch.device,
        precision: str = "float32",
        source: MakeSource = ResidentMerger,
        dtype: torch.dtype | None = None,
        devices: Sequence[torch.device] = (),
    ) -> None:
        super().__init__(tasks, precision)
        pool = material.pool
        self._dtype = dtype or model_dtype(pool)
        self._out = {
            name: torch.empty(info.shape, dtype=self._dtype, device=device) for name, info in pool.weights.items()
        }
        self._pool, self._owners, self._device = pool, owners, device
        self._spread = Spread(devices) if len(devices) > 1 else None
        self._models: dict[str, nn.Module] = {}
        self._shared: dict[str, SharedWeights] = {}
        self._structures: dict[str, Any] = {}
        for task in tasks:
            self._model(task)
        for shared in self._shared.values():
            shared.check(self._out)
        refuse_unmeasured(tasks, {name: shared.dropped for name, shared in self._shared.items()})
        self._rounded = roundings(self._out, pool)
        if self._spread is not None and source is ResidentMerger:
            self._source: WeightSource = SpreadMerger(material, self._spread.parts(self._out))
        else:
            self._source = source(material, self._out)

    def _merge(self, recipe: Recipe) -> Mapping[str, float]:
        """Makes all models the recipe's."""
        report = self._source.merge(recipe)
        for value, dtype in self._rounded:
            value.copy_(value.to(dtype))
        for shared in self._shared.values():
            shared.refresh()
        return report

    def _model(self, task: Task) -> nn.Module:
        """A task's model; built anew where it was given up."""
        if task.name not in self._models:
            member = self._pool.members[self._owners[task.name]]
            model, self._shared[task.name] = sharing_model(task, self._pool, member, self._out, self._dtype)
            if self._spread is not None:
                self._spread.place(model, self._shared[task.name], self._out)
            self._models[task.name] = model if self._spread is not None else model.to(self._device)
            self._structures[task.name] = structure(model)
        return self._models[task.name]

    @contextmanager
    def _lent(self, task: Task) -> Iterator[nn.Module]:
        """A task's model for the time of an evaluation; what comes back changed is not used again.

        Raises:
            TaskError: The task's function wrote into the weights, so that its score is not that of the merge.
        """
        model = self._model(task)
        before = Contents(model) if task.runs_foreign_code else None
        try:
            yield model
        finally:
            written = before.written() if before is not None else []
            if written or structure(model) != self._structures[task.name]:
                del self._models[task.name]
            if written:
                raise TaskError(
                    f"task '{task.name}': its function wrote into the model's weights ({', '.join(written[:SHOWN])}), so that "
                    "its score is not that of the merge: have it work on a copy (`copy.deepcopy(model)`)"
                )


def _trace(scores: Sequence[Mapping[str, Score]], predictions: Mapping[str, Predictions]) -> Trace:
    """The trace after these steps' scores."""

    def each(name: str) -> dict[str, npt.NDArray[np.float32]]:
        return _arrays({task: getattr(prediction, name) for task, prediction in predictions.items()})

    return Trace(scores, each("values"), each("surrogates"), each("losses"))


def roundings(out: Mapping[str, Tensor], pool: Pool) -> list[tuple[Tensor, torch.dtype]]:
    """Merged weights that are held wider than an export has them, and the dtype that they are rounded to."""
    return [
        (out[name], rounded_dtype(info))
        for name, info in pool.weights.items()
        if rounded_dtype(info).itemsize < out[name].element_size()
    ]


def refuse_unmeasured(tasks: Sequence[Task], dropped: Mapping[str, Collection[str]]) -> None:
    """A search must not pick by the scores of models that lack some of what is merged and exported.

    Args:
        tasks: The tasks.
        dropped: Task → the base's names of merged weights that its model has no place for, though they are of account.

    Raises:
        PoolError: No task's model has a place for some weight.
    """
    missing = sorted(set.intersection(*(set(names) for names in dropped.values()))) if dropped else []
    if missing:
        modules = dict.fromkeys(f"{name.split('.')[0]}.*" if "." in name else name for name in missing)
        raise PoolError(
            f"{len(missing)} merged weights are in no task's model ({', '.join(missing[:SHOWN])}"
            f"{', …' if len(missing) > SHOWN else ''}), so that no score would depend on them. Have a task "
            f"({', '.join(task.name for task in tasks)}) load the checkpoints by a class that has them (`model_class: "
            f"AutoModelForCausalLM` for a language model), or keep them out of the merge: `heads: [{', '.join(modules)}]`"
        )


def check_models(pool: Pool, tasks: Sequence[Task], owners: Mapping[str, str]) -> None:
    """Looks, by names and shapes alone, whether live models can hold what is merged.

    Raises:
        PoolError: No task's model has a place for some merged weight.
        TaskError: A checkpoint cannot be loaded as its task's class, or lacks some of its weights.
    """
    dropped = {}
    for task in tasks:
        if (blank := task.blank_model()) is None:
            return
        names = pool.members[owners[task.name]].names
        dropped[task.name] = {name for name in pool.weights if names[name] in blank[1].homeless}
    refuse_unmeasured(tasks, dropped)


def _arrays(arrays: Mapping[str, Floats | None]) -> dict[str, npt.NDArray[np.float32]]:
    return {task: array.astype(np.float32) for task, array in arrays.items() if array is not None}

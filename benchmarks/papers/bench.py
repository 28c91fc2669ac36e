"""A pool opened for measurements in this process; whatever is measured is kept by content, and measured once."""

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from benchmarks.papers.pools import PaperPool
from flows.directory.progress import Display
from merging.checkpoints.formats.safetensors_file import SafetensorsFile, read_arrays
from merging.checkpoints.pool import Pool
from merging.errors import TaskError
from merging.evaluation.ensemble import measure_ensemble
from merging.evaluation.live_models import LiveModels, best_device
from merging.io import atomic, hashing
from merging.mergers.material import Material, open_statistics
from merging.methods import METHODS
from merging.optimization.gradient_mismatch import Mismatch, gradient_mismatch, quadratic_mismatch
from merging.recipe import BASE, Recipe, base_recipe, member_recipe
from merging.statistics import STATISTICS, StatisticsFile, measure
from merging.statistics import save as save_statistic
from merging.statistics.compute import measure_shard
from merging.tasks import AnyTaskSettings, make_task
from merging.tasks.predictions import Predictions
from merging.tasks.task import Score, Split, Task
from search.subsets import dpp_kernel

Values = Mapping[str, npt.NDArray[np.float64]]


@dataclass(frozen=True)
class Measured:
    """What a model scored.

    Args:
        values: Task → one number an example [N], whose mean is the score.
        report: The method's figures on the merge.
        whole: Tasks whose metric is of all examples together, so that fewer of them have other values.
    """

    values: Values
    report: Mapping[str, float] = field(default_factory=dict)
    whole: Collection[str] = ()

    def on(self, tasks: Sequence[str]) -> "Measured":
        """The same on some tasks alone."""
        return replace(self, values={task: self.values[task] for task in tasks})

    @property
    def scores(self) -> dict[str, float]:
        """Task → score."""
        return {task: float(values.mean()) for task, values in self.values.items()}

    @property
    def mean(self) -> float:
        """Mean over tasks."""
        return float(np.mean(list(self.scores.values())))

    @property
    def error(self) -> float:
        """Standard error of `mean`."""
        return spread(self.values)


def spread(values: Values) -> float:
    """Standard error of the mean over tasks of the means over examples; tasks' examples are independent."""
    squares = [float(own.var()) / len(own) for own in values.values()]
    return float(np.sqrt(sum(squares))) / len(squares)


def paired(one: Measured, other: Measured) -> tuple[float, float]:
    """How much one scores above the other over the same examples, and the standard error of that."""
    gaps = {task: one.values[task] - other.values[task] for task in one.values}
    return float(np.mean([gap.mean() for gap in gaps.values()])), spread(gaps)


def averaged(many: Sequence[Measured], weights: Sequence[float] | None = None) -> Measured:
    """Several models' values, averaged example by example: what one of them scores, drawn at random, or by weights."""
    return Measured(
        {task: np.average([one.values[task] for one in many], axis=0, weights=weights) for task in many[0].values}
    )


def together(parts: Sequence[Measured]) -> Measured:
    """Several models on tasks of their own: each task's values averaged over the models that have it.

    So that an example counts once, however many models were measured on it: its values in two models are not independent.
    """
    tasks = dict.fromkeys(task for part in parts for task in part.values)
    return Measured({task: np.mean([p.values[task] for p in parts if task in p.values], axis=0) for task in tasks})


class Bench:
    """A pool, its statistics, and what models of it score.

    Args:
        pool: The pool.
        display: Shows what is measured.
        examples: Most examples of a task and split; None for all.
        statistic_examples: Training examples behind a statistic that is computed here.
        tasks: Task settings in place of the campaign's (corrupted images).
    """

    def __init__(
        self,
        pool: PaperPool,
        display: Display,
        examples: int | None = None,
        statistic_examples: int = 96,
        tasks: Mapping[str, AnyTaskSettings] | None = None,
    ) -> None:
        self.pool, self.display, self.examples = pool, display, examples
        self._statistic_examples = statistic_examples
        self._settings = dict(tasks or pool.campaign.tasks)
        self._needs: tuple[str, ...] = ()
        self._live: BenchModels | None = None

    def with_tasks(self, change: Callable[[AnyTaskSettings], AnyTaskSettings]) -> "Bench":
        """The same pool on other tasks."""
        tasks = {name: change(task) for name, task in self._settings.items()}
        return Bench(self.pool, self.display, self.examples, self._statistic_examples, tasks)

    @property
    def members(self) -> list[str]:
        """All members."""
        return list(self.pool.campaign.members)

    @property
    def tasks(self) -> dict[str, Task]:
        """The tasks that models are measured on where nothing else is said: all but those of `role: unseen`."""
        return {name: task for name, task in self.every_task.items() if name not in self.unseen}

    @property
    def unseen(self) -> list[str]:
        """Tasks that belong to no member."""
        return self.pool.campaign.unseen()

    @cached_property
    def every_task(self) -> dict[str, Task]:
        """Every task with the head of its owner."""
        campaign, owners = self.pool.campaign, self.owners
        return {
            name: make_task(name, settings, campaign.members[owners[name]].checkpoint, campaign.base)
            for name, settings in self._settings.items()
        }

    @property
    def owners(self) -> dict[str, str]:
        """Task → the member whose head it has."""
        return self.pool.campaign.owners()

    @cached_property
    def weights(self) -> Pool:
        """Base and members."""
        campaign = self.pool.campaign
        return Pool.open(campaign.base, {name: member.checkpoint for name, member in campaign.members.items()})

    @property
    def tasks_apart(self) -> bool:
        """Whether every member has a task that no other has."""
        return len({self.own(name) for name in self.members}) == len(self.members)

    @property
    def has_ensembles(self) -> bool:
        """Whether what several models say of an example has a mean; generated texts have none."""
        return all(task.has_ensembles for task in self.every_task.values())

    def own(self, member: str) -> str:
        """A member's task."""
        task = self.pool.campaign.task_of(member)
        assert task is not None
        return task

    def measure(
        self,
        recipe: Recipe,
        split: Split = "test",
        tasks: Sequence[str] | None = None,
        averaged: Sequence[str] = (),
    ) -> Measured:
        """What a recipe's merge scores on some tasks; on all by default.

        Args:
            recipe: The recipe.
            split: Which examples.
            tasks: Which tasks.
            averaged: Weights whose names begin so are the members' plain mean, whatever the recipe makes of them.
        """
        complete = self.material(recipe).check(recipe)

        def work(missing: Sequence[str]) -> Measured:
            self.display.say(f"  {self.pool.name}: {short(complete)} on {split} of {', '.join(missing)}")
            mean = self.default("average", complete.members)
            return self._models(complete).measure_on(missing, complete, split, self.examples, (mean, averaged))

        what = ["recipe", complete.as_dict(), self._statistics_key(complete), *([list(averaged)] if averaged else [])]
        return self.kept(what, split, work, self.tasks if tasks is None else tasks)

    def ensemble(
        self, members: Sequence[str] | None = None, split: Split = "test", tasks: Sequence[str] | None = None
    ) -> Measured:
        """The mean of members' probabilities."""
        chosen = sorted(members or self.members)

        def work(missing: Sequence[str]) -> Measured:
            self.display.say(f"  {self.pool.name}: ensemble of {', '.join(chosen)} on {split}")
            result = measure_ensemble(
                Material(self.weights),
                [self.every_task[name] for name in missing],
                self.owners,
                chosen,
                split,
                best_device(),
                limit=self.examples,
            )
            return _of(self.every_task, result)

        return self.kept(["ensemble", chosen], split, work, self.tasks if tasks is None else tasks)

    def all_data(self, split: Split = "test") -> Measured | None:
        """The model that was trained on all tasks; None where there is none."""
        if self.pool.together is None:
            return None
        together = self.pool.together()

        def work(missing: Sequence[str]) -> Measured:
            self.display.say(f"  {self.pool.name}: the model of all data on {split}")
            tasks = {name: make_task(name, self._settings[name], together[name]) for name in missing}
            result = {name: task.measure(task.load_model(), split, limit=self.examples) for name, task in tasks.items()}
            return _of(tasks, result)

        return self.kept(["all data", _content(together)], split, work, self.tasks)

    def member(self, name: str, split: Split = "test", tasks: Sequence[str] | None = None) -> Measured:
        """A member as it is, on some tasks; on all by default."""
        return self.measure(member_recipe(name), split, tasks)

    def base(self, split: Split = "test") -> Measured:
        """The base as it is."""
        return self.measure(base_recipe(), split)

    def own_members(self, split: Split = "test") -> Measured:
        """Every member on its own task: what a merge is to keep."""
        owned = {name: self.member(name, split, [self.own(name)]) for name in self.members}
        return Measured({self.own(name): result.values[self.own(name)] for name, result in owned.items()})

    def default(self, method: str, members: Sequence[str] | None = None, **parameters: Any) -> Recipe:
        """A method at its defaults but for these parameters."""
        recipe = METHODS[method].default_recipe(members or self.members, self.weights.model_type)
        return METHODS[method].complete(Recipe(method, recipe.scaling, {**recipe.parameters, **parameters}))

    def mismatch(self, recipe: Recipe, examples: int = 32) -> Mismatch:
        """The gradient mismatch of a recipe's merge on the members' training examples (GM, equation 8).

        With α = 1 for every member and H_0 = I whatever the recipe is, so that merges of all methods can be compared.
        """
        complete = self.material(recipe).check(recipe)

        def work() -> Mismatch:
            self.display.say(f"  {self.pool.name}: gradient mismatch of {short(complete)}")
            merged = self.merged(complete)
            return gradient_mismatch(self._material, self.own_tasks(), merged, self._plain(), examples=examples)

        return self._kept_mismatch(["mismatch", examples], complete, work)

    def quadratic(self, recipe: Recipe) -> Mismatch:
        """Its stand-in from Fisher information, without gradients."""
        self.need("fisher")
        complete = self.material(recipe).check(recipe)
        fishers = [_told_by(self._material.statistics["fisher"][name]) for name in self.members]
        return self._kept_mismatch(
            ["quadratic", fishers],
            complete,
            lambda: quadratic_mismatch(self._material, self.merged(complete).__getitem__, self._plain()),
        )

    def _plain(self) -> Recipe:
        recipe = self.default("task_arithmetic")
        return Recipe(recipe.method, dict.fromkeys(recipe.scaling, 1.0), recipe.parameters)

    def similarity(self, *, centered: bool = False) -> dpp_kernel.Matrix:
        """S over all tasks' validation examples (QD)."""
        return dpp_kernel.similarity_from_representations(self.representations(), centered)

    def representations(self, split: Split = "validation", examples: int = 64) -> dict[str, npt.NDArray[np.float32]]:
        """Member → what it makes of the same examples of all tasks [examples, D]."""
        rows: dict[str, list[npt.NDArray[np.float32]]] = {name: [] for name in self.members}
        examples = min(examples, self.examples or examples)
        kind = STATISTICS["representation"]
        for task in self.tasks.values():
            for name in self.members:
                key = hashing.fingerprint([task.data_fingerprint(split), self._print(name), split, examples])
                path = self.pool.place / "representations" / f"{name}.{task.name}.{key}.safetensors"
                if not path.exists():
                    self.display.say(f"  {self.pool.name}: what {name} makes of {task.name}")
                    statistic = kind(kind.settings_type(examples=examples))
                    model = self.own_tasks()[name].load_model()
                    part = measure_shard(task, statistic, split, 0, min(examples, task.size(split)), "cpu", model)
                    result = statistic.finalize(part)["representation"].numpy()
                    atomic.write_bytes(str(path), save({"rows": np.ascontiguousarray(result)}))
                rows[name].append(read_arrays(str(path))["rows"])
        return {name: np.concatenate(own) for name, own in rows.items()}

    def need(self, *kinds: str) -> None:
        """Has statistics of these kinds in all that is merged from now on."""
        if more := [kind for kind in kinds if kind not in self._needs]:
            self._needs = tuple(sorted({*self._needs, *more}))
            self._live = None
            self.__dict__.pop("_material", None)

    def material(self, recipe: Recipe) -> Material:
        """Pool and statistics, those that a recipe asks for among them."""
        if recipe.method in METHODS:
            method = METHODS[recipe.method]
            complete = method.complete(recipe, self.weights.model_type)
            needs = method.needs(complete.parameters)
            self.need(*needs.members, *(f"base:{kind}" for kind in needs.base))
        return self._material

    @cached_property
    def _material(self) -> Material:
        files: dict[str, tuple[str, ...]] = dict.fromkeys(self.members, ())
        examples = {name: task.size("train") for name, task in self.own_tasks().items()}
        # Merges of the whole pool that a campaign has left: RegMean propagated, distilled.
        whole = sorted((self.pool.place / "statistics").glob("pool.*.safetensors"))
        files["+".join(sorted(self.members))] = tuple(str(path) for path in whole)
        if self.pool.base_task:
            examples[BASE] = self.tasks[self.pool.base_task].size("train")
        for kind in self._needs:
            if kind.startswith("base:"):
                assert self.pool.base_task is not None
                task = make_task(BASE, self._settings[self.pool.base_task], self.pool.campaign.base)
                files[BASE] = (self._statistic(BASE, kind.partition(":")[2], task),)
            else:
                for name, task in self.own_tasks().items():
                    files[name] = (*files[name], self._statistic(name, kind, task))
        return Material(self.weights, open_statistics(self.weights, files), examples)

    def own_tasks(self, inputs: Split = "train") -> dict[str, Task]:
        """Member → the task of its own training examples, bound to itself; they may be another split's."""
        tasks = {}
        for name, member in self.pool.campaign.members.items():
            settings = member.calibration or self.pool.campaign.tasks[self.own(name)]
            data = {**settings.data, "train": settings.data[inputs]}
            tasks[name] = make_task(self.own(name), settings.model_copy(update={"data": data}), member.checkpoint)
        return tasks

    def _statistic(self, who: str, kind: str, task: Task) -> str:
        """A statistics file of the pool's place, computed unless it is there."""
        directory = self.pool.place / "statistics"
        for path in sorted(directory.glob(f"{who}.{kind}.*.safetensors")):
            if StatisticsFile.open(str(path)).checkpoint == self._print(who):
                return str(path)
        self.display.say(f"  {self.pool.name}: {kind} of {who}, {self._statistic_examples} examples")
        statistic = STATISTICS[kind](STATISTICS[kind].settings_type(examples=self._statistic_examples))
        data = task.data_fingerprint("train")
        path = directory / f"{who}.{kind}.{hashing.fingerprint([self._print(who), data])}.safetensors"
        save_statistic(str(path), statistic, measure(task, statistic), checkpoint=self._print(who), data=data)
        return str(path)

    def _statistics_key(self, recipe: Recipe) -> list[Any]:
        """What a merge depends on beside its recipe and the pool."""
        if recipe.method not in METHODS:
            return []
        method = METHODS[recipe.method]
        needs = method.needs(recipe.parameters)
        files = [self._material.statistics[kind][name] for kind in needs.members for name in recipe.members]
        files += [self._material.statistics[kind][BASE] for kind in needs.base]
        if needs.whole is not None:
            files.append(self._material.statistics[needs.whole]["+".join(recipe.members)])
        return [_told_by(file) for file in files]

    def _print(self, who: str) -> str:
        return self.weights.base.fingerprint if who == BASE else self.weights.members[who].checkpoint.fingerprint

    def _models(self, recipe: Recipe) -> "BenchModels":
        if self._live is None:
            self._live = BenchModels(
                self.material(recipe), list(self.every_task.values()), self.owners, best_device(), "float32"
            )
        return self._live

    def merged(self, recipe: Recipe) -> dict[str, Any]:
        """A recipe's merged weights."""
        import torch

        from merging.mergers.resident import ResidentMerger

        out = {name: torch.empty(info.shape) for name, info in self.weights.weights.items()}
        ResidentMerger(self.material(recipe), out).merge(recipe)
        return out

    def kept(
        self, what: Sequence[Any], split: Split, work: Callable[[Sequence[str]], Measured], tasks: Iterable[str]
    ) -> Measured:
        """What is kept of a model's values on single tasks; what is missing, or of too few examples, is measured.

        Examples come in one order, so that the values of fewer are the first of those of more, but where a metric is of all.
        """
        kept = {task: self._read(self._place([*what, split, self._data(task, split)]), task, split) for task in tasks}
        if missing := [task for task, result in kept.items() if result is None]:
            result = work(missing)
            for task in missing:
                values = np.ascontiguousarray(result.values[task])
                path = self._place([*what, split, self._data(task, split)])
                notes = {
                    "report": json.dumps(dict(result.report)),
                    **({"whole": "yes"} if task in result.whole else {}),
                }
                atomic.write_bytes(str(path), save({"values": values}, notes))
                kept[task] = Measured({task: values}, result.report)
        parts = [part for part in kept.values() if part is not None]
        return Measured({task: own for part in parts for task, own in part.values.items()}, parts[0].report)

    def _read(self, path: Path, task: str, split: Split) -> Measured | None:
        if not path.exists():
            return None
        values = read_arrays(str(path))["values"]
        size = self.every_task[task].size(split)
        wanted = min(size, self.examples or size)
        notes = SafetensorsFile.open(str(path)).metadata
        if len(values) < wanted or ("whole" in notes and len(values) > wanted):
            return None
        return Measured({task: values[:wanted]}, json.loads(notes["report"]))

    def _place(self, what: Sequence[Any], suffix: str = "safetensors") -> Path:
        key = hashing.fingerprint([*what, self.weights.fingerprints()])
        return self.pool.place / "measured" / f"{key}.{suffix}"

    def _data(self, task: str, split: Split) -> list[str]:
        return [task, self.every_task[task].data_fingerprint(split)]

    def _kept_mismatch(self, what: Sequence[Any], recipe: Recipe, work: Callable[[], Mismatch]) -> Mismatch:
        data = [[name, task.data_fingerprint("train")] for name, task in self.own_tasks().items()]
        path = self._place([*what, recipe.as_dict(), self._statistics_key(recipe), data], "json")
        if not path.exists():
            result = work()
            atomic.write_json(str(path), {"total": result.total, "members": dict(result.members)})
        known = json.loads(path.read_text())
        return Mismatch(known["total"], known["members"])


class BenchModels(LiveModels):
    """Live models that are measured on some tasks alone."""

    def measure_on(
        self,
        names: Sequence[str],
        recipe: Recipe,
        split: Split,
        limit: int | None,
        but: tuple[Recipe, Sequence[str]],
    ) -> Measured:
        """One merge, and its values on these tasks.

        Args:
            names: Of tasks.
            recipe: What to merge.
            split: Which examples.
            limit: At most this many of a task.
            but: Another recipe, and how names of weights begin that are its.
        """
        other, beginnings = but
        kept = {}
        if beginnings:
            self._merge(other)
            kept = {name: out.clone() for name, out in self._out.items() if name.startswith(tuple(beginnings))}
        report = self._merge(recipe)
        for name, value in kept.items():
            self._out[name].copy_(value)
        for shared in self._shared.values() if kept else ():
            shared.refresh()
        tasks = {task.name: task for task in self._tasks if task.name in names}
        result = {name: self._whole(task, split, limit) for name, task in tasks.items()}
        return replace(_of(tasks, result), report=report)


def _told_by(file: StatisticsFile) -> list[Any]:
    """What tells one statistics file from another."""
    return [file.kind, file.checkpoint, file.data, file.examples, dict(file.settings)]


def short(recipe: Recipe) -> str:
    """A recipe in few words."""
    values = sorted(set(recipe.scaling.values()))
    factors = f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} … {values[-1]:g}" if values else ""
    return f"{recipe.method.replace('_', ' ')} ({', '.join(recipe.members)}; {factors})"


def _of(tasks: Mapping[str, Task], result: Mapping[str, tuple[Score, Predictions | None]]) -> Measured:
    values = {name: influences(tasks[name], *own) for name, own in result.items()}
    return Measured(values, whole=[name for name, (score, _) in result.items() if not score.is_mean])


def influences(task: Task, score: Score, predictions: Predictions | None) -> npt.NDArray[np.float64]:
    """One number an example [N], whose mean is the score.

    Of a metric whose influences are not known (BLEU) what each contributes by the jackknife (Efron & Stein 1981), whose
    spread gives the score's standard error, and paired that of a difference.

    Raises:
        TaskError: Single examples have no predictions.
    """
    if predictions is None:
        raise TaskError(f"task '{task.name}' is measured whole: experiments compare models example by example")
    known = task.influences(predictions)
    if known is not None:
        return np.asarray(known, np.float64)
    places = np.arange(len(predictions))
    without = np.array([task.score(predictions.take(np.delete(places, place))).value for place in places])
    return np.asarray(score.value + (len(places) - 1) * (without.mean() - without))


def _content(places: Mapping[str, str]) -> list[str]:
    return sorted({hashing.file_fingerprint(str(Path(place) / "model.safetensors")) for place in places.values()})

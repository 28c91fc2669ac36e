"""Statistics over the cluster: shards of members × examples as calls, sums kept where they are measured."""

from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

from torch import nn

from merging.evaluation.live_models import best_device
from merging.statistics import STATISTICS, Partial, Statistic, measure_shard, save
from merging.tasks import make_task
from merging.tasks.task import Split, Task
from ray_tasks.connect import describe_cluster
from ray_tasks.jobs.parallel import Workers

Shard = tuple[int, int]
"""Examples from the first position to the one after the last."""


@dataclass(frozen=True)
class BoundTask:
    """A task as it travels: opened where it is used.

    Args:
        name: Its name.
        settings: Its settings.
        head: The checkpoint that it is bound to.
        base: The pool's base, for a head that is an adapter.
    """

    name: str
    settings: Any
    head: str
    base: str = ""

    def open(self) -> Task:
        """The task itself."""
        return make_task(self.name, self.settings, self.head, self.base)


@dataclass(frozen=True)
class Job:
    """One statistic of one member on one task's examples.

    Args:
        member: Whose.
        kind: Kind of statistic.
        settings: Its settings.
        data: The task whose examples are used.
        model: The member's own task, which loads its model.
        split: Which examples.
        examples: How many of them.
        path: The file to write.
        fingerprints: Of `checkpoint` and `data`, kept in the file.
    """

    member: str
    kind: str
    settings: Any
    data: BoundTask
    model: BoundTask
    split: Split
    examples: int
    path: str
    fingerprints: dict[str, str]

    def shards(self, size: int) -> list[Shard]:
        """Ranges of examples of at most `size`."""
        return [(start, min(start + size, self.examples)) for start in range(0, self.examples, size)]

    def __str__(self) -> str:
        return f"the {self.kind} of '{self.member}' on '{self.data.name}'"


@dataclass(frozen=True)
class _Sum:
    """A sum over shards of a job: where it lies, and what is lost with it."""

    value: Any
    shards: tuple[Shard, ...]


@dataclass(eq=False)
class _State:
    """A job under way.

    Args:
        job: What is computed.
        model: Which of all jobs' models it takes.
        waiting: Shards that nobody measures.
        sums: Sums that nobody adds to.
        out: Calls that are at work on it.
        written: Whether the file is there.
    """

    job: Job
    model: int
    waiting: deque[Shard]
    sums: list[_Sum] = field(default_factory=list)
    out: int = 0
    written: bool = False

    @property
    def calls(self) -> int:
        """How many could be made now: one for each shard, and one to write the file."""
        return len(self.waiting) or int(not self.out and not self.written)

    def take_back(self, given: Sequence[_Sum], lost: Exception) -> int:
        """Takes back the sums that a call was given; the one that is lost is measured anew.

        Returns:
            How many examples that are.
        """
        name = getattr(lost, "object_ref_hex", None)
        kept = [part for part in given if part.value.hex() != name]
        again = [shard for part in given if part not in kept for shard in part.shards]
        self.sums += kept
        self.waiting.extendleft(again)
        return sum(stop - start for start, stop in again)


def compute(
    jobs: Sequence[Job],
    *,
    shard: int,
    threads: int,
    gpus: float,
    retries: int,
    progress: Callable[[Job, int], None] = lambda job, examples: None,
) -> None:
    """Computes and writes every job's file.

    A process is given shards of the model that it holds as long as there are any, and adds each to a sum of the same
    job that lies idle, so that a job has at most as many sums as there are processes; the driver never holds one. A
    lost process costs its shard, a lost node the shards whose sums lay there.

    Args:
        jobs: What to compute.
        shard: Examples of one call.
        threads: CPUs and torch threads of a process.
        gpus: GPUs of a process.
        retries: How often a shard is measured again after it was lost.
        progress: Told of a job and how many more of its examples are done; fewer than none where some were lost.

    Raises:
        MergequestError: A shard failed: its own error.
        ClusterError: A shard was lost more than `retries` times.
    """
    models: list[BoundTask] = []
    states = []
    for job in jobs:
        if job.model not in models:
            models.append(job.model)
        states.append(_State(job, models.index(job.model), deque(job.shards(shard))))
    under_way: dict[Hashable, tuple[_State, Shard | None, list[_Sum]]] = {}
    # More than there is room for, so that a cluster that grows on demand hears of it.
    with Workers(
        lambda: 2 * describe_cluster().places(threads, gpus), cpus=threads, gpus=gpus, reserve=True, retries=retries
    ) as workers:
        while not all(state.written for state in states):
            for worker in workers.free(sum(state.calls for state in states)):
                if (state := _next(states, worker.holds, workers.holders)) is None:
                    break
                if state.waiting:
                    worker.holds, piece = state.model, state.waiting.popleft()
                    key, given = f"{state.job}, examples {piece}", state.sums[-1:]
                    workers.run(worker, key, _measure, state.job, *piece, *(part.value for part in given))
                else:
                    piece, key, given = None, f"{state.job}, its file", state.sums[:]
                    workers.run(worker, key, _write, state.job, *(part.value for part in given))
                del state.sums[len(state.sums) - len(given) :]
                state.out += 1
                under_way[key] = (state, piece, given)
            for reply in workers.wait():
                state, piece, given = under_way.pop(reply.key)
                state.out -= 1
                if reply.lost is not None:
                    state.waiting.extendleft([piece] if piece else [])
                    progress(state.job, -state.take_back(given, reply.lost))
                elif piece is None:
                    state.written = True
                else:
                    state.sums.append(_Sum(reply.value, (piece, *(shard for part in given for shard in part.shards))))
                    progress(state.job, piece[1] - piece[0])


def _next(states: Sequence[_State], held: int | None, holders: Counter[int | None]) -> _State | None:
    """What a process that holds this model does next: write a file, its own model's shards, or those that most wait for."""
    ready = [state for state in states if state.calls]
    waiting = Counter[int]()
    for state in ready:
        waiting[state.model] += len(state.waiting)

    def urgency(state: _State) -> tuple[bool, bool, float]:
        return not state.waiting, state.model == held, waiting[state.model] / (holders[state.model] + 1)

    return max(ready, key=urgency, default=None)


class _Opened:
    """What a process has opened last."""

    def __init__(self) -> None:
        self._task: tuple[BoundTask, Task] | None = None
        self._model: tuple[BoundTask, nn.Module] | None = None

    def task(self, bound: BoundTask) -> Task:
        """The task, opened unless it is open."""
        if self._task is None or self._task[0] != bound:
            self._task = bound, bound.open()
        return self._task[1]

    def model(self, bound: BoundTask, data: BoundTask) -> nn.Module:
        """The model that a task loads, loaded unless it is."""
        if self._model is None or self._model[0] != bound:
            self._model = None  # no two of them at once
            self._model = bound, (self.task(bound) if bound == data else bound.open()).load_model()
        return self._model[1]


_opened = _Opened()


def _measure(job: Job, start: int, stop: int, *others: Any) -> Partial:
    """A shard, added to the sum that is given, if any; the last of `others` would be told of progress."""
    task, model = _opened.task(job.data), _opened.model(job.model, job.data)
    partial = measure_shard(task, _statistic(job), job.split, start, stop, best_device(), model)
    return reduce(Partial.combine, others[:-1], partial)


def _write(job: Job, *others: Any) -> None:
    """Writes the sum of the sums that are given; the last of `others` would be told of progress."""
    save(job.path, _statistic(job), reduce(Partial.combine, others[:-1]), **job.fingerprints)


def _statistic(job: Job) -> Statistic:
    return STATISTICS[job.kind](job.settings)

"""Statistics over the cluster: shards of members × examples as tasks, partial sums combined where they lie."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch

from merging.evaluation.live_models import best_device
from merging.statistics import STATISTICS, Partial, Statistic, measure_shard, save
from merging.tasks import make_task
from merging.tasks.task import Split, Task
from ray_tasks.cluster_errors import surfaced


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

    def shards(self, size: int) -> list[tuple[int, int]]:
        """Ranges of examples of at most `size`."""
        return [(start, min(start + size, self.examples)) for start in range(0, self.examples, size)]


@dataclass
class _Progress:
    """A job under way: shards still out, and where the sum of those that came back lies."""

    job: Job
    out: int
    total: Any = None


def compute(
    jobs: Sequence[Job],
    *,
    shard: int,
    threads: int,
    gpus: float,
    retries: int,
    progress: Callable[[Job, int], None] = lambda job, examples: None,
) -> None:
    """Computes and writes every job's file; a lost worker costs its shard only.

    Partial sums are combined as they arrive, where they lie; the driver never holds one.

    Args:
        jobs: What to compute.
        shard: Examples of one task.
        threads: CPUs and torch threads of a task.
        gpus: GPUs of a task.
        retries: How often a task is tried again after its worker died.
        progress: Told of a job and how many more of its examples are done.

    Raises:
        MergequestError: A shard failed: its own error.
        ClusterError: A shard's workers died more than `retries` times.
    """
    cpu = {"num_cpus": threads, "max_retries": retries}
    measure = ray.remote(num_gpus=gpus, num_returns=2, **cpu)(_measure)
    combine, finish = ray.remote(**cpu)(_combine), ray.remote(**cpu)(_finish)
    shards: dict[Any, tuple[_Progress, int, Any]] = {}
    files: list[Any] = []
    for job in jobs:
        ranges = job.shards(shard)
        state = _Progress(job, len(ranges))
        for start, stop in ranges:
            done, partial = measure.remote(job, start, stop, threads)
            shards[done] = (state, stop - start, partial)
    try:
        with surfaced("computing statistics"):
            while shards:
                (done,), _ = ray.wait(list(shards), num_returns=1)
                state, examples, partial = shards.pop(done)
                ray.get(done)
                progress(state.job, examples)
                state.total = partial if state.total is None else combine.remote(state.total, partial)
                state.out -= 1
                if not state.out:
                    files.append(finish.remote(state.job, state.total))
            ray.get(files)
    finally:
        for done in shards:
            ray.cancel(done)


def _measure(job: Job, start: int, stop: int, threads: int) -> tuple[int, Partial]:
    torch.set_num_threads(threads)
    model = None if job.model == job.data else job.model.open().load_model()
    statistic = _statistic(job)
    return stop - start, measure_shard(job.data.open(), statistic, job.split, start, stop, best_device(), model)


def _combine(first: Partial, second: Partial) -> Partial:
    return Partial().combine(first).combine(second)


def _finish(job: Job, partial: Partial) -> str:
    save(job.path, _statistic(job), partial, **job.fingerprints)
    return job.path


def _statistic(job: Job) -> Statistic:
    return STATISTICS[job.kind](job.settings)

"""Statistics over the cluster: shards of members × examples as calls, sums kept and reduced where they are measured."""

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import ray
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from merging.evaluation.live_models import best_device
from merging.statistics import (
    BLOCK_BYTES,
    STATISTICS,
    Block,
    Measurement,
    Partial,
    Shard,
    Statistic,
    save,
    save_blocks,
)
from merging.tasks import make_task
from merging.tasks.task import Split, Task
from ray_tasks.connect import ANY_NODE, NodeKind, describe_cluster
from ray_tasks.jobs.parallel import Report, Worker, Workers


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


@dataclass(eq=False)
class _State:
    """A job under way.

    Args:
        job: What is computed.
        model: Which of all jobs' models it takes.
        waiting: Shards that nobody measures.
        holders: Processes that hold a part of the sum, each with the shards in it.
        out: Calls that are at work on it.
        written: Whether the file is there.
    """

    job: Job
    model: int
    waiting: deque[Shard]
    holders: dict[Worker, list[Shard]] = field(default_factory=dict)
    out: int = 0
    written: bool = False

    @property
    def calls(self) -> int:
        """How many could be made now: one for each shard, and one to write the file."""
        return len(self.waiting) or int(not self.out and not self.written)

    def take_back(self, worker: Worker) -> int:
        """Has a lost process's shards measured again; gives how many examples that are."""
        again = self.holders.pop(worker, [])
        self.waiting.extendleft(again)
        return sum(stop - start for start, stop in again)


def compute(
    jobs: Sequence[Job],
    *,
    shard: int,
    threads: int,
    gpus: float,
    retries: int,
    nodes: NodeKind = ANY_NODE,
    progress: Callable[[Job, int], None] = lambda job, examples: None,
) -> None:
    """Computes and writes every job's file.

    A process adds shard after shard of a job to one sum in its own memory, and takes another job when that one is written.
    Of several processes with a part of the same sum, one writes the file: it asks for the whole block by block
    (`BLOCK_BYTES`), and every block is summed by one of them in turn. No process holds more than its own sum and a block;
    between processes travel 4 (w − 1) (1 + 1/w) bytes a parameter, in all, for w of them; nothing for one. A process that is
    lost costs the shards in its sum.

    Which process measures which shard is left to chance, and so is the order of a float32 sum: an entry of a Fisher
    differs from run to run by at most (batches + processes) × 2⁻²⁴ of itself, a Gram's by as much of √(G_ii G_jj).

    Args:
        jobs: What to compute.
        shard: Examples of one call.
        threads: CPUs and torch threads of a process.
        gpus: GPUs of a process.
        retries: How often a shard is measured again after it was lost.
        nodes: Which nodes processes may be started on.
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
    under_way: dict[Hashable, tuple[_State, Worker, Shard | None]] = {}
    # More than there is room for, so that a cluster that grows on demand hears of it.
    with Workers(
        lambda: 2 * describe_cluster(kind=nodes).places(threads, gpus),
        cpus=threads,
        gpus=gpus,
        reserve=True,
        retries=retries,
        nodes=nodes,
    ) as workers:
        while not all(state.written for state in states):
            for worker in workers.free(sum(state.calls for state in states)):
                if (state := _next(states, worker, workers.holders)) is None:
                    continue
                if state.waiting:
                    worker.holds, piece = state.model, state.waiting.popleft()
                    state.holders.setdefault(worker, [])
                    key = f"{state.job}, examples {piece}"
                    workers.run(worker, key, _measure, state.job, *piece)
                else:
                    piece, key = None, f"{state.job}, its file"
                    workers.run(worker, key, _write, state.job, [holder.actor for holder in state.holders])
                state.out += 1
                under_way[key] = (state, worker, piece)
            for reply in workers.wait():
                state, worker, piece = under_way.pop(reply.key)
                state.out -= 1
                if reply.lost is None:
                    if piece is None:
                        state.written = True
                        state.holders.clear()
                    else:
                        state.holders[worker].append(piece)
                        progress(state.job, piece[1] - piece[0])
                else:
                    state.waiting.extendleft([piece] if piece else [])
                    # half of a shard may have been added; where a file was to be written, any of them may be gone
                    for lost in [worker] if piece else [each for each in state.holders if not workers.answers(each)]:
                        workers.discard(lost)
                        progress(state.job, -state.take_back(lost))


def _next(states: Sequence[_State], worker: Worker, holders: Counter[int | None]) -> _State | None:
    """What a process does next: of the job whose sum it holds what there is, else shards of its own model or of another.

    Args:
        states: All jobs.
        worker: The process.
        holders: How many processes hold which model.
    """
    if (own := next((state for state in states if worker in state.holders), None)) is not None:
        return own if own.calls else None
    waiting = Counter[int]()
    for state in states:
        waiting[state.model] += len(state.waiting)

    def urgency(state: _State) -> tuple[bool, float]:
        return state.model == worker.holds, waiting[state.model] / (holders[state.model] + 1)

    return max((state for state in states if state.waiting), key=urgency, default=None)


class _Opened:
    """What a process has opened last."""

    def __init__(self) -> None:
        self._task: tuple[BoundTask, Task] | None = None
        self._model: tuple[BoundTask, nn.Module] | None = None
        self._measured: tuple[Job, Measurement] | None = None

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

    def measured(self, job: Job) -> Measurement:
        """The part of a job's sum that lies here; begins one, and forgets another job's, where there is none."""
        if self._measured is None or self._measured[0] != job:
            if self._measured is not None:
                self._measured[1].close()
            self._measured = None  # no two of them at once
            task = self.task(job.data)
            model = self.model(job.model, job.data).to(best_device()).eval()
            self._measured = job, Measurement(_statistic(job), task, job.split, model)
        return self._measured[1]


_opened = _Opened()


def _measure(job: Job, start: int, stop: int, report: Report) -> None:
    """Adds a shard to the part of the sum that this process holds."""
    _opened.measured(job).add(start, stop)


def _write(job: Job, holders: Sequence[Any], report: Report) -> None:
    """Sums the parts that some processes hold, this one among them, and writes the whole."""

    def ask(place: int, function: Callable[..., Any], *arguments: Any) -> Any:
        return holders[place].run.options(num_returns=2).remote(function, job, *arguments)[1]

    def whole(number: int, block: Block) -> Any:
        """Where a block of the whole will lie."""
        place = number % len(holders)
        others = [ask(other, _part, block) for other in range(len(holders)) if other != place]
        return ask(place, _total, block, place, *others)

    def sums(blocks: Sequence[Block]) -> Iterator[dict[str, Tensor]]:
        requested: deque[Any] = deque()
        for number, block in enumerate(blocks):
            requested.append(whole(number, block))
            if len(requested) > len(holders):
                yield _tensors(ray.get(requested.popleft()))
        while requested:
            yield _tensors(ray.get(requested.popleft()))

    if len(holders) == 1:
        save(job.path, _statistic(job), _opened.measured(job).partial(), **job.fingerprints)
        return
    outline = reduce(Partial.combine, ray.get([ask(place, _outline) for place in range(len(holders))]))
    save_blocks(job.path, _statistic(job), outline, sums(outline.blocks(BLOCK_BYTES)), **job.fingerprints)


def _outline(job: Job, report: Report) -> Partial:
    """All of the part of a sum that lies here, but its numbers."""
    return _opened.measured(job).partial().outline()


def _part(job: Job, block: Block, report: Report) -> dict[str, NDArray[Any]]:
    """A block of what lies here; arrays, which travel as they lie in memory."""
    return {name: value.numpy() for name, value in _opened.measured(job).partial().block(block).items()}


def _total(job: Job, block: Block, place: int, *others: Any) -> dict[str, NDArray[Any]]:
    """A block of the whole: what lies here and that of the others, in one order for all blocks."""
    *parts, report = others
    parts.insert(place, _part(job, block, report))
    total: dict[str, NDArray[Any]] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total[name] + value if name in total else value
    return total


def _tensors(arrays: dict[str, NDArray[Any]]) -> dict[str, Tensor]:
    """The same as tensors."""
    return {name: torch.tensor(value) for name, value in arrays.items()}


def _statistic(job: Job) -> Statistic:
    return STATISTICS[job.kind](job.settings)

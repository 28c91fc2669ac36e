"""Calls over the cluster: processes take them one by one and keep what they opened; what is lost with one begins again."""

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
import torch

from ray_tasks.cluster_errors import surfaced
from ray_tasks.connect import ANY_NODE, NodeKind, describe_cluster, gpus_each

POLL_SECONDS = 1.0
Report = Callable[[float], None]
"""Told the share of a call's work that is done."""


@dataclass(frozen=True)
class Reply:
    """What came of a call.

    Args:
        key: The caller's name for it.
        value: Where its result lies.
        lost: What ended it: its process, or an object that it was given; None where it went well.
    """

    key: Any
    value: Any
    lost: Exception | None = None


@dataclass(eq=False)
class Worker:
    """A process of `Workers`, as its owner sees it.

    Args:
        actor: The process.
        number: Which of them it is; a process that replaces a lost one has its number.
        ready: Whether it has been started.
        holds: What the caller notes of what it keeps open.
        share: How much of its call is done, when it was last asked.
    """

    actor: Any
    number: int
    ready: bool = False
    holds: Any = None
    share: float = 0.0
    pending: Any = None


class Workers:
    """Processes that run calls one after another; a context manager, which ends them.

    Args:
        most: At most so many; asked again whenever more calls wait than there are processes.
        cpus: Torch threads of each.
        gpus: GPUs of each.
        reserve: Whether Ray is to count the CPUs, too: not where idle evaluators hold them.
        retries: How often a call, or the start of a process, is tried again after it was lost.
        nodes: Which nodes they may be started on.
    """

    def __init__(
        self,
        most: Callable[[], int],
        *,
        cpus: int,
        gpus: float,
        reserve: bool,
        retries: int,
        nodes: NodeKind = ANY_NODE,
    ) -> None:
        options = {"num_cpus": cpus if reserve else 0, "num_gpus": gpus, "scheduling_strategy": "SPREAD"}
        options |= nodes.options()
        self._kind: Any = ray.remote(max_concurrency=2, **options)(_Process)  # the second thread tells of progress
        self._most, self._cpus, self._retries = most, cpus, retries
        self._workers: dict[int, Worker] = {}
        self._out: dict[Any, tuple[Worker, Any, Any]] = {}
        self._lost: Counter[Any] = Counter()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        # first those that wait for room, or they would take that of the others
        for worker in sorted(self._workers.values(), key=lambda worker: worker.ready):
            ray.kill(worker.actor)

    @property
    def holders(self) -> Counter[Any]:
        """How many processes hold what."""
        return Counter(worker.holds for worker in self._workers.values())

    @property
    def shares(self) -> float:
        """The shares that are done of the calls that are under way, added up, as far as they were heard of."""
        busy = [worker for worker, key, _ in self._out.values() if key is not None]
        for worker in busy:
            if worker.pending is not None and ray.wait([worker.pending], timeout=0)[0]:
                try:
                    worker.share, worker.pending = ray.get(worker.pending), None
                except ray.exceptions.RayError:  # its call will tell
                    continue
            if worker.pending is None:
                worker.pending = worker.actor.share.remote()
        return sum(worker.share for worker in busy)

    def free(self, waiting: int) -> list[Worker]:
        """Those that have nothing to do; starts more where more calls wait than there are processes for them.

        Args:
            waiting: How many calls wait.
        """
        taken = {worker.number for worker, _, _ in self._out.values()}
        running = sum(key is not None for _, key, _ in self._out.values())
        if waiting > len(self._workers) - running:
            for number in range(min(max(1, self._most()), waiting + running)):
                if number not in self._workers:
                    worker = self._workers[number] = Worker(self._kind.remote(number, self._cpus), number)
                    self._out[worker.actor.share.remote()] = (worker, None, None)
                    taken.add(number)
        return [worker for worker in self._workers.values() if worker.number not in taken]

    def run(self, worker: Worker, key: Hashable, function: Callable[..., Any], *arguments: Any) -> None:
        """Has a free process run `function(*arguments, report)`; `report(share)` is told how much of it is done."""
        done, value = worker.actor.run.options(num_returns=2).remote(function, *arguments)
        worker.share, worker.pending = 0.0, None
        self._out[done] = (worker, key, value)

    def wait(self, timeout: float | None = None, *, fetch: bool = False) -> list[Reply]:
        """The call that ended next, or none once a process is ready or the time is over.

        Args:
            timeout: Seconds.
            fetch: Whether to give the result itself, not where it lies.

        Raises:
            MergequestError: A call failed: its own error.
            ClusterError: A call was lost more often than it may be, or a process cannot be started.
        """
        ready, _ = ray.wait(list(self._out), num_returns=1, timeout=timeout)
        if not ready:
            return []
        worker, key, value = self._out.pop(ready[0])
        lost = None
        try:
            ray.get(ready[0])
            value = ray.get(value) if fetch and key is not None else value
        except ray.exceptions.RayError as error:
            lost = _loss(error)
            with surfaced(f"running {'a worker' if key is None else key}"):
                if lost is None:
                    raise
                self._count(("start", worker.number) if key is None else key, lost)
            # where what it raised says that of another process, it is alive itself
            if isinstance(lost, ray.exceptions.RayActorError) and not isinstance(error, ray.exceptions.RayTaskError):
                self.discard(worker)
        else:
            worker.ready = True
            self._lost.pop(("start", worker.number), None)
        return [] if key is None else [Reply(key, value, lost)]

    def answers(self, worker: Worker) -> bool:
        """Whether a process is alive; waits where its node may be lost until that is known."""
        try:
            ray.get(worker.actor.share.remote())
        except ray.exceptions.RayError:
            return False
        return True

    def discard(self, worker: Worker) -> None:
        """Ends a process that has nothing to do, if it is not gone; another may take its place."""
        if self._workers.get(worker.number) is worker:
            ray.kill(worker.actor)
            del self._workers[worker.number]

    def _count(self, what: Hashable, error: Exception) -> None:
        """The one place where losses are counted; a node that is lost may take an object of each of its processes along."""
        self._lost[what] += 1
        several = len(self._workers) if isinstance(error, ray.exceptions.ObjectLostError) else 1
        if self._lost[what] > self._retries * max(1, several):
            raise error


class _Process:
    """The actor's inside."""

    def __init__(self, number: int, cpus: int) -> None:
        self._number, self._cpus, self._share = number, cpus, 0.0

    def share(self) -> float:
        return self._share

    def run(self, function: Callable[..., Any], *arguments: Any) -> tuple[None, Any]:
        torch.set_num_threads(self._cpus)  # of this thread
        if not ray.get_gpu_ids() and (devices := torch.cuda.device_count()) > 1:
            torch.cuda.set_device(self._number % devices)
        self._report(0.0)
        return None, function(*arguments, self._report)

    def _report(self, share: float) -> None:
        self._share = share


def _loss(error: Exception) -> Exception | None:
    """What was lost, where that is what an error says."""
    kinds = (
        ray.exceptions.RayActorError,
        ray.exceptions.NodeDiedError,
        ray.exceptions.ObjectLostError,
        ray.exceptions.OutOfMemoryError,
        ray.exceptions.WorkerCrashedError,
    )
    return next((one for one in (error, getattr(error, "cause", None)) if isinstance(one, kinds)), None)


def each(
    function: Callable[..., Any],
    calls: Mapping[str, tuple[Any, ...]],
    *,
    cpus: int = 1,
    gpus: float | None = None,
    retries: int = 3,
    progress: Callable[[float], None] = lambda share: None,
) -> Iterator[tuple[str, Any]]:
    """Runs `function(*arguments, report)` for every call, and yields name and result as they finish.

    Args:
        function: Takes the call's arguments and `report(share)`, to be told the share of its work that is done.
        calls: Name → arguments.
        cpus: CPUs and torch threads of a call.
        gpus: GPUs of a call; by default one where the cluster has any. With 0 a call asks for none, so that it need not wait
            for those that idle evaluators hold, and works beside one of them: calls take turns over a node's GPUs.
        retries: How often a call is made again after its worker died.
        progress: Told the share of all work that is done.

    Raises:
        MergequestError: A call failed: its own error.
        ClusterError: A call's workers died more than `retries` times.
    """
    queue, finished, share = deque(calls), 0, gpus_each(gpus)
    # Idle evaluators hold the CPUs that these calls use: what Ray does not count is bounded here.
    with Workers(
        lambda: describe_cluster().places(cpus, share), cpus=cpus, gpus=share, reserve=False, retries=retries
    ) as workers:
        while finished < len(calls):
            for worker, name in zip(workers.free(len(queue)), tuple(queue), strict=False):
                queue.popleft()
                workers.run(worker, name, function, *calls[name])
            replies = workers.wait(POLL_SECONDS, fetch=True)
            queue.extendleft(reply.key for reply in replies if reply.lost)
            results = [(reply.key, reply.value) for reply in replies if not reply.lost]
            finished += len(results)
            progress((finished + workers.shares) / len(calls))
            yield from results

"""Plain functions over the cluster, a call per task, each of which says how far it is."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_tasks.cluster_errors import surfaced
from ray_tasks.connect import gpus_each

POLL_SECONDS = 1.0


class _Watch:
    """The actor that calls tell how far they are."""

    def __init__(self) -> None:
        self._shares: dict[str, float] = {}

    def note(self, name: str, share: float) -> None:
        self._shares[name] = share

    def read(self) -> dict[str, float]:
        return self._shares


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
    # where the driver is: its node cannot be lost without it
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    steady = {"max_restarts": -1, "max_task_retries": -1}
    watch = ray.remote(num_cpus=0, scheduling_strategy=here, **steady)(_Watch).remote()
    # Idle evaluators hold the CPUs that these calls use: what Ray does not count is bounded here.
    options = {"num_cpus": 0, "num_gpus": gpus_each(gpus), "max_retries": retries, "scheduling_strategy": "SPREAD"}
    task = ray.remote(**options)(_call)
    numbers = {name: number for number, name in enumerate(calls)}
    room = max(1, int(ray.cluster_resources().get("CPU", 1)) // cpus)
    queue, waiting = deque(calls.items()), dict[Any, str]()
    try:
        while queue or waiting:
            while queue and len(waiting) < room:
                name, arguments = queue.popleft()
                waiting[task.remote(function, name, numbers[name], arguments, cpus, watch)] = name
            with surfaced(f"running {', '.join(waiting.values())}"):
                ready, _ = ray.wait(list(waiting), num_returns=1, timeout=POLL_SECONDS)
                shares: dict[str, float] = ray.get(watch.read.remote())
                results = [(waiting.pop(reference), ray.get(reference)) for reference in ready]
            progress(sum(shares.values()) / len(calls))
            yield from results
    finally:
        for reference in waiting:
            ray.cancel(reference)
        ray.kill(watch)


def _call(
    function: Callable[..., Any], name: str, number: int, arguments: tuple[Any, ...], cpus: int, watch: Any
) -> Any:
    torch.set_num_threads(cpus)
    if not ray.get_gpu_ids() and (devices := torch.cuda.device_count()) > 1:
        torch.cuda.set_device(number % devices)
    result = function(*arguments, lambda share: watch.note.remote(name, share))
    watch.note.remote(name, 1.0)
    return result

"""Work that several actors do step by step together, each waiting for the others: where one is lost, all begin again."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ray

from merging.errors import ClusterError
from ray_tasks.connect import ANY_NODE, NodeKind, describe_cluster

T = TypeVar("T")


def in_lockstep(
    kind: type[Any],
    arguments: Callable[[int], Sequence[tuple[Any, ...]]],
    work: Callable[[Sequence[Any]], T],
    *,
    what: str,
    threads: int,
    gpus: float,
    retries: int,
    nodes: NodeKind = ANY_NODE,
) -> T:
    """Starts actors, lets them work, and ends them.

    Args:
        kind: The actors' class.
        arguments: What each actor is made of, of how many the cluster has room for.
        work: What the actors do; begun again with new ones after one was lost.
        what: The work, for messages.
        threads: CPUs of each.
        gpus: GPUs of each.
        retries: How often the work is begun again.
        nodes: Which nodes they may be started on.

    Returns:
        What the work gave.

    Raises:
        ClusterError: Actors were lost more than `retries` times.
    """
    options: dict[str, Any] = {"num_cpus": threads, "num_gpus": gpus, **nodes.options()}
    made: Any = ray.remote(**options)(kind)
    for attempt in range(retries + 1):
        actors = [made.remote(*own) for own in arguments(describe_cluster(kind=nodes).places(threads, gpus))]
        try:
            return work(actors)
        except ClusterError:
            if attempt == retries:
                raise
        finally:
            for actor in actors:
                ray.kill(actor)
    raise ClusterError(f"{what} was never begun: `retries` is negative")

"""How a pool is cut into shards and where these go: planned, and refused where it does not fit, before anything is read."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any

import ray
import torch
from ray.util.placement_group import placement_group, remove_placement_group

from merging.errors import ClusterError
from merging.io.memory import available_memory
from merging.mergers.material import Material
from merging.mergers.shard_planning import ShardContent, place
from ray_tasks.connect import ANY_NODE, Cluster, NodeKind, alive_nodes
from ray_tasks.sharded.lost_nodes import addresses, watched
from ray_tasks.sharded.nixl_transfer import require_direct
from ray_tasks.sharded.shards import Shards

PROCESS_BYTES = 400_000_000
"""What a shard's process takes before it holds anything."""
SHARE = 0.8
"""How much of a node's memory a shard is planned to take at most."""
READ_RATE = 0.5e9
"""Assumed bytes a second that a node reads from storage."""
MERGE_RATE = 2e9
"""Assumed bytes of base and members a second that a thread merges."""
SEND_RATE = 1e9
"""Assumed bytes a second that reach an evaluator."""
WAIT_SECONDS = 60.0
"""How long memory may be taken by others before a plan is refused."""


@dataclass(frozen=True)
class Node:
    """A node of the cluster.

    Args:
        memory: Bytes that Ray lets tasks and actors ask for.
        store: Bytes of its object store.
    """

    memory: int
    store: int


@dataclass(frozen=True)
class ShardPlan:
    """What lies in each shard, and what that takes.

    Args:
        places: The shards.
        evaluators: How many evaluators are fed.
        threads: Torch threads of a shard.
        direct: Whether merged weights are written straight into evaluators' memory, and take no object store.
    """

    places: Sequence[ShardContent]
    evaluators: int
    threads: int
    direct: bool = False

    @property
    def bundles(self) -> list[int]:
        """Bytes of each shard's process."""
        return [PROCESS_BYTES + content.held_bytes for content in self.places]

    @property
    def merged_bytes(self) -> int:
        """Bytes of one candidate's weights."""
        return sum(content.merged_bytes for content in self.places)

    def check(self, nodes: Sequence[Node]) -> None:
        """Whether these nodes hold it.

        Raises:
            ClusterError: They do not; what is missing is in the message.
        """
        left = [node.memory for node in nodes]
        for size in sorted(self.bundles, reverse=True):
            roomiest = left.index(max(left))
            if size > left[roomiest]:
                raise ClusterError(
                    f"the pool's shards take {_gigabytes(sum(self.bundles))} ({len(self.places)} of up to "
                    f"{_gigabytes(max(self.bundles))}), and the nodes have {_gigabytes(sum(n.memory for n in nodes))} (at most "
                    f"{_gigabytes(max(n.memory for n in nodes))} each): add nodes, set more resources.shards if one node is "
                    "too small for one of them, or leave out members or methods"
                )
            left[roomiest] -= size
        # each evaluator's next weights, and those that are on their way to the first that is free
        travelling, store = self.merged_bytes * (self.evaluators + 1), sum(node.store for node in nodes)
        if travelling > store and not self.direct:
            raise ClusterError(
                f"merged weights on their way to {self.evaluators} evaluators take {_gigabytes(travelling)}, and the nodes' "
                f"object stores have {_gigabytes(store)}: fewer resources.evaluators, or nodes with a larger object store "
                "(`ray start --object-store-memory`)"
            )

    def describe(self, nodes: Sequence[str]) -> str:
        """What lies where and how long it takes, for users.

        Args:
            nodes: The node of each shard, by a name that no two have.
        """
        held: dict[str, list[int]] = {}
        for number, node in enumerate(nodes):
            held.setdefault(node, []).append(number)
        read = {node: sum(self.places[n].read_bytes for n in numbers) for node, numbers in held.items()}
        slowest = max(content.read_bytes for content in self.places)
        lines = [
            f"  sharded: {len(nodes)} shard{'s' * (len(nodes) > 1)} on {len(held)} node{'s' * (len(held) > 1)} read "
            f"{_gigabytes(sum(read.values()))} once, in about {max(read.values()) / READ_RATE:.0f} s"
        ]
        for node, numbers in held.items():
            weights = sum(len(self.places[n].names) for n in numbers)
            lines.append(
                f"    {node}: shard{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}, {weights} weights, "
                f"{_gigabytes(read[node])} to read, {_gigabytes(sum(self.bundles[n] for n in numbers))} of memory"
            )
        lines.append(
            f"    a candidate: about {slowest / MERGE_RATE / self.threads:.1f} s of merging and "
            f"{self.merged_bytes / SEND_RATE:.1f} s on its way ({_gigabytes(self.merged_bytes)}), beside the evaluation of "
            "the one before"
        )
        return "\n".join(lines)


def nodes(kind: NodeKind = ANY_NODE) -> list[Node]:
    """The nodes that are alive, of a kind."""
    return [
        Node(
            int(node["Resources"].get("memory", 0)),
            int(node["Resources"].get("object_store_memory", 0)),
        )
        for node in alive_nodes()
        if kind.fits(node)
    ]


def most_memory(cluster: Cluster, kind: NodeKind = ANY_NODE) -> int:
    """Bytes that a process may take on the node of a kind that has most: of a single machine, what it has left.

    Args:
        cluster: What was joined.
        kind: Which nodes count.
    """
    return max((node.memory for node in nodes(kind)), default=0) if cluster.nodes > 1 else available_memory()


def device_memory(gpus: float, kind: NodeKind = ANY_NODE) -> int:
    """Bytes that an evaluator may take of each of its GPUs; 0 where none is found.

    Args:
        gpus: How many these are, or what share of one.
        kind: Which nodes it may be started on.
    """
    options: dict[str, Any] = {"num_gpus": gpus, "num_cpus": 0, **kind.options()}
    whole = ray.get(ray.remote(**options)(_device_memory).remote())
    return int(whole * min(gpus, 1.0))


def plan(
    material: Material,
    methods: Sequence[str],
    cluster_nodes: Sequence[Node],
    *,
    evaluators: int,
    threads: int = 1,
    shards: int | None = None,
    shard_memory: int | None = None,
    direct: bool = False,
) -> ShardPlan:
    """Cuts a pool into as many shards as asked for, or as nodes and memory need.

    Args:
        material: Pool and statistics.
        methods: Names of the methods that will be asked for.
        cluster_nodes: The cluster's nodes.
        evaluators: How many evaluators are fed.
        threads: Torch threads of a shard.
        shards: How many; by default one per node, or as many as `shard_memory` asks for.
        shard_memory: Most bytes of a shard's process; by default four fifths of the smallest node's.
        direct: Whether merged weights are written straight into evaluators' memory.

    Raises:
        ClusterError: The cluster cannot hold it, or a shard exceeds `shard_memory`.
    """
    limit = shard_memory or int(SHARE * min(node.memory for node in cluster_nodes))
    count = shards or len(cluster_nodes)
    made = ShardPlan(place(material, methods, count), evaluators, threads, direct)
    while max(made.bundles) > limit and shards is None and len(made.places) == count:
        count = max(count + 1, ceil(sum(p.held_bytes for p in made.places) / max(limit - PROCESS_BYTES, 1)))
        count = min(count, len(material.pool.weights) + 1)
        made = ShardPlan(place(material, methods, count), evaluators, threads, direct)
    if max(made.bundles) > limit and shard_memory is not None:
        raise ClusterError(
            f"a shard takes {_gigabytes(max(made.bundles))}, {_gigabytes(PROCESS_BYTES)} of it for its process, and "
            f"resources.shard_memory allows {_gigabytes(limit)}: allow more, or set more resources.shards"
        )
    made.check(cluster_nodes)
    return made


@contextmanager
def sharded(
    material: Callable[[], Material], made: ShardPlan, retries: int, say: Callable[[str], None] = lambda text: None
) -> Iterator[Shards]:
    """A plan's shards for the block: memory is reserved, the plan is told, and the pool is read.

    Shards that are lost with their node are started where there is room, and read their part again.

    Args:
        material: Opens pool and statistics on any node.
        made: The plan.
        retries: How often a call is made again whose shard died over it.
        say: Told what lies where before anything is read, and what becomes of shards that are lost with their node.

    Raises:
        ClusterError: The memory is taken by others, or a node cannot write straight into another's.
        MergequestError: The pool cannot be read.
    """
    if made.direct:
        require_direct()
    group: Any = placement_group([{"memory": size} for size in made.bundles], strategy="SPREAD")
    if not group.wait(WAIT_SECONDS):
        remove_placement_group(group)
        raise ClusterError(
            f"{_gigabytes(sum(made.bundles))} for the pool's shards were not free within {WAIT_SECONDS:.0f} s: others use the "
            "cluster; wait for them, or leave out members"
        )
    shards = Shards(material, made.places, group, made.threads, retries, made.direct)
    try:
        names = addresses()
        say(made.describe([names[node] for node in shards.nodes()]))
        shards.read()
        with watched(shards.nodes, say):
            yield shards
    finally:
        shards.close()


def _device_memory() -> int:
    """Of one GPU, within a task that has some."""
    return int(torch.cuda.mem_get_info()[1]) if torch.cuda.is_available() else 0


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2g} GB" if size < 1e10 else f"{size / 1e9:.0f} GB"

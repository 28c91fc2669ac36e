"""Where candidates are merged: in every evaluator, or in shards of the pool that send evaluators what they merged."""

from collections.abc import Iterator
from contextlib import contextmanager

from flows.campaign.distil import Files
from flows.campaign.open_campaign import OpenCampaign
from flows.directory.progress import Display
from ray_tasks.connect import Cluster
from ray_tasks.evaluators.evaluator import Setup
from ray_tasks.sharded.placement import Node, device_memory, nodes, plan, sharded
from ray_tasks.sharded.shards import Shards


def is_sharded(opened: OpenCampaign, statistics: Files, cluster: Cluster, gpus: float) -> bool:
    """Whether the campaign's pool lies in shards.

    On one node without GPUs shards would hold what a single evaluator holds, so that nothing is gained.

    Args:
        opened: The campaign.
        statistics: Member → statistics files.
        cluster: What there is.
        gpus: GPUs of an evaluator; 0 for none.
    """
    regime = opened.campaign.resources.regime
    if regime != "auto":
        return regime == "sharded"
    if gpus:
        return 0 < device_memory(gpus) < opened.evaluator_memory(statistics, on_gpu=True).total
    return cluster.nodes > 1 and opened.evaluator_memory(statistics).total > max(node.memory for node in nodes())


@contextmanager
def shards_of(opened: OpenCampaign, setup: Setup, evaluators: int, display: Display) -> Iterator[Shards]:
    """The pool's shards for the block; what lies where is said before it is read.

    Args:
        opened: The campaign.
        setup: Says where pool and statistics are.
        evaluators: How many evaluators are fed.
        display: Shows the plan.

    Raises:
        ClusterError: The cluster cannot hold them.
    """
    resources = opened.campaign.resources
    alive: list[Node] = nodes()
    made = plan(
        setup.material(),
        list(opened.campaign.search.methods),
        alive,
        evaluators=evaluators,
        threads=resources.threads,
        shards=resources.shards,
        shard_memory=None if resources.shard_memory is None else int(resources.shard_memory * 1e9),
        direct=resources.transport == "nixl",
    )
    with sharded(setup.material, made, resources.retries, display.say) as shards:
        yield shards

"""Where candidates are merged: in every evaluator, or in shards of the pool that send evaluators what they merged."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil

from flows.campaign.distil import Files
from flows.campaign.open_campaign import OpenCampaign
from flows.directory.progress import Display
from merging.errors import ClusterError
from merging.evaluation.memory import EvaluatorMemory
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
        return 0 < device_memory(gpus) < opened.evaluator_memory(statistics, on_gpu=True).on_devices
    return cluster.nodes > 1 and opened.evaluator_memory(statistics).total > max(node.memory for node in nodes())


def require_fit(memory: EvaluatorMemory, gpus: float, device_bytes: int) -> None:
    """Looks whether an evaluator's GPUs hold what it is to hold.

    Args:
        memory: The evaluator's.
        gpus: Its GPUs.
        device_bytes: Memory of these together; 0 where it is not known.

    Raises:
        ClusterError: They do not.
    """
    if not 0 < device_bytes < memory.on_devices:
        return
    each = device_bytes / gpus
    raise ClusterError(
        f"an evaluator holds {memory.on_devices / 1e9:.3g} GB (models {memory.models / 2e9:.3g}, base and members "
        f"{memory.pool / 1e9:.3g}, engine {memory.engine / 1e9:.3g}), and its {gpus:g} GPUs have {device_bytes / 1e9:.3g} GB: "
        f"set resources.gpus: {ceil(memory.on_devices / each)}{' or resources.regime: sharded' * bool(memory.pool)}"
    )


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

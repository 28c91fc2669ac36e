"""Where candidates are merged: in every evaluator, or in shards of the pool that send evaluators what they merged."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil, prod

import torch

from flows.campaign.open_campaign import Files, OpenCampaign
from flows.directory.progress import Display
from merging.errors import ClusterError
from merging.evaluation.memory import EvaluatorMemory
from merging.mergers.dtypes import model_dtype
from ray_tasks.connect import Cluster, device_each
from ray_tasks.evaluators.evaluator import Setup
from ray_tasks.sharded.placement import Node, device_memory, most_memory, nodes, plan, sharded
from ray_tasks.sharded.shards import Shards

MOST_GPUS = 16
"""GPUs of a node, at most."""


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
        each = device_memory(gpus, opened.nodes)
        return 0 < each < opened.evaluator_memory(statistics, on_gpu=True).on_a_device(ceil(gpus))
    return cluster.nodes > 1 and opened.evaluator_memory(statistics).total > most_memory(cluster, opened.nodes)


def require_fit(memory: EvaluatorMemory, gpus: float, device_bytes: int) -> None:
    """Looks whether an evaluator's GPUs hold what it is to hold.

    Args:
        memory: The evaluator's.
        gpus: Its GPUs, or its share of one.
        device_bytes: What it may take of each; 0 where that is not known.

    Raises:
        ClusterError: They do not.
    """
    held = memory.on_a_device(ceil(gpus))
    if not 0 < device_bytes < held:
        return
    enough = next((count for count in range(1, MOST_GPUS + 1) if memory.on_a_device(count) <= device_bytes), None)
    setting = "resources.gpus and engine.tensor_parallel" if memory.engine else "resources.gpus"
    ways = [f"{setting}: {enough}"] * (enough is not None) + ["resources.regime: sharded"] * bool(memory.pool)
    raise ClusterError(
        f"an evaluator with resources.gpus: {gpus:g} would hold {held / 1e9:.3g} GB on one GPU (of models "
        f"{memory.models / 2e9:.3g}, base and members {memory.pool / 1e9:.3g}, engine {memory.engine / 1e9:.3g}), which has "
        f"{device_bytes / 1e9:.3g} GB for it: "
        f"{'set ' + ' or '.join(ways) if ways else 'take GPUs with more memory, or a smaller engine.cache'}"
    )


def require_room(memory: EvaluatorMemory, most_bytes: int) -> None:
    """Looks whether any node without GPUs holds what is surely no file's: models, candidates that wait, and an engine.

    Args:
        memory: The evaluator's.
        most_bytes: Memory of the node that has most; 0 where it is not known.

    Raises:
        ClusterError: None does.
    """
    held = memory.models // 2 + memory.waiting + memory.engine
    if not 0 < most_bytes < held:
        return
    raise ClusterError(
        f"an evaluator holds {held / 1e9:.3g} GB (models {memory.models / 2e9:.3g}, candidates that wait "
        f"{memory.waiting / 1e9:.3g}, engine {memory.engine / 1e9:.3g}), and no node has more than {most_bytes / 1e9:.3g} GB "
        f"for it: take nodes of {ceil(held / 1e9)} GB, {'a smaller engine.cache, ' * bool(memory.engine)}or a smaller model"
    )


def require_model(doing: str, parameters: int, copies: int, gpus: float, room: int) -> None:
    """Looks whether one process, which spreads no model over GPUs, has room for what it surely holds.

    Args:
        doing: What it does, and what to do without.
        parameters: Of the model.
        copies: How often it holds them in float32.
        gpus: Its GPU or share of one; 0 for none.
        room: Bytes that it may take of that, or of its node; 0 where that is not known.

    Raises:
        ClusterError: It has not.
    """
    held = 4 * copies * parameters
    if not 0 < room < held:
        return
    place = f"{gpus:g} GPU" if gpus else "the node with most"
    raise ClusterError(
        f"{doing} holds {held / 1e9:.3g} GB in one process ({copies} × {parameters / 1e9:.3g} billion weights in float32), and "
        f"{place} has {room / 1e9:.3g} GB for it{': resources.gpus: 0 computes in main memory' if gpus else ''}"
    )


def require_room_for_a_model(opened: OpenCampaign, cluster: Cluster, doing: str, copies: int = 1) -> None:
    """As `require_model`, on the campaign's nodes.

    Raises:
        ClusterError: No process has room.
    """
    gpus, kind = device_each(opened.campaign.resources.gpus), opened.nodes
    if gpus:
        room = device_memory(gpus, kind)
    elif copies == 1 and model_dtype(opened.pool) == torch.float32:
        room = 0  # mapped from its file
    else:
        waits = opened.campaign.resources.evaluators is not None and cluster.may_grow
        room = 0 if waits else most_memory(cluster, kind)
    require_model(doing, sum(prod(info.shape) for info in opened.pool.weights.values()), copies, gpus, room)


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

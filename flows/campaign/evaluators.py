"""As many evaluators as fit on the cluster, for as long as a block of a flow needs them."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from flows.campaign.cluster import require_evaluators
from flows.campaign.executor import RayExecutor
from flows.campaign.open_campaign import Files, OpenCampaign
from flows.campaign.regime import is_sharded, require_fit, require_room, shards_of
from flows.config.yaml_file import changed
from flows.directory.progress import Display
from merging.evaluation.memory import EvaluatorMemory
from merging.io import addresses
from ray_tasks.connect import Cluster, evaluators_for, room_for
from ray_tasks.evaluators.evaluator import Evaluator
from ray_tasks.evaluators.evaluator_pool import EvaluatorPool
from ray_tasks.evaluators.fed_evaluator import FedEvaluator
from ray_tasks.evaluators.lifecycle import EvaluatorGroup
from ray_tasks.evaluators.prometheus import EvaluatorMetrics
from ray_tasks.sharded.placement import device_memory, most_memory

RESTARTS = 3
"""How often an evaluator is replaced at least, though candidates are not tried again: others shall be measured."""


def under_way(pool: EvaluatorPool) -> list[dict[str, Any]]:
    """What evaluators are at work on, for those who look from elsewhere."""
    return [
        {
            "candidate": assignment.recipe.identity,
            "split": assignment.split,
            "method": assignment.recipe.method,
            "members": list(assignment.recipe.members),
            "seconds": round(seconds, 1),
            "share": share,
        }
        for assignment, seconds, share in pool.under_way()
    ]


def require_memory(opened: OpenCampaign, statistics: Files, cluster: Cluster) -> tuple[bool, EvaluatorMemory]:
    """Whether evaluators are fed by shards, and their estimated memory, which fits.

    Args:
        opened: The campaign.
        statistics: Member → statistics files; while there are none yet, what is known to be held without them.
        cluster: What there is.

    Raises:
        ClusterError: No GPUs of an evaluator, or no node without GPUs, hold it.
    """
    nodes, gpus = opened.nodes, opened.gpus
    is_fed = is_sharded(opened, statistics, cluster, gpus)
    estimate = opened.evaluator_memory(statistics, sharded=is_fed, on_gpu=gpus > 0)
    if gpus:
        require_fit(estimate, gpus, device_memory(gpus, nodes))
    elif opened.campaign.resources.evaluators is None or not cluster.may_grow:
        require_room(estimate, most_memory(cluster, nodes))
    return is_fed, estimate


@contextmanager
def evaluators(opened: OpenCampaign, statistics: Files, cluster: Cluster, display: Display) -> Iterator[RayExecutor]:
    """Evaluators for the block, as many as fit, with threads and memory said."""
    resources = opened.campaign.resources
    nodes, gpus = opened.nodes, opened.gpus
    cluster = cluster.now(nodes)  # statistics may have made it grow
    require_evaluators(opened.campaign, cluster)
    is_fed, estimate = require_memory(opened, statistics, cluster)
    memory = int((resources.memory or 0.0) * 1e9) or estimate.total
    needs = (resources.threads, gpus, memory)
    count = evaluators_for(cluster, resources.evaluators, *needs)
    grows = resources.evaluators is None and cluster.may_grow
    setup = replace(opened.setup(statistics), scores=opened.score_cache(statistics))
    with shards_of(opened, setup, count, display) if is_fed else nullcontext() as shards:
        group = EvaluatorGroup(
            replace(setup, parts=shards.parts) if shards else setup,
            count,
            resources.threads,
            gpus,
            max(resources.retries, RESTARTS),
            room=(lambda: room_for(cluster.now(nodes), *needs)) if grows else None,
            say=display.note,
            kind=FedEvaluator if is_fed else Evaluator,
            memory=int((resources.memory or 0.0) * 1e9),
            nodes=nodes,
        )
        pool = EvaluatorPool(
            group, opened.campaign.search.candidate_seconds, shards, EvaluatorMetrics(opened.campaign.name)
        )
        display.pulse.phase, display.pulse.evaluators = "Evaluators", lambda: (pool.there, pool.at_work)
        display.pulse.under_way = lambda: under_way(pool)
        try:
            count = pool.start()
            opened.pool.find_copies()  # selection and export read the pool once more, here
            display.say(
                f"  {count} evaluators of {resources.threads} thread{'s' * (resources.threads > 1)}"
                f"{f' and {gpus:g} GPU' if gpus else ''}, about {memory / 1e9:.1f} GB each"
            )
            if not is_fed and (unused := changed(resources, ("shards", "shard_memory", "transport"))):
                display.note(
                    f"no shards: each evaluator merges by itself, and resources.{', '.join(unused)} is not used"
                )
            place = opened.campaign.directory
            logs = addresses.join(place, "logs") if place else None
            yield RayExecutor(pool, opened.campaign.search.examples, logs, display.note)
        finally:
            display.pulse.under_way = list
            pool.close()

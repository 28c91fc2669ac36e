"""The cluster of a campaign: joined with what the file says of its workers' environment, and looked at for its nodes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from flows.config.campaign_file import Campaign
from merging.errors import SettingsError
from merging.io import addresses, storage
from merging.io.secrets import hide
from merging.tasks.environment import references, resolved
from merging.tasks.user_functions import search_last
from ray_tasks.connect import Cluster, NodeKind, WorkerEnvironment, connect, gpus_each, require_nodes

PROGRAM = ("flows", "mergequest", "merging", "ray_tasks", "search")
"""Packages that a directory sent to the nodes may not hold: its modules come first there."""


@contextmanager
def connected(campaign: Campaign) -> Iterator[Cluster]:
    """As `ray_tasks.connect.connect`, with the campaign's environment of workers.

    Raises:
        SettingsError: A variable that it refers to is not set, or its directory is unusable.
        ClusterError: The cluster cannot be reached or refuses the token.
    """
    with connect(worker_environment(campaign)) as cluster:
        yield cluster


@contextmanager
def cluster_looked_at(campaign: Campaign) -> Iterator[None]:
    """Looks for the block's beginning at the cluster that `RAY_ADDRESS` names, and stays joined.

    A pool of terabytes takes long to read, and what the cluster has not is known before. Of this machine it is known soon
    enough when its own Ray has started.

    Raises:
        SettingsError: As `connected`, or a budget of GPU hours has nothing to count.
        ClusterError: As `connected`, or no evaluator can start.
    """
    if not os.environ.get("RAY_ADDRESS"):
        yield
        return
    with connected(campaign) as cluster:
        require_evaluators(campaign, cluster)
        yield


def require_evaluators(campaign: Campaign, cluster: Cluster) -> None:
    """Looks, before statistics are computed for nothing, whether evaluators as the file has them can start.

    Raises:
        SettingsError: There is a budget of GPU hours, and evaluators have no GPU.
        ClusterError: The cluster has no nodes of the accelerator type, labels, number of GPUs or memory that are asked for, and
            is not told how many evaluators to wait for.
    """
    gpus, resources = evaluator_gpus(campaign), campaign.resources
    if campaign.search.gpu_hours is not None and not gpus:
        raise SettingsError(
            "search.gpu_hours: evaluators have no GPU here (resources.gpus); search.cpu_hours counts CPUs"
        )
    require_room_to_start(campaign, cluster, gpus, int((resources.memory or 0.0) * 1e9))


def require_room_to_start(campaign: Campaign, cluster: Cluster, gpus: float, memory: int = 0) -> None:
    """Looks whether there is a node for a process of so many GPUs and bytes, or one may come.

    Raises:
        ClusterError: There is none, and the campaign does not say how many evaluators wait for some.
    """
    if campaign.resources.evaluators is None or not cluster.may_grow:
        require_nodes(node_kind(campaign), gpus, memory)


def node_kind(campaign: Campaign) -> NodeKind:
    """Which nodes work on GPUs may be started on."""
    return NodeKind(campaign.resources.accelerator_type, campaign.resources.labels)


def evaluator_gpus(campaign: Campaign) -> float:
    """GPUs of an evaluator on the cluster that was joined: by default one for each of the engine's processes, if any."""
    given = campaign.resources.gpus
    there = gpus_each(given)
    return there if given is not None else there * campaign.engine.tensor_parallel


def worker_environment(campaign: Campaign, *, resolve: bool = True) -> WorkerEnvironment:
    """What workers have besides their nodes' own environment, with what `${NAME}` stands for here.

    Args:
        campaign: The campaign.
        resolve: Whether to look up what `${NAME}` stands for; a submitted campaign's driver does so on the cluster.

    Raises:
        SettingsError: A variable is not set, or the directory is missing or would hide the program's own packages.
    """
    settings = campaign.environment
    plain, secrets = {}, {}
    for name, value in settings.env.items():
        if not references(value) or not resolve:
            plain[name] = value
            continue
        try:
            secrets[name] = str(resolved(value))
        except KeyError as missing:
            raise SettingsError(
                f"environment.env.{name}: the environment variable {missing.args[0]} is not set here: set it where the "
                "campaign is started (of a submitted one, on the node that its driver runs on)"
            ) from None
    if resolve:
        arguments = [getattr(task, "arguments", None) for task in campaign.tasks.values()]
        # workers' logs and errors come to this process, which does not know these by their names
        hide(os.environ.get(name, "") for name in references([settings.env, arguments]))
    place = settings.working_dir
    if place is not None:
        if not addresses.is_local(place) or not storage.is_dir(place):
            raise SettingsError(f"environment.working_dir: there is no local directory {place}")
        hiding = [name for name in storage.list_dir(place) if name.removesuffix(".py") in PROGRAM]
        if hiding:
            raise SettingsError(
                f"environment.working_dir: {place} holds {hiding[0]}, which would come before the program's own package on "
                "every node: name a directory without it"
            )
        if resolve:
            search_last(place)  # custom evaluators are looked at here, and run there
    return WorkerEnvironment(plain, secrets, settings.pip, place)

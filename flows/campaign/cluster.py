"""The cluster of a campaign: joined with what the file says of its workers' environment."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from flows.config.campaign_file import Campaign
from merging.errors import SettingsError
from merging.io import addresses, storage
from merging.io.secrets import hide
from merging.tasks.environment import references, resolved
from ray_tasks.connect import Cluster, WorkerEnvironment, connect

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
    return WorkerEnvironment(plain, secrets, settings.pip, place)

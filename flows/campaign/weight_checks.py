"""The look at every weight before a campaign begins: here or over the cluster, and once as long as no file changes."""

import os
from collections.abc import Iterator

from flows.config.campaign_file import Campaign
from flows.directory.campaign_directory import FACTS
from flows.directory.progress import Display
from merging.checkpoints import validation
from merging.checkpoints.pool import Pool
from merging.checkpoints.validation import Finding
from merging.errors import StorageError
from merging.io import addresses, atomic, documents, fact_cache

LARGE = 4 << 30
"""Bytes to read from which a cluster that is there is asked to help."""


def examined(campaign: Campaign, pool: Pool, directory: str | None, display: Display) -> dict[str, float]:
    """Each member's distance from the base, every weight having been looked at: now, or before and unchanged since.

    Args:
        campaign: The campaign.
        pool: Its pool.
        directory: Where an earlier run may have kept what it found.
        display: Shows progress.

    Raises:
        PoolError: A weight or a member is unusable.
    """
    if directory is not None:
        fact_cache.learn(_read(directory))
    findings = validation.recall(pool)
    if missing := [member for member in pool.members if member not in findings]:
        if "RAY_ADDRESS" not in os.environ and campaign.resources.regime != "sharded":
            pool.copy_here()  # evaluators run on this machine, and would each read it all from afar once more
        size = sum(pool.members[member].checkpoint.nbytes for member in missing)
        with display.bar(f"members read ({size / 1e9:.2g} GB)", len(missing)) as bar:
            for part in _over_cluster(campaign, pool, missing) if _is_worth_it(pool, size) else _here(pool, missing):
                validation.keep(pool, part)
                findings |= part
                bar.advance(len(part))
    return validation.distances(pool, findings, campaign.max_distance)


def known(pool: Pool) -> dict[str, str]:
    """All that a run has learnt of the pool's files: its fingerprints, and what was found in them."""
    checkpoints = [pool.base, *(member.checkpoint for member in pool.members.values())]
    keys = [validation.key(pool, member) for member in pool.members]
    return fact_cache.known([*(checkpoint.identity for checkpoint in checkpoints), *keys])


def keep(pool: Pool, directory: str) -> None:
    """Keeps that for the next run, which may be on another machine."""
    atomic.write_json(addresses.join(directory, FACTS), fact_cache.as_json(known(pool)))


def _read(directory: str) -> dict[str, str]:
    try:
        return documents.read_as(addresses.join(directory, FACTS), fact_cache.from_json)
    except StorageError:  # whatever it was, it can be found again
        return {}


def _is_worth_it(pool: Pool, size: int) -> bool:
    """Whether it is much, comes over the network, and there are others to help."""
    return size >= LARGE and not addresses.is_local(pool.base.path) and "RAY_ADDRESS" in os.environ


def _here(pool: Pool, members: list[str]) -> Iterator[dict[str, Finding]]:
    return (validation.examine(pool, group) for group in validation.slices(members))


def _over_cluster(campaign: Campaign, pool: Pool, members: list[str]) -> Iterator[dict[str, Finding]]:
    from flows.campaign.cluster import connected  # a second, with Ray
    from ray_tasks.jobs.check_weights import PoolPaths, examine

    paths = {name: member.checkpoint for name, member in campaign.members.items()}
    with connected(campaign):
        yield from examine(pool, PoolPaths(campaign.base, paths, campaign.heads, campaign.vocabulary), members)

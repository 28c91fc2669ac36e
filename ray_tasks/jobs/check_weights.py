"""A pool too large to be read by one process: every byte of it once, some members and the base in each task."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merging.checkpoints import validation
from merging.checkpoints.pool import Pool
from merging.checkpoints.validation import Finding
from merging.checkpoints.vocabulary import Vocabulary
from merging.io import fact_cache
from ray_tasks.connect import alive_nodes
from ray_tasks.jobs.parallel import Report, each


@dataclass(frozen=True)
class PoolPaths:
    """Where a pool lies.

    Args:
        base: The base's directory.
        members: Member → directory.
        heads: Patterns of tensors that are kept per task.
        vocabulary: Whose tokens a merge has.
    """

    base: str
    members: Mapping[str, str]
    heads: Sequence[str]
    vocabulary: Vocabulary = "base"


def examine(
    pool: Pool, files: PoolPaths, members: Sequence[str], progress: Callable[[float], None] = lambda share: None
) -> Iterator[dict[str, Finding]]:
    """Reads members and base once over all nodes, and recognises them here.

    Args:
        pool: The pool, opened.
        files: Where it lies.
        members: Which of its members.
        progress: Told the share that is done.

    Yields:
        Member → finding, as tasks finish.

    Raises:
        MergequestError: A checkpoint cannot be read.
        ClusterError: A task's workers died more often than they may.
    """
    names = tuple(pool.weights)
    workers = sum(node["Resources"].get("CPU", 0) > 0 for node in alive_nodes())
    calls: dict[str, tuple[Any, ...]] = {
        group[0]: (files, group, names) for group in validation.slices(members, workers)
    }
    for _, (findings, facts) in each(_examine, calls, gpus=0.0, progress=progress):
        fact_cache.learn(facts)
        yield findings


def _examine(
    files: PoolPaths, members: Sequence[str], names: Sequence[str], report: Report
) -> tuple[dict[str, Finding], dict[str, str]]:
    """Findings, and facts for the driver; nothing but the pool's common weights is compared."""
    whole = Pool.open(files.base, files.members, files.heads, files.vocabulary)
    pool = Pool(whole.base, whole.members, {name: whole.weights[name] for name in names}, whole.notes)
    findings = validation.examine(pool, members)
    checkpoints = [pool.base, *(pool.members[member].checkpoint for member in members)]
    return findings, fact_cache.known(checkpoint.identity for checkpoint in checkpoints)

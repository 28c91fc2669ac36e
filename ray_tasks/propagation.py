"""The propagated solution of a pool as one task of the cluster."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from merging.live import best_device
from merging.pool import Pool
from merging.propagation import PropagationSettings, propagate
from merging.statistics import Partial, save_tensors
from ray_tasks.statistics import BoundTask


def solve(
    base: str,
    members: Mapping[str, str],
    heads: Sequence[str],
    tasks: Mapping[str, BoundTask],
    settings: PropagationSettings,
    key: Mapping[str, Any],
    path: str,
    checkpoint: str,
    data: str,
    report: Callable[[float], None],
) -> str:
    """Solves for all members and writes the statistics file.

    Args:
        base: The base's directory.
        members: Member → directory.
        heads: Patterns of tensors that are kept per task.
        tasks: Member → its own task.
        settings: Of the propagation.
        key: What the numbers depend on, kept in the file.
        path: The file to write.
        checkpoint: Fingerprint of base and members.
        data: Fingerprint of the examples.
        report: Told the share of the work that is done.

    Returns:
        The path.
    """
    pool = Pool.open(base, members, heads)
    opened = {member: task.open() for member, task in tasks.items()}
    found = propagate(
        pool, opened, list(members), settings, best_device(), lambda done, total: report(done / max(total, 1))
    )
    counts = {"examples": settings.examples * len(members), "tokens": max((fit.rows for fit in found.fits), default=0)}
    tensors = {name: value.cpu() for name, value in found.weights.items()}
    save_tensors(path, "propagated", key, tensors, Partial(counts=counts), checkpoint=checkpoint, data=data)
    return path

"""The propagated solution of a pool, its members spread over actors that go from layer to layer together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import ray
import torch

from merging.checkpoints.pool import Pool
from merging.checkpoints.vocabulary import Vocabulary
from merging.evaluation.live_models import best_device
from merging.propagation import Fit, PropagationSettings
from merging.propagation.equations import Equations, LeastSquaresUpdate
from merging.propagation.layerwise import checked, described, plain_mean, shared_inputs, solved
from merging.propagation.member import PassPlan
from merging.propagation.member_group import MemberGroup
from merging.statistics import Partial, save_tensors
from ray_tasks.cluster_errors import surfaced
from ray_tasks.connect import ANY_NODE, NodeKind
from ray_tasks.jobs.lockstep import in_lockstep
from ray_tasks.jobs.statistics import BoundTask


@dataclass(frozen=True)
class PropagationJob:
    """The solution of some members.

    Args:
        base: The base's directory.
        members: Member → directory.
        heads: Patterns of tensors that are kept per task.
        tasks: Member → its own task.
        settings: Of the propagation.
        key: What the numbers depend on, kept in the file.
        path: The statistics file to write.
        checkpoint: Fingerprint of base and members.
        data: Fingerprint of the examples.
        vocabulary: Whose tokens a merge has.
    """

    base: str
    members: Mapping[str, str]
    heads: Sequence[str]
    tasks: Mapping[str, BoundTask]
    settings: PropagationSettings
    key: Mapping[str, Any]
    path: str
    checkpoint: str
    data: str
    vocabulary: Vocabulary = "base"


def solve(
    job: PropagationJob,
    *,
    processes: int | None = None,
    threads: int = 1,
    gpus: float = 0.0,
    retries: int = 3,
    nodes: NodeKind = ANY_NODE,
    progress: Callable[[float], None] = lambda share: None,
) -> tuple[Fit, ...]:
    """Solves layer after layer and writes the statistics file.

    Each actor has a copy of the merged weights, runs its members beside it, and sums their equations; the first one
    adds up all sums and solves; all overwrite the layer with the solution. Layers wait for one another, so that an
    actor that is lost costs everything: the work is begun again.

    Args:
        job: What to solve.
        processes: Actors, at most one per member; by default as many as the cluster has room for. The solution does not
            depend on their number but for rounding.
        threads: CPUs and torch threads of each.
        gpus: GPUs of each.
        retries: How often the work is begun again after an actor was lost.
        nodes: Which nodes they may be started on.
        progress: Told the share of the layers that is done.

    Returns:
        How well each group of layers could be fitted.

    Raises:
        MergequestError: A task, a member or an activation is unusable.
        ClusterError: Actors were lost more than `retries` times.
    """
    return in_lockstep(
        _MemberGroupActor,
        lambda room: [(job, members, threads) for members in _parted(sorted(job.members), processes or room)],
        lambda actors: _solve(actors, progress),
        what="the propagated solution",
        threads=threads,
        gpus=gpus,
        retries=retries,
        nodes=nodes,
    )


def _solve(actors: Sequence[Any], progress: Callable[[float], None]) -> tuple[Fit, ...]:
    with surfaced("computing the propagated solution"):
        plans = [plan for part in ray.get([actor.plans.remote() for actor in actors]) for plan in part]
        groups = shared_inputs(plans)
        ray.get([actor.begin.remote(groups, plans) for actor in actors])
        fits: list[Fit] = []
        for group in groups:
            sums = [actor.equations.remote(group) for actor in actors]
            solution, fit = actors[0].solve.options(num_returns=2).remote(group, *sums)
            applied = [actor.apply.remote(group, solution) for actor in actors]
            fits.append(ray.get([fit, *applied])[0])
            progress(len(fits) / len(groups))
        ray.get(actors[0].save.remote(fits))
        return tuple(fits)


def _parted(members: Sequence[str], parts: int) -> list[list[str]]:
    """Neighbours together, in parts of nearly equal size; none is empty."""
    count = max(1, min(parts, len(members)))
    bounds = [len(members) * number // count for number in range(count + 1)]
    return [list(members[start:stop]) for start, stop in pairwise(bounds)]


class _MemberGroupActor:
    """A group of members in a process of its own; what leaves it lies on the CPU."""

    def __init__(self, job: PropagationJob, members: list[str], threads: int) -> None:
        torch.set_num_threads(threads)
        self._job, self._members = job, members
        self._all: list[PassPlan] = []

    def plans(self) -> list[PassPlan]:
        """Opens pool and tasks; what is known of the members' passes."""
        job = self._job
        pool = Pool.open(job.base, job.members, job.heads, job.vocabulary)
        everyone = checked(pool, job.tasks, list(job.members), job.settings)
        tasks = {member: job.tasks[member].open() for member in self._members}
        self._group = MemberGroup(pool, tasks, self._members, plain_mean(pool, everyone, best_device()), job.settings)
        return self._group.plans

    def begin(self, groups: list[tuple[str, ...]], plans: list[PassPlan]) -> None:
        """Starts the passes, knowing those of all members."""
        self._all = plans
        self._group.begin(groups)

    def equations(self, group: tuple[str, ...]) -> Equations:
        """The sum over the group's members."""
        return self._group.equations(group).to("cpu")

    def solve(self, group: tuple[str, ...], *sums: Equations) -> tuple[LeastSquaresUpdate, Fit]:
        """The solution for all members, and what to tell of it."""
        total = Equations(best_device())
        for part in sums:
            total.add(part)
        solution = solved(group, self._all, total, self._job.settings).to("cpu")
        return solution, described(group, self._all, total.rows, solution, self._job.settings)

    def apply(self, group: tuple[str, ...], solution: LeastSquaresUpdate) -> None:
        """Overwrites the group's weights."""
        self._group.apply(group, solution)

    def save(self, fits: list[Fit]) -> None:
        """Writes the merged weights."""
        job = self._job
        counts = {
            "examples": job.settings.examples * len(job.members),
            "tokens": max((fit.rows for fit in fits), default=0),
        }
        tensors = {name: value.cpu() for name, value in self._group.out.items()}
        save_tensors(
            job.path, "propagated", job.key, tensors, Partial(counts=counts), checkpoint=job.checkpoint, data=job.data
        )

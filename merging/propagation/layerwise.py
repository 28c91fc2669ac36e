"""RegMean propagated: every layer is fitted to what the members put out, given what the merged model feeds it."""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merging.checkpoints.pool import Pool
from merging.errors import MethodError
from merging.propagation.equations import Equations, LeastSquaresUpdate
from merging.propagation.member import PassPlan
from merging.propagation.member_group import MemberGroup
from merging.propagation.settings import PropagationSettings
from merging.registry import did_you_mean
from merging.tasks.task import Task


@dataclass(frozen=True)
class Fit:
    """How well layers that share an input could be fitted.

    Args:
        weights: The base's names of their weights.
        rows: Tokens behind the fit, over all members.
        before: Share of the wanted output's squares that the mean weights miss, mean over members.
        after: The same of the fitted weights.
        residual: Whether some of them repair the drift of the residual stream that they write into.
        ridge: Share of the diagonal that was added because the sums were singular.
    """

    weights: tuple[str, ...]
    rows: int
    before: float
    after: float
    residual: bool
    ridge: float


@dataclass(frozen=True)
class Propagation:
    """What came of a propagation.

    Args:
        weights: Every merged weight by the base's name, float32, on the device.
        fits: The layers that were solved, in the order in which they run; all other weights are the plain mean.
    """

    weights: Mapping[str, Tensor]
    fits: tuple[Fit, ...]


def propagate(
    pool: Pool,
    tasks: Mapping[str, Task],
    members: Sequence[str],
    settings: PropagationSettings | None = None,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Propagation:
    """Merges layer after layer in the order in which they run, without labels.

    Solves min Σ_t α_t ‖X̂_t Wᵀ + b − Y_t‖² / tokens_t + λ ‖W − W̄‖² for every group of layers that read one tensor, X̂_t
    their input in the model merged so far on member t's examples, Y_t the member's own output; where that is added
    to a residual stream, Y_t also holds what the stream has lost so far, R_t − R̂_t. W̄ is the plain mean, α_t are
    `settings.factors`. Only tokens that the task's logits depend on take part. The result does not depend on the order
    of members. Kin to RegMean (Jin et al. 2023) and RegMean++, which `settings.update` names.

    In memory are two models of each member, the merged weights, and what is alive at one layer over all examples.

    Args:
        pool: Base and members.
        tasks: Member → its task, bound to its own checkpoint; gives examples, logits and model.
        members: Whom to merge.
        settings: Examples, ridge, kind of update, factors.
        device: Where models run and sums are taken.
        progress: Told how many of how many groups of layers are done.

    Raises:
        MethodError: A member is unknown, has no task or no examples; members run their layers in different orders,
            or depending on the example; an activation is not finite.
    """
    settings = settings or PropagationSettings()
    chosen = checked(pool, tasks, members, settings)
    everyone = MemberGroup(pool, tasks, chosen, plain_mean(pool, chosen, device), settings)
    groups = shared_inputs(everyone.plans)
    fits = []
    try:
        everyone.begin(groups)
        for done, group in enumerate(groups):
            progress(done, len(groups))
            total = everyone.equations(group)
            solution = solved(group, everyone.plans, total, settings)
            everyone.apply(group, solution)
            fits.append(described(group, everyone.plans, total.rows, solution, settings))
        progress(len(groups), len(groups))
    finally:
        everyone.end()
    return Propagation(everyone.out, tuple(fits))


def checked(pool: Pool, tasks: Container[str], members: Sequence[str], settings: PropagationSettings) -> list[str]:
    """The members in an order that does not depend on the caller's.

    Raises:
        MethodError: A member is unknown, has no task, or all factors are 0.
    """
    if not members:
        raise MethodError("RegMean propagated needs at least one member")
    for member in members:
        if member not in pool.members:
            raise MethodError(f"'{member}' is no member of the pool. {did_you_mean(member, list(pool.members))}")
        if member not in tasks:
            raise MethodError(
                f"'{member}' has no task of its own, and RegMean propagated runs every member on its own "
                "unlabelled examples: give it a task, or leave it out"
            )
    for member in settings.factors:
        if member not in pool.members:
            raise MethodError(f"factors: '{member}' is no member. {did_you_mean(member, list(pool.members))}")
    if not any(settings.factors.get(member, 1.0) for member in members):
        raise MethodError("factors: all are 0, so that nothing is left to fit: give some member a positive one")
    return sorted(set(members))


def plain_mean(pool: Pool, members: Sequence[str], device: str | torch.device) -> dict[str, Tensor]:
    """The members' plain mean of every merged weight, summed in float64; float32, on the device."""
    merged = {}
    pool.prefetch(pool.weights, members)
    for name in pool.weights:
        values = (pool.member_weight(member, name).to(torch.float64) for member in members)
        mean = sum(values, torch.zeros((), dtype=torch.float64)) / len(members)
        merged[name] = mean.to(torch.float32).to(device)
    return merged


def shared_inputs(plans: Sequence[PassPlan]) -> list[tuple[str, ...]]:
    """The weights of layers that every member runs once, by the input that they share, in the order of running.

    Layers whose rows differ (a query of which only CLS counts, keys of which all tokens do) are solved apart.

    Raises:
        MethodError: Members run their layers in different orders.
    """
    first = plans[0]
    common = [name for name in first.calls if all(name in plan.calls for plan in plans)]
    groups: dict[object, list[str]] = {}
    for name in common:
        calls = [plan.calls[name] for plan in plans]
        key = tuple((call.source, call.rows) for call in calls), first.layers[name].bias is None
        groups.setdefault(key, []).append(name)
    for plan in plans[1:]:
        if [name for name in plan.calls if name in common] != common:
            raise MethodError(
                f"{plan.member} runs its layers in another order than {first.member}, so that they "
                "cannot be merged one after another: use regmean"
            )
    return [tuple(group) for group in groups.values()]


def solved(
    group: Sequence[str], plans: Sequence[PassPlan], total: Equations, settings: PropagationSettings
) -> LeastSquaresUpdate:
    """Solves a group of layers.

    Raises:
        MethodError: The sums are not positive semi-definite.
    """
    return total.solve(settings.ridge, plans[0].layers[group[0]].bias is not None, group[0])


def described(
    group: Sequence[str],
    plans: Sequence[PassPlan],
    rows: int,
    solution: LeastSquaresUpdate,
    settings: PropagationSettings,
) -> Fit:
    """What to tell of a group's solution."""
    repairing = settings.update == "propagated" and any(plan.calls[name].residual for plan in plans for name in group)
    return Fit(tuple(group), rows, solution.before, solution.after, repairing, solution.added)

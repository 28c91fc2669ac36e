"""RegMean propagated: every layer is fitted to what the members put out, given what the merged model feeds it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merging.errors import MethodError
from merging.pool import Pool
from merging.propagation.equations import Equations
from merging.propagation.member import MemberPasses
from merging.propagation.settings import PropagationSettings
from merging.registry import did_you_mean
from merging.tasks.base import Task


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

    Solves min Σ_t ‖X̂_t Wᵀ + b − Y_t‖² / tokens_t + λ ‖W − W̄‖² for every group of layers that read one tensor, X̂_t
    their input in the model merged so far on member t's examples, Y_t the member's own output; where that is added
    to a residual stream, Y_t also holds what the stream has lost so far, R_t − R̂_t. W̄ is the plain mean. Only tokens
    that the task's logits depend on take part. The result does not depend on the order of members. Kin to RegMean
    (Jin et al. 2023) and RegMean++, which `settings.update` names.

    In memory are two models of each member, the merged weights, and what is alive at one layer over all examples.

    Args:
        pool: Base and members.
        tasks: Member → its task, bound to its own checkpoint; gives examples, logits and model.
        members: Whom to merge.
        settings: Examples, ridge and kind of update.
        device: Where models run and sums are taken.
        progress: Told how many of how many groups of layers are done.

    Raises:
        MethodError: A member is unknown, has no task or no examples; members run their layers in different orders,
            or depending on the example; an activation is not finite.
    """
    settings = settings or PropagationSettings()
    chosen = _checked(pool, tasks, members)
    out = {name: _mean(pool, name, chosen).to(device) for name in pool.weights}
    passes = [MemberPasses(pool, member, tasks[member], out, settings) for member in chosen]
    groups = _groups(passes)
    fits = []
    try:
        for member in passes:
            member.begin(groups)
        for done, group in enumerate(groups):
            progress(done, len(groups))
            fits.append(_fit(group, passes, out, settings))
        progress(len(groups), len(groups))
    finally:
        for member in passes:
            member.end()
    return Propagation(out, tuple(fits))


def _checked(pool: Pool, tasks: Mapping[str, Task], members: Sequence[str]) -> list[str]:
    """The members in an order that does not depend on the caller's."""
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
    return sorted(set(members))


def _mean(pool: Pool, name: str, members: Sequence[str]) -> Tensor:
    """The members' plain mean, summed in float64; float32."""
    values = (pool.member_weight(member, name).to(torch.float64) for member in members)
    return (sum(values, torch.zeros((), dtype=torch.float64)) / len(members)).to(torch.float32)


def _groups(passes: Sequence[MemberPasses]) -> list[tuple[str, ...]]:
    """The weights of layers that every member runs once, by the input that they share, in the order of running.

    Layers whose rows differ (a query of which only CLS counts, keys of which all tokens do) are solved apart.
    """
    common = [name for name in passes[0].calls if all(name in member.calls for member in passes)]
    found: dict[object, list[str]] = {}
    for name in common:
        calls = [member.calls[name] for member in passes]
        key = tuple((call.source, call.rows) for call in calls), passes[0].layers[name].bias is None
        found.setdefault(key, []).append(name)
    for member in passes[1:]:
        if [name for name in member.calls if name in common] != common:
            raise MethodError(
                f"{member.member} runs its layers in another order than {passes[0].member}, so that they "
                "cannot be merged one after another: use regmean"
            )
    return [tuple(group) for group in found.values()]


def _fit(
    group: tuple[str, ...], passes: Sequence[MemberPasses], out: Mapping[str, Tensor], settings: PropagationSettings
) -> Fit:
    """Solves a group of layers and overwrites their weights."""
    total = Equations(next(iter(out.values())).device)
    for member in passes:
        total.add_mean(member.equations(group))
    layers = [passes[0].layers[name] for name in group]
    solution = total.solve(settings.ridge, layers[0].bias is not None, group[0])
    start = 0
    for layer in layers:
        stop = start + layer.outputs(out)
        layer.add(solution.delta[:, start:stop].to(torch.float32), out)
        start = stop
    repairing = settings.update == "propagated" and any(member.calls[n].residual for member in passes for n in group)
    return Fit(group, total.rows, solution.before, solution.after, repairing, solution.added)

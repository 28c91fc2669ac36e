"""MaTS: match the members in their task parameter subspaces, a linear system per weight solved by conjugate gradients."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from merging.errors import MethodError
from merging.kernels.blockwise import Scratch, weighted_sum
from merging.methods.checks import check_weights, chosen, target
from merging.methods.least_squares.blocks import blocks_of
from merging.methods.least_squares.conjugate_gradients import solve
from merging.methods.least_squares.subspaces import KINDS, Subspace, check_statistics, has_statistics
from merging.methods.method import METHODS, Context, Method, Needs, Parameter, Prepared, Weight, register
from merging.recipe import BASE, Recipe, Value

AVERAGE = "average"
BATCH_BYTES = 1 << 28
"""Most that one float64 matrix stack of a batch takes, unless a single weight takes more."""


@dataclass(frozen=True)
class StartStatistics:
    """What is known of all weights.

    Args:
        kinds: Kinds of statistic that some weight has.
        starts: Method → its own global statistics, of those that a candidate started at.
    """

    kinds: frozenset[str] = frozenset()
    starts: Mapping[str, Any] = field(default_factory=dict)


@register
class Mats(Method):
    """(Σ α_t C_t) θ = Σ α_t C_t θ_t for every weight (Tam et al. 2024, equation 4).

    C_t is a member's `subspace`: the identity, its diagonal Fisher, the Gram of a layer's inputs (V ↦ V A_t, RegMean with
    ρ = 1), or K-FAC (V ↦ B_t V A_t). Conjugate gradients begin at the result of another method at its defaults and end
    after `iterations`: on badly conditioned systems they go only part of the way, which is part of the method. Members
    with a scaling factor of 0 are left out. Weights without the statistic are the plain mean, or what RegMean propagated made
    of them where that is the start (its biases belong to its weights). `report()` has the relative residual of every weight.
    """

    name = "mats"
    summary = "match task parameter subspaces by conjugate gradients"
    optional = ("fisher", "gram", "output_gram", "propagated", "distilled")
    scaling = Parameter(1.0, "the member's weight in the system", low=0.0, high=1.5)
    scale_free = True
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "subspace": Parameter("gram", "what C_t is", choices=tuple(KINDS), search=False),
        "start": Parameter(
            "average",
            "method, of any kind, whose result at its defaults the iterations begin at; or base",
            search=False,
        ),
        "iterations": Parameter(100, "most steps of conjugate gradients", low=1, high=200, log=True, minimum=0),
        "tolerance": Parameter(1e-5, "relative residual to stop at", minimum=0.0, maximum=1.0, search=False),
        "preconditioner": Parameter(
            "none",
            "scale the system by its diagonal (jacobi), or solve a damped Kronecker product near it (kfac)",
            choices=("none", "jacobi", "kfac"),
            search=False,
        ),
    }

    def complete(self, recipe: Recipe, model_type: str = "") -> Recipe:
        """As for any method; the start is one, too, and another one."""
        complete = super().complete(recipe, model_type)
        start = str(complete.parameters["start"])
        if start != BASE and METHODS[start].name.rpartition("+")[2] == self.name:
            raise MethodError(f"start = '{start}': mats cannot begin at its own result; name another method")
        return complete

    def needs(self, parameters: Mapping[str, Value]) -> Needs:
        """What the subspace and the method of the start need."""
        start = _start(parameters)
        own = start.needs(start.defaults()) if start else Needs()
        return replace(own, members=tuple(dict.fromkeys((*KINDS[str(parameters["subspace"])], *own.members))))

    def global_pass(self, weights: Iterable[Weight]) -> StartStatistics:
        """The kinds of statistic that some weight has."""
        return StartStatistics(
            frozenset(kind for weight in weights for kind, values in weight.statistics.items() if values)
        )

    def combine(self, first: StartStatistics | None, second: StartStatistics | None) -> StartStatistics:
        """Kinds that either has; both global statistics of methods that were a start."""
        one, other = first or StartStatistics(), second or StartStatistics()
        starts = {
            name: METHODS[name].combine(one.starts.get(name), other.starts.get(name))
            if name in one.starts and name in other.starts
            else one.starts.get(name, other.starts.get(name))
            for name in {**one.starts, **other.starts}
        }
        return StartStatistics(one.kinds | other.kinds, starts)

    def second_pass(
        self, weights: Iterable[Weight], global_stats: StartStatistics, parameters: Mapping[str, Value]
    ) -> StartStatistics | None:
        """The global statistics of the method of the start, then what that one asks besides."""
        start = _start(parameters)
        if start is None or type(start).global_pass is Method.global_pass:
            return None
        if start.name not in global_stats.starts:
            return StartStatistics(starts={start.name: start.global_pass(weights)})
        more = start.second_pass(weights, global_stats.starts[start.name], start.defaults())
        return None if more is None else StartStatistics(starts={start.name: more})

    def prepare(self, weights: Sequence[Weight], context: Context) -> Prepared:
        """Checks statistics and keeps references to them.

        Raises:
            MethodError: A statistic is missing for a member, not finite, negative, or of another shape.
        """
        return PreparedMats(
            weights, context, self.global_pass(weights) if context.global_stats is None else context.global_stats
        )


def _start(parameters: Mapping[str, Value]) -> Method | None:
    """The method of the start; None for the base."""
    return None if parameters["start"] == BASE else METHODS[str(parameters["start"])]


class PreparedMats(Prepared):
    """Base, members and statistics, as they are stored.

    Args:
        weights: The weights to merge.
        context: For the method whose result is the start.
        global_stats: Of the whole model.
    """

    def __init__(self, weights: Sequence[Weight], context: Context, global_stats: StartStatistics) -> None:
        self._members = check_weights(weights)
        self._weights = tuple(weights)
        self._blocks = {weight.name: blocks_of(weight) for weight in weights}
        for views in self._blocks.values():
            for view in views:
                check_statistics(view)
        self._context = context
        self._global_stats = global_stats
        self._starts: dict[str, Prepared] = {}
        self._scratch = Scratch()
        self._report: dict[str, float] = {}

    def report(self) -> dict[str, float]:
        """`residual`, the largest relative residual that was left, and `residual.NAME` of every solved weight."""
        return dict(self._report)

    @torch.no_grad()
    def merge(self, scaling: Mapping[str, float], parameters: Mapping[str, Value], out: Mapping[str, Tensor]) -> None:
        """Solves all weights of one shape together; nothing is written before the systems are known to be sound.

        Raises:
            MethodError: The subspace's statistic is nowhere, or scaling factors make a system indefinite.
        """
        members = [member for member in chosen(scaling, self._members) if scaling[member]]
        factors = [scaling[member] for member in members]
        if sum(factors) <= 0:
            raise MethodError(f"the scaling factors sum to {sum(factors):g}: mats needs a positive sum")
        subspace = str(parameters["subspace"])
        if missing := [kind for kind in KINDS[subspace] if kind not in self._global_stats.kinds]:
            raise MethodError(
                f"subspace '{subspace}' needs the {missing[0]} statistic, which no weight has. Compute it, or use another "
                "subspace"
            )
        destinations = {weight.name: target(out, weight) for weight in self._weights}
        solved = [weight for weight in self._weights if has_statistics(weight, subspace)]
        start = _start(parameters)
        whole = start is not None and start.solution is not None
        started = self._start(self._weights if whole else solved, start, members)
        self._report = {"residual": 0.0}
        moved: dict[str, Tensor] = {}
        views = [view for weight in solved for view in self._blocks[weight.name]]
        begun = self._in_blocks(started)
        for batch in _batches(views, subspace):
            moved |= self._solve(Subspace(batch, subspace, members, factors), begun, parameters)
        for weight in self._weights:
            terms = [(weight.members[member], 1.0 / len(members)) for member in members]
            if whole:
                terms = [(started[weight.name], 1.0)]
            parts = [moved[view.name] for view in self._blocks[weight.name] if view.name in moved]
            if parts:
                terms = [(weight.base, 1.0), (torch.stack(parts).view(weight.base.shape), 1.0)]
            weighted_sum(terms, destinations[weight.name], self._scratch)

    def _in_blocks(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values of weights as those of their blocks."""
        by_block = {}
        for name, value in values.items():
            views = self._blocks[name]
            for view, part in zip(views, value.reshape(len(views), *views[0].base.shape), strict=True):
                by_block[view.name] = part
        return by_block

    def _start(self, weights: Sequence[Weight], start: Method | None, members: Sequence[str]) -> Mapping[str, Tensor]:
        """Weights to begin at."""
        if start is None:
            return {weight.name: weight.base for weight in weights}
        if start.name == AVERAGE:
            return {w.name: torch.stack([w.members[m].double() for m in members]).mean(0) for w in weights}
        if start.name not in self._starts:
            # where the model is at hand as a whole, nobody was asked for the global statistics of a start
            global_stats = self._global_stats.starts.get(start.name) or start.global_pass(self._weights)
            self._starts[start.name] = start.prepare(self._weights, replace(self._context, global_stats=global_stats))
        recipe = start.default_recipe(members, self._context.model_type)
        begun = {weight.name: torch.empty_like(weight.base, dtype=torch.float32) for weight in self._weights}
        self._starts[start.name].merge(recipe.scaling, recipe.parameters, begun)
        return begun

    def _solve(
        self, system: Subspace, started: Mapping[str, Tensor], parameters: Mapping[str, Value]
    ) -> dict[str, Tensor]:
        """θ − θ_0 of a batch's weights."""
        solution, residuals, indefinite = solve(
            system.apply,
            system.right(),
            system.stack([started[weight.name].double() - weight.base for weight in system.weights]),
            int(parameters["iterations"]),
            float(parameters["tolerance"]),
            system.preconditioner(str(parameters["preconditioner"])),
            system.project,
        )
        if min(system.factors) < 0 and indefinite.any():
            name = system.weights[int(indefinite.nonzero()[0])].name
            raise MethodError(f"negative scaling factors make the system of '{name}' indefinite: use factors ≥ 0")
        for weight, residual in zip(system.weights, residuals.tolist(), strict=True):
            self._report[f"residual.{weight.name}"] = residual
            self._report["residual"] = max(self._report["residual"], residual)
        return {weight.name: value for weight, value in zip(system.weights, system.unstack(solution), strict=True)}


def _batches(weights: Sequence[Weight], subspace: str) -> list[list[Weight]]:
    """Weights of one shape and orientation, as many together as memory should take."""
    shaped: dict[tuple[bool, torch.Size], list[Weight]] = defaultdict(list)
    for weight in weights:
        shaped[weight.transposed, weight.base.shape].append(weight)
    batches = []
    for (_, shape), group in shaped.items():
        entries = max(shape.numel(), max(shape, default=1) ** 2 if "gram" in KINDS[subspace] else 1)
        size = max(1, BATCH_BYTES // (8 * entries))
        batches += [group[start : start + size] for start in range(0, len(group), size)]
    return batches

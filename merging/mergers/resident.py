"""From a pool and a recipe to merged weights in memory, again and again."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from merging.mergers import weight_groups
from merging.mergers.material import Material, second_passes
from merging.mergers.running_statistics import parameters_of
from merging.methods import METHODS, Method, Prepared
from merging.recipe import REFERENCES, Recipe, Value


class ResidentMerger:
    """Merges recipe after recipe into the same weights; prepares each method when it is first asked for.

    Methods know of no groups of weights: each is prepared for parts of the model that no group of a recipe cuts, and merges
    every part with the factors that hold there. Recipes without groups, or with coarser ones, use the same parts.

    Args:
        material: Pool and statistics.
        out: The weights to overwrite, by the base's name, all on one device.
    """

    _is_part = False
    """Whether the model has weights besides, which are merged elsewhere."""

    def __init__(self, material: Material, out: Mapping[str, Tensor]) -> None:
        self._material = material
        self._out = out
        self._device = next(iter(out.values())).device
        self._kept: dict[str, _Kept] = {}

    def merge(self, recipe: Recipe) -> dict[str, float]:
        """Overwrites the weights with the recipe's.

        Returns:
            The method's figures on this merge.

        Raises:
            MethodError: The recipe is wrong, or has no merge.
        """
        complete = self._material.check(recipe)
        pool = self._material.pool
        if complete.method in REFERENCES:
            (member,) = complete.members or (None,)
            pool.prefetch(self._out, [member]) if member else pool.base.prefetch(self._out)
            for name, target in self._out.items():
                target.copy_(pool.member_weight(member, name) if member else pool.base_weight(name))
            return {}
        groups = weight_groups.split(self._out, complete)
        scaling = {name: factors for names, factors in groups for name in names}
        kept = self._prepare(METHODS[complete.method], complete.parameters, [names for names, _ in groups])
        for names, prepared in zip(kept.parts, kept.prepared, strict=True):
            prepared.merge(scaling[names[0]], complete.parameters, self._out)
        return joined(prepared.report() for prepared in kept.prepared)

    def _prepare(self, method: Method, parameters: Mapping[str, Value], wanted: Sequence[Sequence[str]]) -> "_Kept":
        """The method's state in parts that none of the wanted groups cuts; prepared anew only where one does."""
        kept = self._kept.setdefault(method.name, _Kept([list(self._out)]))
        group = {name: number for number, names in enumerate(wanted) for name in names}
        finer: dict[tuple[int, int], list[str]] = {}
        for number, names in enumerate(kept.parts):
            for name in names:
                finer.setdefault((number, group[name]), []).append(name)
        global_stats = known = kept.global_stats if kept.prepared else self._global_pass(method)
        in_parts = self._is_part or len(finer) > 1
        if in_parts and (kept.refined_for != parameters or len(finer) > len(kept.parts)):
            known = self._second_passes(method, global_stats, parameters)
        if not kept.prepared or len(finer) > len(kept.parts) or known is not global_stats:
            kept.prepared.clear()  # before the new state takes memory
            kept.parts, kept.global_stats = list(finer.values()), global_stats
            kept.refined_for = dict(parameters) if in_parts else None
            for names in kept.parts:
                kept.prepared.append(self._material.prepare(names, method, known, self._device))
        return kept

    def _global_pass(self, method: Method) -> Any:
        """The global statistics of all weights of the model."""
        return self._material.global_pass(self._out, method, self._device)

    def _second_passes(self, method: Method, global_stats: Any, parameters: Mapping[str, Value]) -> Any:
        """The global statistics with what a candidate's merge asks besides of all weights of the model."""
        return second_passes(method, global_stats, lambda known: [self._second_pass(method, known, parameters)])

    def _second_pass(self, method: Method, global_stats: Any, parameters: Mapping[str, Value]) -> Any:
        """What a candidate's merge asks besides of the weights at hand."""
        weights = parameters_of(self._material.weights(self._out, method.kinds, self._device, method.extras))
        return method.second_pass(weights, global_stats, parameters)


@dataclass
class _Kept:
    """A method's state in memory.

    Args:
        parts: Weights' names, part by part.
        prepared: The state for each part; none before the first recipe.
        global_stats: The global statistics of all weights.
        refined_for: The parameters that the parts' global statistics were refined for, if the method asks for that.
    """

    parts: list[list[str]]
    prepared: list[Prepared] = field(default_factory=list)
    global_stats: Any = None
    refined_for: Mapping[str, Value] | None = None


def joined(reports: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """A method's figures on a merge from those on its parts: the largest of each; counts (`…_layers`, `…_entries`) add up."""
    totals: dict[str, float] = {}
    for report in reports:
        for name, value in report.items():
            if name.endswith(("_layers", "_entries")):
                totals[name] = totals.get(name, 0.0) + value
            else:
                totals[name] = max(totals.get(name, value), value)
    return totals

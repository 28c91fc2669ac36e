"""From a pool and a recipe to merged weights in memory, again and again."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from merging import groups, storage
from merging.checkpoint import Checkpoint
from merging.errors import MethodError
from merging.methods import BASE, METHODS, Context, Method, Prepared, Weight
from merging.pool import Pool
from merging.recipe import Recipe, Value
from merging.statistics import StatisticsFile

REFERENCE_BASE = "base"
REFERENCE_MEMBER = "member"
REFERENCES = (REFERENCE_BASE, REFERENCE_MEMBER)
"""Methods of the two recipes that merge nothing: the base as it is, one member as it is."""


def base_recipe() -> Recipe:
    """The base as it is."""
    return Recipe(REFERENCE_BASE, {})


def member_recipe(member: str) -> Recipe:
    """One member as it is."""
    return Recipe(REFERENCE_MEMBER, {member: 1.0})


@dataclass(frozen=True)
class Material:
    """All that recipes over one pool are merged from.

    Args:
        pool: Base and members.
        statistics: Kind → member (or `BASE`) → file.
        examples: Number of training examples behind each member, where known.
    """

    pool: Pool
    statistics: Mapping[str, Mapping[str, StatisticsFile]] = field(default_factory=dict)
    examples: Mapping[str, int] = field(default_factory=dict)

    def check(self, recipe: Recipe) -> Recipe:
        """The recipe with every parameter spelled out.

        Raises:
            MethodError: An unknown method, parameter or member; groups that do not have every weight once; or a statistic that
                the method needs is missing.
        """
        if unknown := set(recipe.members) - set(self.pool.members):
            raise MethodError(f"'{min(unknown)}' is no member of the pool ({', '.join(sorted(self.pool.members))})")
        if recipe.method in REFERENCES:
            return recipe
        method = METHODS[recipe.method]
        complete = method.complete(recipe)
        groups.check(self.pool.weights, complete)
        for kind in method.needs(complete.parameters):
            missing = [member for member in complete.members if member not in self.statistics.get(kind, {})]
            if missing:
                raise MethodError(
                    f"method '{method.name}' needs the statistic '{kind}' of {', '.join(missing)}: compute it with "
                    f"`mergequest statistics`, or name its file under the member's `statistics:`"
                )
        for kind in method.base_needs(complete.parameters):
            if BASE not in self.statistics.get(kind, {}):
                raise MethodError(
                    f"method '{method.name}' needs the statistic '{kind}' of the base for these parameters: a campaign "
                    "computes it on `base_data`; a recipe names its file under `base_statistics:`"
                )
        if (solution := method.solution_for(complete.parameters)) is not None:
            subset = "+".join(complete.members)
            if subset not in self.statistics.get(solution, {}):
                raise MethodError(
                    f"method '{method.name}' needs the '{solution}' solution of {subset}: a campaign computes it of "
                    f"all members; a recipe names its file under `statistics:`"
                )
        return complete

    def weights(self, names: Iterable[str], kinds: Iterable[str], device: torch.device) -> Iterator[Weight]:
        """The named weights as a method sees them, with these kinds of statistic where they are there."""
        kinds = [kind for kind in kinds if kind in self.statistics]
        moved: dict[int, tuple[Tensor, Tensor]] = {}

        def move(value: Tensor) -> Tensor:
            """One copy on the device of what several weights share."""
            return moved.setdefault(id(value), (value, value.to(device)))[1]

        names = list(names)
        self.pool.prefetch(names)
        for kind in kinds:
            for who, file in self.statistics[kind].items():
                file.prefetch(self._own_name(who, name) for name in names)
        for name in names:
            statistics = {kind: self._statistic(kind, name) for kind in kinds}
            yield Weight(
                name,
                self.pool.base_weight(name).to(device),
                {member: self.pool.member_weight(member, name).to(device) for member in self.pool.members},
                {kind: {who: move(v) for who, v in found.items()} for kind, found in statistics.items() if found},
                transposed=self._transposed(name),
            )

    def survey(self, names: Iterable[str], method: Method, device: torch.device) -> Any:
        """A method's facts about some of the weights, found on a device."""
        return method.survey(self.weights(names, method.kinds, device))

    def prepare(self, names: Sequence[str], method: Method, survey: Any, device: torch.device) -> Prepared:
        """A method's state for some of the weights, given the survey of all."""
        return method.prepare(list(self.weights(names, method.kinds, device)), Context(self.examples, survey))

    def _transposed(self, name: str) -> bool:
        """Whether any statistics file says that this weight is stored [in, out]."""
        return any(
            self.pool.members[who].names[name] in file.transposed
            for found in self.statistics.values()
            for who, file in found.items()
            if who in self.pool.members
        )

    def _statistic(self, kind: str, name: str) -> dict[str, Tensor]:
        """A weight's statistic of each member that has one, in the file's own tensor objects."""
        found = {}
        for who, file in self.statistics[kind].items():
            own = self._own_name(who, name)
            if own in file.names:
                found[who] = file.read(own)
        return found

    def _own_name(self, who: str, name: str) -> str:
        """A weight's name in the statistics of a member, or of somebody else."""
        return self.pool.members[who].names[name] if who in self.pool.members else name


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
        found = groups.split(self._out, complete)
        scaling = {name: factors for names, factors in found for name in names}
        kept = self._prepare(METHODS[complete.method], complete.parameters, [names for names, _ in found])
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
        survey = kept.survey if kept.prepared else self._survey(method)
        refined, in_parts = None, self._is_part or len(finer) > 1
        if in_parts and (kept.refined_for != parameters or len(finer) > len(kept.parts)):
            refined = self._refine(method, survey, parameters)
        if not kept.prepared or len(finer) > len(kept.parts) or refined is not None:
            kept.prepared.clear()  # before the new state takes memory
            kept.parts, kept.survey = list(finer.values()), survey
            kept.refined_for = dict(parameters) if in_parts else None
            seen = survey if refined is None else method.combine(survey, refined)
            for names in kept.parts:
                kept.prepared.append(self._material.prepare(names, method, seen, self._device))
        return kept

    def _survey(self, method: Method) -> Any:
        """The survey of all weights of the model."""
        return self._material.survey(self._out, method, self._device)

    def _refine(self, method: Method, survey: Any, parameters: Mapping[str, Value]) -> Any:
        """What a candidate's merge asks besides of all weights of the model."""
        return method.refine(self._material.weights(self._out, method.kinds, self._device), survey, parameters)


@dataclass
class _Kept:
    """A method's state in memory.

    Args:
        parts: Weights' names, part by part.
        prepared: The state for each part; none before the first recipe.
        survey: The survey of all weights.
        refined_for: The parameters that the parts' survey was refined for, if the method asks for that.
    """

    parts: list[list[str]]
    prepared: list[Prepared] = field(default_factory=list)
    survey: Any = None
    refined_for: Mapping[str, Value] | None = None


def joined(reports: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """A method's figures on a merge from those on its parts: the largest of each; counts of layers add up."""
    found: dict[str, float] = {}
    for report in reports:
        for name, value in report.items():
            known = found.get(name, value if not name.endswith("_layers") else 0.0)
            found[name] = known + value if name.endswith("_layers") else max(known, value)
    return found


def head_tensors(pool: Pool, member: str) -> dict[str, Tensor]:
    """The tensors that a member keeps for its task, by its own names."""
    chosen = pool.members[member]
    chosen.checkpoint.prefetch(chosen.head)
    return {name: chosen.checkpoint.read(name) for name in chosen.head}


def open_statistics(pool: Pool, files: Mapping[str, Sequence[str]]) -> dict[str, dict[str, StatisticsFile]]:
    """Statistics files sorted by kind, each checked against the checkpoint that it must belong to.

    Args:
        pool: The pool.
        files: Member, `BASE`, or names of members joined by + → paths.

    Raises:
        StatisticsError: A file is damaged, or belongs to another checkpoint.
    """
    found: dict[str, dict[str, StatisticsFile]] = {}
    for who, paths in files.items():
        for path in paths:
            file = StatisticsFile.open(path)
            if who == BASE or who in pool.members:
                checkpoint: Checkpoint = pool.base if who == BASE else pool.members[who].checkpoint
                file.check(checkpoint.fingerprint, checkpoint.tensors)
            else:
                file.check(subset_fingerprint(pool, who.split("+")))
            found.setdefault(file.kind, {})[who] = file
    return found


def subset_fingerprint(pool: Pool, members: Sequence[str]) -> str:
    """Content hash of the base and some members, whatever their names and order."""
    members_hashes = sorted(pool.members[member].checkpoint.fingerprint for member in members)
    return storage.fingerprint([pool.base.fingerprint, members_hashes])

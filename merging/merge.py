"""From a pool and a recipe to merged weights in memory, again and again."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from merging import storage
from merging.checkpoint import Checkpoint
from merging.errors import MethodError
from merging.methods import BASE, METHODS, Context, Method, Prepared, Weight
from merging.pool import Pool
from merging.recipe import Recipe
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
            MethodError: An unknown method, parameter or member, or a statistic that the method needs is missing.
        """
        if unknown := set(recipe.scaling) - set(self.pool.members):
            raise MethodError(f"'{min(unknown)}' is no member of the pool ({', '.join(sorted(self.pool.members))})")
        if recipe.method in REFERENCES:
            return recipe
        method = METHODS[recipe.method]
        complete = method.complete(recipe)
        for kind in method.needs(complete.parameters):
            missing = [member for member in complete.members if member not in self.statistics.get(kind, {})]
            if missing:
                raise MethodError(
                    f"method '{method.name}' needs the statistic '{kind}' of {', '.join(missing)}: compute it with "
                    f"`mergequest statistics`, or name its file under the member's `statistics:`"
                )
        if method.solution is not None:
            subset = "+".join(complete.members)
            if subset not in self.statistics.get(method.solution, {}):
                raise MethodError(
                    f"method '{method.name}' needs the '{method.solution}' solution of {subset}: a campaign computes it of "
                    f"all members; a recipe names its file under `statistics:`"
                )
        return complete

    def weights(self, names: Iterable[str], method: Method, device: torch.device) -> Iterator[Weight]:
        """The named weights as a method sees them, with the statistics that it asks for."""
        used = (*method.requires, *method.optional, *([method.solution] if method.solution else []))
        kinds = [kind for kind in used if kind in self.statistics]
        moved: dict[int, tuple[Tensor, Tensor]] = {}

        def move(value: Tensor) -> Tensor:
            """One copy on the device of what several weights share."""
            return moved.setdefault(id(value), (value, value.to(device)))[1]

        for name in names:
            statistics = {kind: self._statistic(kind, name) for kind in kinds}
            yield Weight(
                name,
                self.pool.base_weight(name).to(device),
                {member: self.pool.member_weight(member, name).to(device) for member in self.pool.members},
                {kind: {who: move(v) for who, v in found.items()} for kind, found in statistics.items() if found},
                transposed=self._transposed(name),
            )

    def survey(self, names: Iterable[str], method: Method) -> Any:
        """A method's facts about some of the weights."""
        return method.survey(self.weights(names, method, torch.device("cpu")))

    def prepare(self, names: Sequence[str], method: Method, survey: Any, device: torch.device) -> Prepared:
        """A method's state for some of the weights, given the survey of all."""
        return method.prepare(list(self.weights(names, method, device)), Context(self.examples, survey))

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
            own = self.pool.members[who].names[name] if who in self.pool.members else name
            if own in file.names:
                found[who] = file.read(own)
        return found


class ResidentMerger:
    """Merges recipe after recipe into the same weights; prepares each method when it is first asked for.

    Args:
        material: Pool and statistics.
        out: The weights to overwrite, by the base's name, all on one device.
    """

    def __init__(self, material: Material, out: Mapping[str, Tensor]) -> None:
        self._material = material
        self._out = out
        self._device = next(iter(out.values())).device
        self._prepared: dict[str, Prepared] = {}

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
            for name, target in self._out.items():
                target.copy_(pool.member_weight(member, name) if member else pool.base_weight(name))
            return {}
        prepared = self._prepare(METHODS[complete.method])
        prepared.merge(complete.scaling, complete.parameters, self._out)
        return prepared.report()

    def _prepare(self, method: Method) -> Prepared:
        if method.name not in self._prepared:
            names = list(self._out)
            survey = self._material.survey(names, method)
            self._prepared[method.name] = self._material.prepare(names, method, survey, self._device)
        return self._prepared[method.name]


def head_tensors(pool: Pool, member: str) -> dict[str, Tensor]:
    """The tensors that a member keeps for its task, by its own names."""
    chosen = pool.members[member]
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

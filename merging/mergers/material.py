"""What recipes over one pool are merged from: base and members, statistics, numbers of examples."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.pool import Pool
from merging.checkpoints.renumbered import Renumbered
from merging.errors import MethodError, StatisticsError
from merging.io import hashing
from merging.mergers import running_statistics, weight_groups
from merging.mergers.running_statistics import parameters_of
from merging.methods import METHODS, Context, Method, Prepared, Weight
from merging.recipe import BASE, REFERENCES, Recipe
from merging.statistics import StatisticsFile

PER_INPUT = ("gram", "representation")
"""Kinds of statistic that no number of tokens is a dimension of."""


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
        complete = method.complete(recipe, self.pool.model_type)
        weight_groups.check(self.pool.weights, complete)
        whole = [member for member in complete.members if not self.pool.members[member].checkpoint.is_adapter]
        if "factors" in method.extras and whole:
            raise MethodError(
                f"method '{method.name}' merges LoRA adapters, and {', '.join(whole)} is a whole model: name the adapters' own "
                f"directories (not those of merged models), or use '{method.name.replace('core+', '')}'"
            )
        needs = method.needs(complete.parameters)
        for kind in needs.members:
            missing = [member for member in complete.members if member not in self.statistics.get(kind, {})]
            if missing:
                raise MethodError(
                    f"method '{method.name}' needs the statistic '{kind}' of {', '.join(missing)}: compute it with "
                    f"`mergequest statistics`, or name its file under the member's `statistics:`"
                )
        for kind in needs.base:
            if BASE not in self.statistics.get(kind, {}):
                raise MethodError(
                    f"method '{method.name}' needs the statistic '{kind}' of the base for these parameters: a campaign "
                    "computes it on `base_data`; a recipe names its file under `base_statistics:`"
                )
        if needs.whole is not None:
            subset = "+".join(complete.members)
            if subset not in self.statistics.get(needs.whole, {}):
                raise MethodError(
                    f"method '{method.name}' needs the '{needs.whole}' solution of {subset}: a campaign computes it of "
                    f"all members; a recipe names its file under `statistics:`"
                )
            _require_start(self.statistics[needs.whole][subset], complete)
        return complete

    def weights(
        self, names: Iterable[str], kinds: Iterable[str], device: torch.device, extras: Sequence[str] = ()
    ) -> Iterator[Weight]:
        """The named weights as a method sees them.

        Args:
            names: The base's names.
            kinds: Kinds of statistic to give where they are there.
            device: Where all tensors lie.
            extras: `Method.extras`.
        """
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
                {kind: {who: move(v) for who, v in values.items()} for kind, values in statistics.items() if values},
                transposed=self._transposed(name) or ("layout" in extras and name in self.pool.transposed),
                factors=self._factors(name, device) if "factors" in extras else {},
            )

    def global_pass(self, names: Iterable[str], method: Method, device: torch.device) -> Any:
        """A method's facts about some of the weights, found on a device."""
        return method.global_pass(parameters_of(self.weights(names, method.kinds, device, method.extras)))

    def prepare(self, names: Sequence[str], method: Method, global_stats: Any, device: torch.device) -> Prepared:
        """A method's state for some of the weights, given the global statistics of all."""
        weights = list(self.weights(names, method.kinds, device, method.extras))
        return running_statistics.prepare(method, weights, Context(self.examples, global_stats, self.pool.model_type))

    def _transposed(self, name: str) -> bool:
        """Whether any statistics file says that this weight is stored [in, out]."""
        return any(
            self.pool.members[who].names[name] in file.transposed
            for files in self.statistics.values()
            for who, file in files.items()
            if who in self.pool.members
        )

    def _factors(self, name: str, device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
        """Member → what its adapter adds to a weight, of those that do not hold it in full."""
        pairs = {member: self.pool.member_factors(member, name) for member in self.pool.members}
        return {who: (pair[0].to(device), pair[1].to(device)) for who, pair in pairs.items() if pair is not None}

    def _statistic(self, kind: str, name: str) -> dict[str, Tensor]:
        """A weight's statistic of each member that has one, in the file's own tensor objects."""
        values = {}
        for who, file in self.statistics[kind].items():
            own = self._own_name(who, name)
            if own in file.names:
                values[who] = file.read(own)
        if values and kind == "gram":
            # an expert that none of a member's tokens reached; what is missing for another reason, a method refuses
            for who, file in self.statistics[kind].items():
                if who not in values and self._own_name(who, name) in file.unreached:
                    values[who] = torch.zeros_like(next(iter(values.values())))
        return values

    def _own_name(self, who: str, name: str) -> str:
        """A weight's name in the statistics of a member, or of somebody else."""
        return self.pool.members[who].names[name] if who in self.pool.members else name


def second_passes(method: Method, global_stats: Any, ask: Callable[[Any], Iterable[Any]]) -> Any:
    """Global statistics with what a candidate asks besides: asked again, knowing the answers, until none adds to it.

    Args:
        method: The method.
        global_stats: Of all weights.
        ask: Given what is known so far, what `Method.second_pass` gives of every part of the model.
    """
    while type(method).second_pass is not Method.second_pass:
        answers = [answer for answer in ask(global_stats) if answer is not None]
        if not answers:
            break
        global_stats = reduce(method.combine, answers, global_stats)
    return global_stats


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
        StatisticsError: A file is damaged, belongs to another checkpoint, or is the second one of its kind.
    """
    by_kind: dict[str, dict[str, StatisticsFile]] = {}
    solutions = {METHODS[name].solution for name in METHODS}
    for who, paths in files.items():
        for path in paths:
            file = StatisticsFile.open(path)
            if file.kind not in solutions and (who == BASE or who in pool.members):
                checkpoint: Checkpoint = pool.base if who == BASE else pool.members[who].checkpoint
                if isinstance(checkpoint, Renumbered) and file.kind not in PER_INPUT:
                    raise StatisticsError(
                        f"{path} counts the tokens of {who} as its own tokenizer does, and the merge counts them otherwise: "
                        f"leave the {file.kind} out, or merge by a method that needs none"
                    )
                file.check(checkpoint.fingerprint, checkpoint.tensors)
            else:
                file.check(subset_fingerprint(pool, who.split("+")))
            one = by_kind.setdefault(file.kind, {}).setdefault(who, file)
            if one.path != path:
                raise StatisticsError(
                    f"{who} has two files with the statistic '{file.kind}', {one.path} and {path}: name one of them"
                )
    return by_kind


def _require_start(file: StatisticsFile, recipe: Recipe) -> None:
    """Looks whether a solution that started from a merge is of the one that the recipe names.

    Raises:
        MethodError: It is of another.
    """
    named, start = recipe.parameters.get("start"), file.settings.get("start")
    if named and isinstance(start, Mapping) and Recipe(**start).identity != named:
        raise MethodError(
            f"{file.path} started from another merge than the recipe's `start` ({named}): name the file of that one"
        )


def subset_fingerprint(pool: Pool, members: Sequence[str]) -> str:
    """Content hash of the base and some members, whatever their names and order."""
    members_hashes = sorted(pool.members[member].checkpoint.fingerprint for member in members)
    return hashing.fingerprint([pool.base.fingerprint, members_hashes])

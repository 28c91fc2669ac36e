"""A part of a pool's weights: read once, kept, and merged as a merge of all of them would have it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from merging.checkpoints.pool import Pool
from merging.mergers.dtypes import merged_bytes, views
from merging.mergers.material import Material
from merging.mergers.resident import ResidentMerger
from merging.mergers.running_statistics import parameters_of
from merging.methods import METHODS, Method
from merging.recipe import REFERENCES, Recipe, Value


def needs_global_pass(method: str) -> bool:
    """Whether a recipe's method must have looked at all weights before any is merged."""
    return method not in REFERENCES and type(METHODS[method]).global_pass is not Method.global_pass


def needs_second_pass(method: str) -> bool:
    """Whether a method may ask more of all weights for a candidate."""
    return method not in REFERENCES and type(METHODS[method]).second_pass is not Method.second_pass


SECOND_PASSES = 2
"""Rounds in which exact global statistics become complete: what a start is asked (`mats`), then what that asks besides."""


@dataclass(frozen=True)
class KeptPool(Pool):
    """A pool that reads a weight when it is first asked for, and keeps it."""

    _read: dict[tuple[str | None, str], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def base_weight(self, name: str) -> Tensor:
        """θ_0's weight, as stored."""
        if (None, name) not in self._read:
            self._read[None, name] = super().base_weight(name)
        return self._read[None, name]

    def member_weight(self, member: str, name: str) -> Tensor:
        """θ_t's weight, as stored."""
        if (member, name) not in self._read:
            self._read[member, name] = super().member_weight(member, name)
        return self._read[member, name]

    def prefetch(self, names: Iterable[str], members: Iterable[str] | None = None) -> None:
        """As a pool does, of what has not been read."""
        names = list(names)
        if members is None:
            self.base.prefetch([name for name in names if (None, name) not in self._read])
        for member in self.members if members is None else members:
            if missing := [name for name in names if (member, name) not in self._read]:
                super().prefetch(missing, [member])


@dataclass(frozen=True)
class KeptMaterial(Material):
    """Material that reads every tensor once: what is kept of it does not depend on which methods hold on to what."""

    _read: dict[tuple[str, str], dict[str, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, material: Material) -> "KeptMaterial":
        """The same material, kept."""
        pool = material.pool
        return cls(KeptPool(pool.base, pool.members, pool.weights, pool.notes), material.statistics, material.examples)

    def _statistic(self, kind: str, name: str) -> dict[str, Tensor]:
        if (kind, name) not in self._read:
            self._read[kind, name] = super()._statistic(kind, name)
        return self._read[kind, name]


class PartMerger(ResidentMerger):
    """Merges some of a pool's weights, bit for bit as all together are merged.

    Global statistics are exchanged: each part passes over its own weights and receives what all the others have, and the
    same again in the second pass.

    Args:
        material: Pool and statistics; only what belongs to the weights is read.
        out: The weights to overwrite, by the base's name, all on one device.
    """

    _is_part = True

    def __init__(self, material: Material, out: Mapping[str, Tensor]) -> None:
        super().__init__(material, out)
        self._global_stats: dict[str, Any] = {}
        self._more: Any = None

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self._device

    def global_pass(self, method: str) -> dict[str, Any]:
        """A method's global statistics of every single weight: added up in one order, they give what all together give."""
        chosen = METHODS[method]
        weights = parameters_of(self._material.weights(self._out, chosen.kinds, self._device, chosen.extras))
        return {weight.name: chosen.global_pass([weight]) for weight in weights}

    def knows(self, method: str) -> bool:
        """Whether there is nothing that this merger must be told of a method."""
        return not needs_global_pass(method) or method in self._global_stats

    def settle(self, method: str, parts: Sequence[Mapping[str, Any]]) -> None:
        """Tells what all shards' global statistics are."""
        every = {name: global_stats for part in parts for name, global_stats in part.items()}
        ordered = [every[name] for name in self._material.pool.weights if name in every]
        self._global_stats[method] = reduce(METHODS[method].combine, ordered)

    def second_pass(self, recipe: Recipe, more: Sequence[Any] = ()) -> Any:
        """What this shard's weights add to the global statistics for a recipe; None for nothing.

        Args:
            recipe: The recipe.
            more: What all shards have added in earlier rounds.
        """
        complete, method = self._material.check(recipe), METHODS[recipe.method]
        known = reduce(method.combine, _given(more), self._global_stats[recipe.method])
        return self._second_pass(method, known, complete.parameters)

    def merge_part(self, recipe: Recipe, more: Sequence[Any] = ()) -> dict[str, float]:
        """Overwrites this shard's weights with the recipe's.

        Args:
            recipe: What to merge.
            more: What all shards' `second_pass` gave for it, in all rounds.

        Returns:
            The method's figures on this part of the merge.

        Raises:
            MethodError: The recipe is wrong, or has no merge.
        """
        answers = _given(more)
        self._more = reduce(METHODS[recipe.method].combine, answers) if answers else None
        return self.merge(recipe)

    def _global_pass(self, method: Method) -> Any:
        return self._global_stats.get(method.name)

    def _second_passes(self, method: Method, global_stats: Any, parameters: Mapping[str, Value]) -> Any:
        return global_stats if self._more is None else method.combine(global_stats, self._more)


def _given(more: Sequence[Any]) -> list[Any]:
    """Answers of second passes without those that add nothing."""
    return [answer for answer in more if answer is not None]


class ShardMerger(PartMerger):
    """A part in memory of its own, whose base and members are read once and kept.

    Args:
        material: Pool and statistics; only what belongs to the named weights is read.
        names: The base's names of the weights.
    """

    def __init__(self, material: Material, names: Sequence[str]) -> None:
        weights = material.pool.weights
        self.values = torch.empty(merged_bytes(weights, names), dtype=torch.uint8)
        """All merged weights as `views` lays them, in the dtypes that an export has; the next merge overwrites them."""
        super().__init__(KeptMaterial.of(material), views(self.values, weights, names))

    def read(self) -> None:
        """Reads base and members; statistics are read when a method asks for them."""
        pool = self._material.pool
        pool.prefetch(self._out)
        for name in self._out:
            pool.base_weight(name)
            for member in pool.members:
                pool.member_weight(member, name)

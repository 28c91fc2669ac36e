"""Which weights lie together: a pool cut by bytes into shards, each of which reads its own tensors and no other's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

from merging.mergers.dtypes import merged_bytes
from merging.mergers.material import Material
from merging.methods import METHODS

FLOAT32 = 4
Stored: TypeAlias = tuple[str, str, str]
"""A statistic as it is stored: kind, whose, and name in the file."""


@dataclass(frozen=True)
class ShardContent:
    """What lies in one shard.

    Args:
        names: The base's names of its weights, in the pool's order.
        read_bytes: Of base, members and statistics, as they are stored (statistics counted as float32).
        held_bytes: All that is in memory: what is read, what methods prepare, and the merged weights.
        merged_bytes: Of the merged weights, in the dtypes that an export has.
    """

    names: tuple[str, ...]
    read_bytes: int
    held_bytes: int
    merged_bytes: int


def place(material: Material, methods: Sequence[str], shards: int) -> list[ShardContent]:
    """The pool in shards of about equal bytes, weights that share a statistic together, so that nothing is read twice.

    Args:
        material: Pool and statistics; nothing is read but headers.
        methods: Names of the methods that will be asked for.
        shards: How many; fewer come back where there are fewer weights to part.
    """
    stored = _stored(material)
    units = [_unit(material, methods, names, stored) for names in _together(stored)]
    units.sort(key=lambda unit: (-unit.held_bytes, unit.names))
    loads: list[list[ShardContent]] = [[] for _ in range(max(1, min(shards, len(units))))]
    for unit in units:
        min(loads, key=lambda load: sum(content.held_bytes for content in load)).append(unit)
    order = {name: number for number, name in enumerate(material.pool.weights)}
    return [
        ShardContent(
            tuple(sorted((name for unit in load for name in unit.names), key=order.__getitem__)),
            sum(unit.read_bytes for unit in load),
            sum(unit.held_bytes for unit in load),
            sum(unit.merged_bytes for unit in load),
        )
        for load in loads
    ]


def _stored(material: Material) -> dict[str, dict[Stored, int]]:
    """The statistics of every weight as they are stored, and how many entries each has."""
    members = material.pool.members
    by_name: dict[str, dict[Stored, int]] = {name: {} for name in material.pool.weights}
    for kind, files in material.statistics.items():
        for who, file in files.items():
            known = set(file.names)
            for name, own in by_name.items():
                called = members[who].names[name] if who in members else name
                if called in known:
                    own[kind, who, file.shared.get(called, called)] = prod(file.shape(called))
    return by_name


def _together(stored: Mapping[str, Mapping[Stored, int]]) -> list[list[str]]:
    """Weights in sets of which no two share a statistic."""
    first: dict[Stored, str] = {}
    group_of = {name: [name] for name in stored}
    for name, own in stored.items():
        for key in own:
            one, other = group_of[first.setdefault(key, name)], group_of[name]
            if one is not other:
                one += other
                group_of |= dict.fromkeys(other, one)
    return list({id(names): names for names in group_of.values()}.values())


def _unit(
    material: Material, methods: Sequence[str], names: Sequence[str], stored: Mapping[str, Mapping[Stored, int]]
) -> ShardContent:
    """Some weights by themselves.

    Methods that need statistics are counted with one float32 copy of every member, for what they prepare; the others refer
    to what was read.
    """
    pool = material.pool
    entries = sum(prod(pool.weights[name].shape) for name in names)
    read = sum(pool.weights[name].nbytes for name in names)
    for member in pool.members.values():
        read += sum(member.checkpoint.tensors[member.names[name]].nbytes for name in names)
    read += FLOAT32 * sum({key: size for name in names for key, size in stored[name].items()}.values())
    prepared = sum(bool(METHODS[method].requires) for method in methods) * len(pool.members)
    merged = merged_bytes(pool.weights, names)
    return ShardContent(tuple(names), read, read + FLOAT32 * entries * prepared + merged, merged)

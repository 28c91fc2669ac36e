"""Scaling factors for groups of weights: what the keys `amazon@layers:0-2` and `amazon@*attention*` of a recipe mean.

A group is chosen by

- `layers:3`, `layers:0-2`, `layers:9-`: the weights of these layers, counted from 0 by the first number in a weight's name.
  Embeddings belong to layer 0; what has no number and is no embedding comes after all layers, and so belongs to a
  group without an end (`layers:9-`);
- a pattern on the weights' names (`*attention*`; `*`, `?` and `[…]` as in a shell, upper and lower case distinct);
- `*`: the rest, whatever no other group of this member has.

Every merged weight has one factor of every member: two groups of a member that share a weight are an error, as is a
weight in none. So the order in which groups are written says nothing, and a recipe's identity need not know of it.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from math import inf

from merging.errors import MethodError
from merging.methods.depth import depth
from merging.recipe import GROUP, Recipe, flat, nested

REST = "*"
LAYERS = "layers:"
Groups = tuple[tuple[tuple[str, ...], tuple[tuple[str, str], ...]], ...]
"""Groups of weights' names, each with every member and the key of its factor there."""


def split(names: Iterable[str], recipe: Recipe) -> list[tuple[list[str], dict[str, float]]]:
    """Groups of weights in which no member's factor changes.

    Args:
        names: Weights of a model, all or some: what a group has depends on each name alone.
        recipe: A recipe.

    Returns:
        For each group, in the order of its first weight: names, and every member's scaling factor there. One group
        for a recipe that has none.

    Raises:
        MethodError: A weight has no factor, or two, of a member; a group is written wrong.
    """
    if not any(GROUP in key for key in recipe.scaling):
        return [(list(names), dict(recipe.scaling))]
    groups = _groups(tuple(names), tuple(sorted(recipe.scaling)))
    return [(list(own), {member: recipe.scaling[key] for member, key in keys}) for own, keys in groups]


def split_keys(names: Iterable[str], recipe: Recipe) -> list[tuple[list[str], dict[str, str]]]:
    """As `split`, with the key of every member's factor there instead of the factor."""
    return [(list(own), dict(keys)) for own, keys in _groups(tuple(names), tuple(sorted(recipe.scaling)))]


def check(names: Iterable[str], recipe: Recipe) -> None:
    """Whether a recipe's groups fit a model, all of whose merged weights are named here.

    Raises:
        MethodError: A weight has no factor, or two, of a member; a group has no weight, or is written wrong.
    """
    grouped = {key for key in recipe.scaling if GROUP in key and not key.endswith(GROUP + REST)}
    if not grouped:
        return
    names = tuple(names)
    used = {key for _, keys in _groups(names, tuple(sorted(recipe.scaling))) for _, key in keys}
    if idle := grouped - used:
        key = min(idle)
        raise MethodError(
            f"scaling factor '{key}': '{key.partition(GROUP)[2]}' has none of the merged weights, whose names are like "
            f"'{names[len(names) // 2]}'"
        )


def depth_groups(names: Iterable[str], count: int | None = None) -> tuple[str, ...]:
    """Groups of layers, as equal as can be, that have every weight of a model.

    Args:
        names: All merged weights.
        count: How many; by default, and at most, one per layer.

    Raises:
        MethodError: No weight's name has a layer's number.
    """
    numbered = [number for number in map(depth, names) if number < inf]
    layers = int(max(numbered, default=0)) + 1
    if layers == 1:
        raise MethodError(
            "scaling factors by depth need two layers or more, numbered in the weights' names ('encoder.layer.3.output…'), "
            "and this model has none: use scaling factors per member or per pattern"
        )
    count = min(count or layers, layers)
    starts = [number * layers // count for number in range(count)]
    lasts = [start - 1 for start in starts[1:]]
    inner = [str(start) if start == last else f"{start}-{last}" for start, last in zip(starts, lasts, strict=False)]
    return tuple(f"{LAYERS}{span}" for span in [*inner, f"{starts[-1]}-"])


def pattern_groups(names: Iterable[str], patterns: Sequence[str]) -> tuple[str, ...]:
    """Patterns and, where weights are left, `*` for the rest; together they have every weight of a model.

    Args:
        names: All merged weights.
        patterns: Groups that have no weight in common.

    Raises:
        MethodError: A pattern has no weight, or one that another has too.
    """
    names = list(names)
    chosen = [pattern for pattern in dict.fromkeys(patterns) if pattern != REST]
    matchers = [_matcher(pattern) for pattern in chosen]
    rest = [REST] if not all(any(matches(name) for matches in matchers) for name in names) else []
    groups = (*chosen, *rest)
    check(names, Recipe("", dict.fromkeys((f"every member{GROUP}{group}" for group in groups), 1.0)))
    return groups


def factor(scaling: Mapping[str, float], member: str, group: str) -> float | None:
    """A member's factor in a group, also where it has one factor for all weights; None where it has neither."""
    return scaling.get(f"{member}{GROUP}{group}", scaling.get(member))


def collapsed(scaling: Mapping[str, float]) -> dict[str, float]:
    """Scaling factors that have every weight, with one key of a member whose groups all have the same factor."""
    plain: dict[str, float | Mapping[str, float]] = {}
    for member, factors in nested(scaling).items():
        same = isinstance(factors, dict) and len(set(factors.values())) == 1
        plain[member] = next(iter(factors.values())) if isinstance(factors, dict) and same else factors
    return flat(plain)


@lru_cache(maxsize=64)  # a search asks for the same groups again and again, with other factors
def _groups(names: tuple[str, ...], keys: tuple[str, ...]) -> Groups:
    members: dict[str, list[tuple[str, str]]] = {}
    for key in keys:
        member, _, group = key.partition(GROUP)
        members.setdefault(member, []).append((group, key))
    by_groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for name in names:
        own = tuple((member, _key(member, groups, name)) for member, groups in members.items())
        by_groups.setdefault(own, []).append(name)
    return tuple((tuple(own), keys) for keys, own in by_groups.items())


def _key(member: str, groups: Sequence[tuple[str, str]], name: str) -> str:
    """The key of a member's factor for a weight."""
    if len(groups) > 1 and any(key == member for _, key in groups):
        raise MethodError(
            f"scaling factors of '{member}': it has one for all weights and one for a group; write '{member}{GROUP}{REST}' "
            f"for the rest"
        )
    chosen = [key for group, key in groups if key == member or (group != REST and _matcher(group)(name))]
    chosen = chosen or [key for group, key in groups if group == REST]
    if not chosen:
        raise MethodError(
            f"the weight '{name}' has no scaling factor of '{member}': add '{member}{GROUP}{REST}' for the rest"
        )
    if len(chosen) > 1:
        raise MethodError(
            f"the weight '{name}' has two scaling factors of '{member}', '{chosen[0]}' and '{chosen[1]}': groups of a member "
            f"must have no weight in common"
        )
    return chosen[0]


@lru_cache(maxsize=4096)
def _matcher(group: str) -> Callable[[str], bool]:
    """Whether a name belongs to a group.

    Raises:
        MethodError: The group is written wrong.
    """
    if not group.startswith(LAYERS):
        if not group:
            raise MethodError(f"a scaling factor names no group after '{GROUP}': write a pattern, 'layers:0-2' or '*'")
        return partial(_fits, pattern=group)
    match = re.fullmatch(r"(\d+)(?:(-)(\d*))?", group.removeprefix(LAYERS))
    first = int(match[1]) if match else 0
    last = first if match and not match[2] else float(match[3] or inf) if match else -1
    if last < first:
        raise MethodError(f"'{group}' names no layers: write 'layers:3', 'layers:0-2', or 'layers:9-' to the end")
    return lambda name: first <= depth(name) <= last


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern)

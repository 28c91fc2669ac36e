"""One member's factors, weight by weight, written as a recipe's groups of weights."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from glob import escape

from merging.methods.depth import NUMBER, depth


def grouped(factors: Mapping[str, float], filters: Sequence[str]) -> float | dict[str, float]:
    """One factor, or groups of weights that have every weight once.

    Args:
        factors: Weight → factor.
        filters: Parts of names that mergekit's file chooses weights by, in its order.
    """
    values = set(factors.values())
    if len(values) == 1:
        return values.pop()
    return _by_layer(factors) or by_pattern(factors, filters) or _by_layer_and_pattern(factors, filters)


def _by_layer(factors: Mapping[str, float]) -> dict[str, float] | None:
    """Groups of layers; None if weights of one layer have different factors."""
    layers: dict[float, set[float]] = {}
    for name, factor in factors.items():
        layers.setdefault(depth(name), set()).add(factor)
    if any(len(own) > 1 for own in layers.values()):
        return None
    after = layers.pop(math.inf, None)
    groups = {f"layers:{layer}": layers[layer].pop() for layer in sorted(layers)}
    return groups | ({"*": after.pop()} if after else {})


def by_pattern(factors: Mapping[str, float], filters: Sequence[str]) -> dict[str, float] | None:
    """One group per filter, and one for the rest; None if that does not say all."""
    groups: dict[str, float] = {}
    rest = dict(factors)
    for text in filters:
        own = {name for name in factors if text in name}
        if not own:
            continue
        if not own <= rest.keys() or len({factors[name] for name in own}) > 1:
            return None
        groups[f"*{escape(text)}*"] = factors[min(own)]
        rest = {name: factor for name, factor in rest.items() if name not in own}
    if len(set(rest.values())) > 1:
        return None
    return groups | ({"*": next(iter(rest.values()))} if rest else {})


def _by_layer_and_pattern(factors: Mapping[str, float], filters: Sequence[str]) -> dict[str, float]:
    """One group per filter and layer where these are apart, single names for what is left, and the rest."""
    groups: dict[str, float] = {}
    rest = dict(factors)
    for text in filters:
        layers: dict[str, set[str]] = {}
        for name in rest:
            if text in name and (number := NUMBER.search(name)):
                layers.setdefault(number[1], set()).add(name)
        for layer, own in layers.items():
            pattern = f"*.{layer}.*{escape(text)}*"
            if own == {name for name in factors if fnmatchcase(name, pattern)} and len({factors[n] for n in own}) == 1:
                groups[pattern] = factors[min(own)]
                rest = {name: factor for name, factor in rest.items() if name not in own}
    if rest:
        usual = Counter(rest.values()).most_common(1)[0][0]
        groups |= {escape(name): factor for name, factor in rest.items() if factor != usual}
        groups["*"] = usual
    return groups

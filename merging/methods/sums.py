"""Merges that are one weighted sum of base and members, the same for every weight."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from merging.methods.base import Prepared, Weight
from merging.methods.blocks import Scratch, target, weighted_sum
from merging.methods.checks import check_weights, chosen
from merging.recipe import Value

Factors: TypeAlias = Callable[
    [Mapping[str, float], Sequence[str], Mapping[str, Value]], tuple[float | None, Mapping[str, float]]
]
"""Scaling factors, members that take part and parameters to the base's factor (None: it has no part) and the members'."""


class WeightedSum(Prepared):
    """References to base and members, in their stored dtype: nothing is copied.

    Args:
        weights: Some of the pool's weights.
        factors: What a candidate multiplies base and members by.
    """

    def __init__(self, weights: Sequence[Weight], factors: Factors) -> None:
        self._members = check_weights(weights)
        self._weights = tuple(weights)
        self._factors = factors
        self._scratch = Scratch()

    @torch.no_grad()
    def merge(self, scaling: Mapping[str, float], parameters: Mapping[str, Value], out: Mapping[str, Tensor]) -> None:
        """One pass over the stored weights."""
        members = chosen(scaling, self._members)
        rest, factors = self._factors(scaling, members, parameters)
        for weight in self._weights:
            base = [] if rest is None else [(weight.base, rest)]
            terms = [*base, *((weight.members[member], factors[member]) for member in members)]
            weighted_sum(terms, target(out, weight), self._scratch)

"""Merges that are one weighted sum of base and members, the same for every weight."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from merging.kernels.blockwise import Scratch, weighted_sum
from merging.methods.checks import check_weights, chosen, target
from merging.methods.method import Prepared, Weight
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


def mean_step(
    weights: Sequence[Weight], factors: Mapping[str, float], out: Mapping[str, Tensor], scratch: Scratch
) -> None:
    """Writes θ_0 + Σ α_t τ_t / T of every weight, α_t by member; at α_t = 1 the plain mean."""
    shares = {member: factor / len(factors) for member, factor in factors.items()}
    rest = 1.0 - sum(shares.values())
    for weight in weights:
        terms = [(weight.members[member], share) for member, share in shares.items()]
        weighted_sum([*terms, (weight.base, rest if abs(rest) > 1e-12 else 0.0)], target(out, weight), scratch)

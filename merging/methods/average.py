"""The plain weighted mean of the members' weights (model soup): Σ w_t θ_t with Σ w_t = 1."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from merging.errors import MethodError
from merging.methods.base import Context, Method, Parameter, Prepared, Weight, register
from merging.methods.blocks import Scratch, target, weighted_sum
from merging.methods.checks import check_weights, chosen
from merging.recipe import Value


def shares(scaling: Mapping[str, float], members: Sequence[str]) -> dict[str, float]:
    """The scaling factors of `members`, in their order, as weights that sum to 1.

    Raises:
        MethodError: They cancel.
    """
    total = sum(scaling[member] for member in members)
    if abs(total) <= 1e-6 * sum(map(abs, scaling.values())):
        raise MethodError(
            f"the scaling factors of {', '.join(sorted(scaling))} sum to {total:g}: a mean needs a sum other than 0"
        )
    return {member: scaling[member] / total for member in members}


@register
class Average(Method):
    """Weighted mean (Wortsman et al. 2022, model soups)."""

    name = "average"
    summary = "weighted mean of the members"
    scale_free = True
    scaling = Parameter(1.0, "relative weight; normalised to sum 1", low=0.0, high=1.0)
    parameters: ClassVar[Mapping[str, Parameter]] = {}

    def prepare(self, weights: Sequence[Weight], context: Context) -> Prepared:
        """Keeps references to the members' weights, in their stored dtype."""
        return PreparedAverage(weights)


class PreparedAverage(Prepared):
    """Members' weights as they are stored."""

    def __init__(self, weights: Sequence[Weight]) -> None:
        self._members = check_weights(weights)
        self._weights = tuple(weights)
        self._scratch = Scratch()

    @torch.no_grad()
    def merge(self, scaling: Mapping[str, float], parameters: Mapping[str, Value], out: Mapping[str, Tensor]) -> None:
        """One pass over the members' weights."""
        members = chosen(scaling, self._members)
        factors = shares(scaling, members)
        for weight in self._weights:
            terms = [(weight.members[member], factors[member]) for member in members]
            weighted_sum(terms, target(out, weight), self._scratch)

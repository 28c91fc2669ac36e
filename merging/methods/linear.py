"""Weighted sum of the members' weights, Σ w_t θ_t: normalised only when asked."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from merging.methods.average import shares
from merging.methods.base import Context, Method, Parameter, Prepared, Weight, register
from merging.methods.blocks import Scratch, target, weighted_sum
from merging.methods.checks import check_weights, chosen
from merging.recipe import Recipe, Value


@register
class Linear(Method):
    """Σ w_t θ_t; with weights that do not sum to 1, the merged model shrinks or grows as a whole."""

    name = "linear"
    summary = "weighted sum of the members"
    scaling = Parameter(1.0, "weight of the member (1 / members in the default recipe)", low=0.0, high=1.0)
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "normalize": Parameter(False, "divide the weights by their sum", choices=(False, True), search=False),
    }

    def prepare(self, weights: Sequence[Weight], context: Context) -> Prepared:
        """Keeps references to the members' weights, in their stored dtype."""
        return PreparedLinear(weights)

    def default_recipe(self, members: Sequence[str]) -> Recipe:
        """Equal weights that sum to 1."""
        return Recipe(self.name, dict.fromkeys(members, 1.0 / len(members)), {"normalize": False})


class PreparedLinear(Prepared):
    """Members' weights as they are stored."""

    def __init__(self, weights: Sequence[Weight]) -> None:
        self._members = check_weights(weights)
        self._weights = tuple(weights)
        self._scratch = Scratch()

    @torch.no_grad()
    def merge(self, scaling: Mapping[str, float], parameters: Mapping[str, Value], out: Mapping[str, Tensor]) -> None:
        """One pass over the members' weights."""
        members = chosen(scaling, self._members)
        factors = shares(scaling, members) if parameters["normalize"] else scaling
        for weight in self._weights:
            terms = [(weight.members[member], factors[member]) for member in members]
            weighted_sum(terms, target(out, weight), self._scratch)

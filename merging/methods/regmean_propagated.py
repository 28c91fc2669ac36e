"""RegMean propagated: a solution that was found by running the members, scaled as a whole."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from merging.errors import MethodError
from merging.methods.base import Context, Method, Parameter, Prepared, Weight, register
from merging.methods.blocks import Scratch, target, weighted_sum
from merging.methods.checks import check_weights
from merging.recipe import Value


@register
class RegMeanPropagated(Method):
    """θ_0 + f (θ* − θ_0), θ* the layer-by-layer solution of `merging.propagation` for these very members.

    The solution is dear (it runs every member and the merged model), and is computed once as a statistics file of the kind
    `propagated`; a candidate costs one weighted sum. Scaling factors of members have no part in it and stay at 1.
    """

    name = "regmean_propagated"
    summary = "least squares, layer by layer, on the inputs that the merged model delivers"
    solution = "propagated"
    scaling = Parameter(1.0, "no part in the solution", minimum=1.0, maximum=1.0, search=False)
    scale_free = True
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "factor": Parameter(1.0, "scale of the whole merge's distance from the base", low=0.7, high=1.3)
    }

    def prepare(self, weights: Sequence[Weight], context: Context) -> Prepared:
        """Keeps references to base and solutions."""
        check_weights(weights)
        return PreparedRegMeanPropagated(weights)


class PreparedRegMeanPropagated(Prepared):
    """Base and solutions, as they are stored."""

    def __init__(self, weights: Sequence[Weight]) -> None:
        self._weights = tuple(weights)
        self._scratch = Scratch()

    @torch.no_grad()
    def merge(self, scaling: Mapping[str, float], parameters: Mapping[str, Value], out: Mapping[str, Tensor]) -> None:
        """One pass over base and solution.

        Raises:
            MethodError: There is no solution for these members.
        """
        subset = "+".join(sorted(scaling))
        factor = float(parameters["factor"])
        for weight in self._weights:
            found = weight.statistics.get("propagated", {}).get(subset)
            if found is None:
                raise MethodError(
                    f"'{weight.name}' has no propagated solution for {subset}: compute it for these members"
                )
            terms = [(found, factor)] if factor == 1.0 else [(weight.base, 1.0 - factor), (found, factor)]
            weighted_sum(terms, target(out, weight), self._scratch)

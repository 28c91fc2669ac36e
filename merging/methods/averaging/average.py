"""The plain weighted mean of the members' weights (model soup): Σ w_t θ_t with Σ w_t = 1."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from merging.errors import MethodError
from merging.methods.averaging.weighted_sum import WeightedSum
from merging.methods.method import Context, Method, Parameter, Prepared, Weight, register


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
    elementwise = True
    scaling = Parameter(1.0, "relative weight; normalised to sum 1", low=0.0, high=1.0)
    parameters: ClassVar[Mapping[str, Parameter]] = {}

    def prepare(self, weights: Sequence[Weight], context: Context) -> Prepared:
        """Keeps references to the members' weights, in their stored dtype."""
        return WeightedSum(weights, lambda scaling, members, parameters: (None, shares(scaling, members)))

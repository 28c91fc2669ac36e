"""Weighted sum of the members' weights, Σ w_t θ_t: normalised only when asked."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from merging.methods.averaging.average import shares
from merging.methods.averaging.weighted_sum import WeightedSum
from merging.methods.method import Context, Method, Parameter, Prepared, Weight, register
from merging.recipe import Recipe


@register
class Linear(Method):
    """Σ w_t θ_t; with weights that do not sum to 1, the merged model shrinks or grows as a whole."""

    name = "linear"
    summary = "weighted sum of the members"
    elementwise = True
    scaling = Parameter(1.0, "weight of the member (1 / members where nothing is said)", low=0.0, high=1.0)
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "normalize": Parameter(False, "divide the weights by their sum", choices=(False, True), search=False),
    }

    def prepare(self, weights: Sequence[Weight], context: Context) -> Prepared:
        """Keeps references to the members' weights, in their stored dtype."""
        return WeightedSum(
            weights,
            lambda scaling, members, parameters: (
                None,
                shares(scaling, members) if parameters["normalize"] else scaling,
            ),
        )

    def default_recipe(self, members: Sequence[str], model_type: str = "") -> Recipe:
        """Equal weights that sum to 1."""
        return Recipe(self.name, dict.fromkeys(members, 1.0 / len(members)), {"normalize": False})

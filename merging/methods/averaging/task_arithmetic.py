"""Task arithmetic: θ_0 + Σ α_t (θ_t − θ_0)."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from merging.methods.averaging.weighted_sum import WeightedSum
from merging.methods.method import Context, Method, Parameter, Prepared, Weight, register
from merging.recipe import Value


@register
class TaskArithmetic(Method):
    """Sum of scaled task vectors (Ilharco et al. 2023); negative factors remove a task."""

    name = "task_arithmetic"
    summary = "base plus scaled task vectors"
    elementwise = True
    scaling = Parameter(0.3, "scale of the member's task vector", low=0.0, high=1.5)
    parameters: ClassVar[Mapping[str, Parameter]] = {}

    def is_linear(self, parameters: Mapping[str, Value]) -> bool:
        """Always."""
        return True

    def prepare(self, weights: Sequence[Weight], context: Context) -> Prepared:
        """Keeps references to base and members, in their stored dtype.

        The merge is computed as (1 − Σ α_t) θ_0 + Σ α_t θ_t: the same number, without task vectors to keep, and
        exactly θ_t for one member at α = 1.
        """
        return WeightedSum(
            weights,
            lambda scaling, members, parameters: (1.0 - sum(scaling[member] for member in members), scaling),
        )

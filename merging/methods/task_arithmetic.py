"""Task arithmetic: θ_0 + Σ α_t (θ_t − θ_0)."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from merging.methods.base import Context, Method, Parameter, Prepared, Weight, register
from merging.methods.blocks import Scratch, target, weighted_sum
from merging.methods.checks import check_weights, chosen
from merging.recipe import Value


@register
class TaskArithmetic(Method):
    """Sum of scaled task vectors (Ilharco et al. 2023); negative factors remove a task."""

    name = "task_arithmetic"
    summary = "base plus scaled task vectors"
    scaling = Parameter(0.3, "scale of the member's task vector", low=0.0, high=1.5)
    parameters: ClassVar[Mapping[str, Parameter]] = {}

    def prepare(self, weights: Sequence[Weight], context: Context) -> Prepared:
        """Keeps references to base and members, in their stored dtype."""
        return PreparedTaskArithmetic(weights)


class PreparedTaskArithmetic(Prepared):
    """Base and members as they are stored.

    The merge is computed as (1 − Σ α_t) θ_0 + Σ α_t θ_t: the same number, without task vectors to keep, and
    exactly θ_t for one member at α = 1.
    """

    def __init__(self, weights: Sequence[Weight]) -> None:
        self._members = check_weights(weights)
        self._weights = tuple(weights)
        self._scratch = Scratch()

    @torch.no_grad()
    def merge(self, scaling: Mapping[str, float], parameters: Mapping[str, Value], out: Mapping[str, Tensor]) -> None:
        """One pass over base and members."""
        members = chosen(scaling, self._members)
        rest = 1.0 - sum(scaling[member] for member in members)
        for weight in self._weights:
            terms = [(weight.base, rest), *((weight.members[member], scaling[member]) for member in members)]
            weighted_sum(terms, target(out, weight), self._scratch)

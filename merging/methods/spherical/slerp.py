"""SLERP: two members, joined by an arc instead of a line in every tensor."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from merging.errors import MethodError
from merging.methods.method import Parameter, register
from merging.methods.spherical.interpolation import PARALLEL, Spherical, around_base
from merging.recipe import Recipe, Value


def arc(first: float, second: float, product: float, t: float) -> tuple[float, float]:
    """Weights of two vectors on the way from the first (t = 0) to the second, from their lengths and inner product."""
    if first <= 0 or second <= 0:
        return 1 - t, t
    cosine = torch.tensor(product / (first * second), dtype=torch.float64).clamp(-1, 1)
    if abs(float(cosine)) > PARALLEL:
        return 1 - t, t
    angle = torch.arccos(cosine)
    return float(torch.sin((1 - t) * angle) / torch.sin(angle)), float(torch.sin(t * angle) / torch.sin(angle))


@register
class Slerp(Spherical):
    """Spherical interpolation of two members, tensor by tensor (Shoemake 1985); t is the second's share.

    In `weights`, members of one base lie so close that the arc is nearly a line; in `task_vectors` it is one around
    the base.
    """

    name = "slerp"
    summary = "spherical interpolation of two members"
    most_members = 2
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "space": Parameter("weights", "what is interpolated", choices=("weights", "task_vectors"), search=False),
    }

    def complete(self, recipe: Recipe, model_type: str = "") -> Recipe:
        """See `Method.complete`.

        Raises:
            MethodError: There is one member, with a factor that would change nothing.
        """
        complete = super().complete(recipe, model_type)
        if len(complete.members) == 1 and any(factor != 1.0 for factor in complete.scaling.values()):
            raise MethodError(
                f"slerp goes from one member to another, and '{complete.members[0]}' is alone: its factor would change "
                "nothing. Name a second member, or scale one by task_arithmetic"
            )
        return complete

    def coefficients(self, products: Tensor, shares: Tensor, parameters: Mapping[str, Value]) -> Tensor:
        """Of the arc between two vectors.

        Raises:
            MethodError: There are more than two.
        """
        if len(shares) > 2:
            raise MethodError(f"slerp is between two members, not {len(shares)}: use multi_slerp")
        if len(shares) == 1:
            return around_base(shares)
        whole = parameters["space"] == "weights"
        if whole:
            turn = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
            products = turn @ products @ turn.T
        first, second = products.diagonal()[:2].clamp(min=0).sqrt().tolist()
        factors = arc(first, second, float(products[0, 1]), float(shares[1]))
        if whole:
            return torch.tensor([*factors, 0.0], dtype=torch.float64)
        return around_base(torch.tensor(factors, dtype=torch.float64))

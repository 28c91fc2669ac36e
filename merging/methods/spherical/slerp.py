"""SLERP: two members, joined by an arc instead of a line in every tensor."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from merging.errors import MethodError
from merging.methods.method import Parameter, register
from merging.methods.spherical.interpolation import PARALLEL, Spherical, around_base, of_weights
from merging.recipe import Recipe, Value


def arc(products: Tensor, t: Tensor, line: float) -> Tensor:
    """Weights of two vectors [..., 2] on the way from the first (t = 0) to the second.

    Args:
        products: Their inner products [..., 2, 2], float64.
        t: Scalar.
        line: Cosine above which an arc is taken for a line; so it is between opposite vectors, which no arc joins.
    """
    lengths = products.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    both = lengths.prod(-1)
    cosine = (products[..., 0, 1] / both.clamp(min=1e-300)).clamp(-1, 1)
    straight = (both <= 0) | (cosine > line) | (cosine < -PARALLEL)
    angle = torch.arccos(torch.where(straight, 0.0, cosine))
    ways = torch.stack([1 - t, t])
    return torch.where(straight[..., None], ways, torch.sin(ways * angle[..., None]) / torch.sin(angle)[..., None])


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
    line: ClassVar[float] = PARALLEL
    """Cosine above which the arc is taken for a line."""

    def complete(self, recipe: Recipe, model_type: str = "") -> Recipe:
        """See `Method.complete`.

        Raises:
            MethodError: There is one member, with a factor that would change nothing.
        """
        complete = super().complete(recipe, model_type)
        if len(complete.members) == 1 and any(factor != 1.0 for factor in complete.scaling.values()):
            raise MethodError(
                f"{self.name} goes from one member to another, and '{complete.members[0]}' is alone: its factor would "
                "change nothing. Name a second member, or scale one by task_arithmetic"
            )
        return complete

    def coefficients(self, products: Tensor, shares: Tensor, parameters: Mapping[str, Value]) -> Tensor:
        """Of the arc between two vectors.

        Raises:
            MethodError: There are more than two.
        """
        if len(shares) > 2:
            raise MethodError(f"{self.name} is between two members, not {len(shares)}: use multi_slerp")
        if len(shares) == 1:
            return around_base(shares.expand(*products.shape[:-2], 1))
        whole = parameters["space"] == "weights"
        if whole:
            products = of_weights(products)
        factors = arc(products[..., :2, :2], shares[1], self.line)
        if whole:
            return torch.cat([factors, torch.zeros_like(factors[..., :1])], dim=-1)
        return around_base(factors)

"""Multi-SLERP: the spherical mean of any number of task vectors."""

from collections.abc import Mapping

import torch
from torch import Tensor

from merging.errors import MethodError
from merging.methods.method import register
from merging.methods.spherical.interpolation import PARALLEL, Spherical, around_base
from merging.recipe import Value

STEPS = 50
"""Most iterations of a Karcher mean; it converges in a handful."""


@register
class MultiSlerp(Spherical):
    """Karcher mean of the task vectors' directions, tensor by tensor, at their mean length (Karcher 1977).

    The mean lies in the span of the task vectors, so that its iterations run on coefficients, not on weights. Where two
    task vectors are opposite no arc joins them, and the mean is the linear one.
    """

    name = "multi_slerp"
    summary = "spherical mean of the task vectors"

    def coefficients(self, products: Tensor, shares: Tensor, parameters: Mapping[str, Value]) -> Tensor:
        """Of the point on the sphere to which the weighted sum of all arcs is 0.

        Raises:
            MethodError: A negative weight, with which there is no such point.
        """
        return around_base(on_sphere(products[:-1, :-1], shares, self.name))


def on_sphere(products: Tensor, shares: Tensor, method: str) -> Tensor:
    """Coefficients of vectors whose sum has their mean direction and length; the linear mean's where two are opposite.

    Args:
        products: Inner products of the vectors [T, T], float64.
        shares: Their weights [T], sum 1.
        method: Name of the method, for an error message.

    Raises:
        MethodError: A negative weight, with which there is no mean.
    """
    if (shares < 0).any():
        raise MethodError(f"{method} has no mean with negative scaling factors: use factors ≥ 0")
    lengths = products.diagonal().clamp(min=0).sqrt()
    moved = (lengths > 0) & (shares > 0)
    cosines = products[moved][:, moved] / lengths[moved] / lengths[moved][:, None]
    if not moved.any() or cosines.min() < -PARALLEL:
        return shares
    point = karcher_mean(cosines, shares[moved] / shares[moved].sum())
    factors = torch.zeros_like(shares)
    factors[moved] = point * (shares * lengths).sum() / lengths[moved]
    return factors


def karcher_mean(cosines: Tensor, shares: Tensor) -> Tensor:
    """The weighted mean of directions on a sphere, in coefficients of these directions.

    Args:
        cosines: Inner products of the unit vectors [T, T], float64.
        shares: Their weights [T], sum 1.
    """
    point = shares
    point = point / (point @ cosines @ point).clamp(min=1e-12).sqrt()
    for _ in range(STEPS):
        cosine = (cosines @ point).clamp(-1, 1)
        angle = torch.arccos(cosine)
        # An arc's logarithm is angle / sin(angle) times what is orthogonal to the point; the limit for no angle is 1.
        pull = shares * torch.where(angle > 1e-8, angle / torch.sin(angle).clamp(min=1e-12), 1.0)
        step = pull - (pull @ cosine) * point
        size = (step @ cosines @ step).clamp(min=0).sqrt()
        if size < 1e-12:
            break
        point = torch.cos(size) * point + torch.sin(size) * step / size
    return point

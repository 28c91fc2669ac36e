"""Karcher: the spherical mean of the members' weights about the origin."""

from collections.abc import Mapping

import torch
from torch import Tensor

from merging.methods.method import register
from merging.methods.spherical.interpolation import Spherical, of_weights
from merging.methods.spherical.multi_slerp import on_sphere
from merging.recipe import Value


@register
class Karcher(Spherical):
    """Karcher mean of the weights' directions, tensor by tensor, at their mean length (Karcher 1977; mergekit's `karcher`).

    The sphere is about the origin, where `multi_slerp`'s is about the base: members of one base lie so close together on it
    that the mean is nearly the linear one, of a slightly greater length. Iterated to convergence, not ten times. Where two
    weights are opposite no arc joins them, and the mean is the linear one.
    """

    name = "karcher"
    summary = "spherical mean of the members about the origin"

    def coefficients(self, products: Tensor, shares: Tensor, parameters: Mapping[str, Value]) -> Tensor:
        """Of the point on the sphere to which the weighted sum of all arcs is 0; the base has no part.

        Raises:
            MethodError: A negative weight, with which there is no such point.
        """
        factors = on_sphere(of_weights(products)[:-1, :-1], shares, self.name)
        return torch.cat([factors, torch.zeros_like(shares[:1])])

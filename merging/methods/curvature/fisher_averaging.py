"""Fisher averaging: each entry's mean over the members, weighted by how much their losses depend on it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from merging.errors import MethodError
from merging.methods.averaging.average import shares
from merging.methods.checks import chosen
from merging.methods.curvature.diagonal import Curvature, Diagonal
from merging.methods.curvature.moments import Moments, combine_moments, moments
from merging.methods.method import Context, Method, Parameter, Prepared, Weight, register
from merging.recipe import Value

FLOOR = 1e-6
"""Relative to the mean Fisher of the members that take part: an entry that none of them uses becomes the
plain mean."""


@register
class FisherAveraging(Method):
    """θ = Σ α_t F̂_t θ_t / Σ α_t F̂_t, elementwise (Matena and Raffel 2022, equation 5).

    F̂_t = max(F_t, floor), with one floor for all members; weights without Fisher information have the floor.
    """

    name = "fisher"
    summary = "mean weighted by diagonal Fisher information"
    scale_free = True
    requires = ("fisher",)
    elementwise = True
    scaling = Parameter(1.0, "the member's weight beside its Fisher information", low=0.0, high=1.5)
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "normalize": Parameter(
            False,
            "divide each member's Fisher by its norm over the whole model",
            choices=(False, True),
            search=False,
        ),
    }

    def global_pass(self, weights: Iterable[Weight]) -> Moments:
        """Sums of each member's Fisher and of its square, in float64."""
        return moments(weights, "fisher")

    def combine(self, first: Moments, second: Moments) -> Moments:
        """Sums add up."""
        return combine_moments(first, second)

    def prepare(self, weights: Sequence[Weight], context: Context) -> Prepared:
        """Keeps references to base, members and statistics.

        Raises:
            MethodError: A Fisher is missing, negative, not finite, zero everywhere, or of another shape.
        """
        return PreparedFisher(
            weights, self.global_pass(weights) if context.global_stats is None else context.global_stats
        )


class PreparedFisher(Prepared):
    """Base, members and their Fisher information, as they are stored.

    Args:
        weights: The weights to merge.
        global_stats: Sums over the whole model.
    """

    def __init__(self, weights: Sequence[Weight], global_stats: Moments) -> None:
        self._diagonal = Diagonal(weights)
        self._global_stats = global_stats
        for member in self._diagonal.members:
            if member not in global_stats or not global_stats[member].total > 0:
                raise MethodError(
                    f"{member}: its Fisher information is missing or zero everywhere. Compute the fisher "
                    "statistic of this member on data of its task"
                )

    @torch.no_grad()
    def merge(self, scaling: Mapping[str, float], parameters: Mapping[str, Value], out: Mapping[str, Tensor]) -> None:
        """One pass over base, members and Fisher information.

        Raises:
            MethodError: Scaling factors that cancel.
        """
        members = chosen(scaling, self._diagonal.members)
        factors = list(shares(scaling, members).values())
        sums = [self._global_stats[member] for member in members]
        scales = [1.0 / moment.norm if parameters["normalize"] else 1.0 for moment in sums]
        floor = FLOOR * sum(scale * moment.mean for scale, moment in zip(scales, sums, strict=True)) / len(members)
        # In units of the floor, so that neither tiny nor huge Fisher information leaves the range of float32.
        scales = [scale / floor for scale in scales]
        self._diagonal.merge(Curvature(members, factors, scales, floor=1.0), out)

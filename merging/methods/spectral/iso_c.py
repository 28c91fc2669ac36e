"""Iso-C: the sum of task vectors, made equally strong in all of its directions."""

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from merging.methods.method import Context, Method, Parameter, Prepared, Weight, register
from merging.methods.spectral.singular_vectors import EMBEDDINGS, PreparedSpectral, polar
from merging.recipe import Value


@register
class IsoC(Method):
    """θ_0 + σ̄ U Vᵀ for every matrix, U Σ Vᵀ = Σ α_t τ_t and σ̄ the mean of Σ (Marczak et al. 2025, algorithm 1).

    A factor shared by all members scales the result, so that it is the paper's α as well. With `rank` < 1 only the
    strongest directions stay. What is no matrix is the members' mean, θ_0 + Σ α_t τ_t / T.
    """

    name = "iso_c"
    summary = "sum of task vectors with a flat spectrum"
    flat = True
    scaling = Parameter(1.0, "weight of the member's task vector in the sum", low=0.0, high=3.0)
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "rank": Parameter(
            1.0,
            "share of the directions, the strongest, that stay",
            low=0.1,
            high=1.0,
            minimum=0.0,
            maximum=1.0,
            search=False,
        ),
        "embeddings": EMBEDDINGS,
    }

    def prepare(self, weights: Sequence[Weight], context: Context) -> Prepared:
        """Keeps references to base and members: the directions are those of a candidate's own sum.

        Candidates of one shared factor only scale what the first of these members moved by.
        """
        return PreparedIsoC(weights)


class PreparedIsoC(PreparedSpectral):
    """Base and members as they are stored."""

    def steps(
        self, index: int, scalings: Sequence[Mapping[str, float]], parameters: Mapping[str, Value]
    ) -> Iterator[Tensor]:
        """σ̄ U Vᵀ of every scaling's sum."""
        batch = self.batches[index]
        rank = max(round(float(parameters["rank"]) * batch.rank), 1)
        for factors in scalings:
            factor, mean = polar(batch.moved(factors, self.scratch), rank)
            yield factor.mul_(mean[:, None, None])

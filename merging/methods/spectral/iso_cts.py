"""Iso-CTS: Iso-C whose weakest directions give place to those that each member has for itself."""

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from merging.methods.method import Context, Method, Parameter, Prepared, Weight, register
from merging.methods.spectral.singular_vectors import EMBEDDINGS, PreparedSpectral, mean_size, norms, polar, triples
from merging.recipe import Value


@register
class IsoCts(Method):
    """θ_0 + σ̄ polar(U) polar(V)ᵀ for every matrix [out, in] (Marczak et al. 2025, algorithm 2), polar(A) = P Qᵀ of A = P Σ Qᵀ.

    U and V have the first k singular vectors U_c, V_c of Σ α_t τ_t and, of each of T members, the first (r − k) / T of
    α_t τ_t − U_c U_cᵀ α_t τ_t, r = min(out, in); k is `common` r, rounded so that T divides r − k. σ̄ is the mean of all
    their singular values but those that are rounding. A factor shared by all members scales the result. What is no
    matrix is the members' mean, θ_0 + Σ α_t τ_t / T.
    """

    name = "iso_cts"
    summary = "flat spectrum in common and task-specific directions"
    extras = ("layout",)
    flat = True
    scaling = Parameter(1.0, "weight of the member's task vector", low=0.0, high=3.0)
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "common": Parameter(
            0.8,
            "share of the directions that all members have in common",
            low=0.5,
            high=1.0,
            minimum=0.0,
            maximum=1.0,
        ),
        "embeddings": EMBEDDINGS,
    }

    def prepare(self, weights: Sequence[Weight], context: Context) -> Prepared:
        """Keeps references to base and members: the directions are those of a candidate's own sum.

        Candidates of one shared factor only scale what the first of these members moved by.
        """
        return PreparedIsoCts(weights)


def common_directions(rank: int, members: int, share: float) -> int:
    """k: `share` of the rank, so that the rest is the same number for each member."""
    return rank - round((rank - int(share * rank)) / members) * members


class PreparedIsoCts(PreparedSpectral):
    """Base and members as they are stored."""

    oriented = True

    def steps(
        self, index: int, scalings: Sequence[Mapping[str, float]], parameters: Mapping[str, Value]
    ) -> Iterator[Tensor]:
        """σ̄ polar(U) polar(V)ᵀ of every scaling."""
        batch = self.batches[index]
        for factors in scalings:
            first = max(common_directions(batch.rank, len(factors), float(parameters["common"])), 0)
            each = (batch.rank - first) // len(factors)
            common, sizes, others = (part[..., :first] for part in triples(batch.moved(factors, self.scratch)))
            lefts, values, rights = [common], [sizes], [others]
            for member, factor in factors.items() if each else ():
                alone = batch.moved({member: factor}, self.scratch)
                left, size, right = triples(alone - common @ (common.mT @ alone), norms(alone))
                lefts.append(left[..., :each])
                values.append(size[..., :each])
                rights.append(right[..., :each])
            left, size, right = torch.cat(lefts, dim=2), torch.cat(values, dim=1), torch.cat(rights, dim=2)
            yield polar(left)[0] * mean_size(size)[:, None, None] @ polar(right)[0].mT

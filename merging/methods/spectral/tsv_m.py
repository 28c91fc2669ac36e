"""TSV-M: each task vector's strongest singular vectors, made orthogonal to those of the others."""

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from merging.methods.method import Context, Method, Parameter, Prepared, Weight, register
from merging.methods.spectral.singular_vectors import EMBEDDINGS, PreparedSpectral, directions, inverse, polar
from merging.recipe import Value


@register
class TsvM(Method):
    """θ_0 + Û Σ V̂ᵀ for every matrix (Gargiulo et al. 2025, algorithm 1).

    U, Σ and V have the first n / T singular vectors and values of every task vector side by side, values times α_t; Û
    and V̂ are the nearest matrices with orthogonal columns (Procrustes). `rank` < 1 takes fewer of each. What is no
    matrix is the members' mean, θ_0 + Σ α_t τ_t / T.
    """

    name = "tsv_m"
    summary = "strongest singular vectors of every member, decorrelated"
    scaling = Parameter(1.0, "scale of the member's singular values", low=0.0, high=1.5)
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "rank": Parameter(
            1.0,
            "share of the rank that all members fill together, in equal parts",
            low=0.1,
            high=1.0,
            minimum=0.0,
            maximum=1.0,
        ),
        "embeddings": EMBEDDINGS,
    }

    def is_linear(self, parameters: Mapping[str, Value]) -> bool:
        """Always: what is made orthogonal does not depend on the scaling factors."""
        return True

    def prepare(self, weights: Sequence[Weight], context: Context) -> Prepared:
        """Keeps references; a candidate takes apart the matrices of members that none had before.

        That keeps n² + n float64 numbers a matrix [m, n], m ≥ n, and a member. What members move by, each or together, is
        kept for the latest members and rank, so that candidates of other factors are one weighted sum.
        """
        return PreparedTsvM(weights)


class PreparedTsvM(PreparedSpectral):
    """Base and members as they are stored; of each that was asked for, singular values and right singular vectors.

    Args:
        weights: The weights to merge.
    """

    def __init__(self, weights: Sequence[Weight]) -> None:
        super().__init__(weights)
        self._directions: list[dict[str, tuple[Tensor, Tensor]]] = [{} for _ in self.batches]

    def is_sum(self, parameters: Mapping[str, Value]) -> bool:
        """Always."""
        return True

    def steps(
        self, index: int, scalings: Sequence[Mapping[str, float]], parameters: Mapping[str, Value]
    ) -> Iterator[Tensor]:
        """Û Σ V̂ᵀ = U (UᵀU)^-½ Σ (VᵀV)^-½ Vᵀ, with U_t = τ_t V_t Σ_t⁻¹; Û and V̂ are the same for every scaling."""
        batch, members = self.batches[index], list(scalings[0])
        each = max(int(float(parameters["rank"]) * batch.rank / len(members)), 1)
        lefts, rights, sizes = [], [], []
        for member in members:
            moved = batch.moved({member: 1.0}, self.scratch)
            if member not in self._directions[index]:
                self._directions[index][member] = directions(moved)
            values, vectors = (part[..., :each] for part in self._directions[index][member])
            lefts.append(moved @ (vectors * inverse(values)[:, None, :]))
            rights.append(vectors * (values > 0)[:, None, :])
            sizes.append(values)
        left, right = (polar(torch.cat(parts, dim=2))[0] for parts in (lefts, rights))
        size = torch.cat(sizes, dim=1)
        for factors in scalings:
            scale = size.new_tensor([factors[member] for member in members]).repeat_interleave(each)
            used = scale.nonzero().squeeze(1)
            yield (left[:, :, used] * (size * scale)[:, None, used]) @ right[:, :, used].mT

"""Least squares whose Grams are those of the task vectors themselves: no data, no statistic."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from merging.methods.spectral.singular_vectors import Matrices, PreparedSpectral
from merging.recipe import Value


def normalised_gram(matrices: Tensor) -> Tensor:
    """AᵀA over its trace [B, in, in], of A [B, out, in]; 0 where A is."""
    gram = matrices.mT @ matrices
    trace = gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    return gram / torch.where(trace > 0, trace, 1.0)


class PreparedTaskVectorGrams(PreparedSpectral):
    """Base and members as they are stored: Σ α_t R_t @ M⁻¹, R_t of one member [out, in] and M of all [in, in].

    Two passes over the members, so that one Gram is held at a time besides the sum.
    """

    oriented = True

    def centred(self, moved: Tensor) -> Tensor:
        """What a member's Gram is of, of its τ_t [B, out, in]."""
        return moved

    def term(self, moved: Tensor, gram: Tensor, parameters: Mapping[str, Value]) -> Tensor:
        """A member's R_t [B, out, in].

        Args:
            moved: What `centred` gives [B, out, in].
            gram: Σ̂_t, its Gram of trace 1 [B, in, in].
            parameters: The candidate's.
        """
        return moved @ gram

    @abstractmethod
    def solver(self, total: Tensor, members: int, parameters: Mapping[str, Value]) -> Callable[[Tensor], Tensor]:
        """What multiplies [B, out, in] by M⁻¹ from the right, for Σ Σ̂_t [B, in, in] of so many members."""

    def finish(
        self,
        step: Tensor,
        batch: Matrices,
        factors: Mapping[str, float],
        total: Tensor,
        parameters: Mapping[str, Value],
    ) -> Tensor:
        """What matrices move by, of the solution [B, out, in]."""
        return step

    def is_sum(self, parameters: Mapping[str, Value]) -> bool:
        """Each member's contribution is for itself."""
        return True

    def steps(
        self, index: int, scalings: Sequence[Mapping[str, float]], parameters: Mapping[str, Value]
    ) -> Iterator[Tensor]:
        """Σ α_t R_t @ M⁻¹ of every scaling; M is factored once."""
        batch, members = self.batches[index], list(scalings[0])
        total: Tensor | None = None
        for member in members:
            gram = normalised_gram(self.centred(batch.moved({member: 1.0}, self.scratch)))
            total = gram if total is None else total.add_(gram)
        assert total is not None
        solve = self.solver(total, len(members), parameters)
        for factors in scalings:
            right = torch.zeros_like(batch.moved({}, self.scratch))
            for member, factor in factors.items():
                if factor:
                    moved = self.centred(batch.moved({member: 1.0}, self.scratch))
                    right.add_(self.term(moved, normalised_gram(moved), parameters), alpha=factor)
            yield self.finish(solve(right), batch, factors, total, parameters)

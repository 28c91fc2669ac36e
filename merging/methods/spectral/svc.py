"""SVC: any method, with the directions weakened that several members' task vectors have strengthened together."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from merging.methods.checks import check_weights, chosen
from merging.methods.latest import Latest
from merging.methods.method import Context, Method, Prepared, Weight, modifier
from merging.methods.modified import Modified, PreparedModified, modify
from merging.methods.spectral.singular_vectors import NOISE, Matrices, batches_of, matrices_of, norms, triples
from merging.recipe import Value


class Svc(Modified):
    """θ_0 + U diag(c S) Vᵀ for every matrix [out, in], Δ = U S Vᵀ what another method adds to the base.

    Li et al. 2026, singular value calibration.
    With a_r = u_rᵀ Δ and a_r^t = u_rᵀ τ_t, s = ⟨a_r, a_r^t⟩ / ‖a_r^t‖² says how much stronger the merge is in direction r than
    member t; c_r = T / Σ_t max(1, s). Where a member has nothing but rounding in a direction s is 0. A method that makes all
    directions equally strong (Iso-C) leaves U open: taken are the directions of Σ α_t τ_t in the range of Δ. What is no matrix
    stays as the method has it.
    """

    def is_linear(self, parameters: Mapping[str, Value]) -> bool:
        """Never."""
        return False

    def is_elementwise(self, parameters: Mapping[str, Value]) -> bool:
        """Never."""
        return False

    def prepare(self, weights: Sequence[Weight], context: Context) -> Prepared:
        """What the method that is modified prepares.

        Where that is linear, candidates of one shared factor have one set of directions, which is kept for the latest
        members and parameters.
        """
        return PreparedSvc(weights, self.inner.prepare(weights, context), self.inner)


@modifier("svc")
def svc(inner: Method) -> Method:
    """A method whose directions are as strong as the members' own, and no stronger."""
    extras = tuple(dict.fromkeys((*inner.extras, "layout")))
    return modify(
        Svc, "svc", inner, f"{inner.summary}, calibrated by direction", {}, elementwise=False, flat=False, extras=extras
    )


class PreparedSvc(PreparedModified):
    """A method's state, and the weights; where that method is linear, directions of what factors of 1 move by.

    Args:
        weights: The weights to merge.
        prepared: The state of the method that is modified.
        inner: That method.
    """

    def __init__(self, weights: Sequence[Weight], prepared: Prepared, inner: Method) -> None:
        super().__init__(weights, prepared)
        self._members = check_weights(weights)
        self._inner = inner
        matrices = [matrix for weight in weights for matrix in matrices_of(weight)]
        self._batches = batches_of(matrices, oriented=True)
        self._kept: Latest[list[tuple[Tensor, Tensor]]] = Latest()

    @torch.no_grad()
    def merge(self, scaling: Mapping[str, float], parameters: Mapping[str, Value], out: Mapping[str, Tensor]) -> None:
        """Merges, then calibrates in place."""
        members = chosen(scaling, self._members)
        factors = {member: scaling[member] for member in members}
        shared = factors[members[0]] if len(set(factors.values())) == 1 and self._inner.is_linear(parameters) else 0.0
        staged = self.staged(out)
        kept = self._directions(members, parameters, staged) if shared > 0 else None
        self.prepared.merge(scaling, parameters, staged)
        for index, batch in enumerate(self._batches):
            step = batch.steps_to(staged, self.scratch)
            left, sizes = self._sizes(batch, step, factors) if kept is None else kept[index]
            scale = len(members) / (sizes * (shared if kept else 1.0)).clamp(min=1).sum(2)
            change = batch.turn(left @ ((scale - 1)[:, :, None] * (left.mT @ step)))
            for matrix, part in zip(batch.rows, change, strict=True):
                matrix.of(staged[matrix.weight.name]).add_(part)
        self.write(staged, out)

    def _directions(
        self, members: tuple[str, ...], parameters: Mapping[str, Value], staged: Mapping[str, Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """u_r and s of every batch for factors of 1; kept until other members or parameters are asked for."""
        ones = dict.fromkeys(members, 1.0)

        def compute() -> list[tuple[Tensor, Tensor]]:
            self.prepared.merge(ones, parameters, staged)
            return [self._sizes(each, each.steps_to(staged, self.scratch), ones) for each in self._batches]

        return self._kept.get((members, dict(parameters)), compute)

    def _sizes(self, batch: Matrices, step: Tensor, factors: Mapping[str, float]) -> tuple[Tensor, Tensor]:
        """u_r [B, out, r] of Δ and s [B, r, T]."""
        left, _, _ = triples(step)
        if self._inner.flat:
            total = batch.moved(factors, self.scratch)
            left, _, _ = triples(left @ (left.mT @ total), norms(total))
        merged = left.mT @ step
        sizes = []
        for member in factors:
            moved = batch.moved({member: 1.0}, self.scratch)
            own = left.mT @ moved
            square = own.square().sum(2)
            seen = square > (NOISE * norms(moved)[:, None]).square()
            sizes.append(torch.where(seen, (merged * own).sum(2) / torch.where(seen, square, 1.0), 0.0))
        return left, torch.stack(sizes, dim=2)

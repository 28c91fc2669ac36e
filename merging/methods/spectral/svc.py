"""SVC: any method, with the directions weakened that several members' task vectors have strengthened together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merging.kernels.blockwise import Scratch
from merging.methods.checks import check_weights, chosen, target
from merging.methods.method import Context, Method, Prepared, Weight, modifier
from merging.methods.modified import Modified, modify
from merging.methods.spectral.singular_vectors import NOISE, Matrices, batches_of, matrices_of, norms, triples
from merging.recipe import Value


class Svc(Modified):
    """θ_0 + U diag(c S) Vᵀ for every matrix [out, in], Δ = U S Vᵀ what another method adds to the base.

    Singular value calibration (SVC, 2026).
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


@dataclass(frozen=True)
class Kept:
    """Directions of what factors of 1 move by, of every batch.

    Args:
        members: The members.
        parameters: The candidate's parameters.
        directions: u_r [B, out, r] and s of every member [B, r, T].
    """

    members: tuple[str, ...]
    parameters: Mapping[str, Value]
    directions: list[tuple[Tensor, Tensor]]


class PreparedSvc(Prepared):
    """A method's state, and the weights.

    Args:
        weights: The weights to merge.
        prepared: The state of the method that is modified.
        inner: That method.
    """

    def __init__(self, weights: Sequence[Weight], prepared: Prepared, inner: Method) -> None:
        self._members = check_weights(weights)
        self._weights = tuple(weights)
        self._prepared = prepared
        self._inner = inner
        self._scratch = Scratch()
        matrices = [matrix for weight in weights for matrix in matrices_of(weight)]
        self._batches = batches_of(matrices, oriented=True)
        self._kept: Kept | None = None

    def report(self) -> dict[str, float]:
        """The figures of the method that is modified."""
        return self._prepared.report()

    @torch.no_grad()
    def merge(self, scaling: Mapping[str, float], parameters: Mapping[str, Value], out: Mapping[str, Tensor]) -> None:
        """Merges, then calibrates in place; in float32 also where the result is rounded to another dtype."""
        members = chosen(scaling, self._members)
        factors = {member: scaling[member] for member in members}
        shared = factors[members[0]] if len(set(factors.values())) == 1 and self._inner.is_linear(parameters) else 0.0
        staged = {weight.name: self._stage(weight, target(out, weight)) for weight in self._weights}
        kept = self._directions(members, parameters, staged) if shared > 0 else None
        self._prepared.merge(scaling, parameters, staged)
        for index, batch in enumerate(self._batches):
            step = batch.steps_to(staged, self._scratch)
            left, sizes = self._sizes(batch, step, factors) if kept is None else kept[index]
            scale = len(members) / (sizes * (shared if kept else 1.0)).clamp(min=1).sum(2)
            change = batch.turn(left @ ((scale - 1)[:, :, None] * (left.mT @ step)))
            for matrix, part in zip(batch.rows, change, strict=True):
                matrix.of(staged[matrix.weight.name]).add_(part)
        for weight in self._weights:
            if staged[weight.name] is not out[weight.name]:
                out[weight.name].copy_(staged[weight.name])

    def _directions(
        self, members: tuple[str, ...], parameters: Mapping[str, Value], staged: Mapping[str, Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """Those for factors of 1; kept until other members or parameters are asked for."""
        if self._kept is None or (self._kept.members, self._kept.parameters) != (members, dict(parameters)):
            self._kept = None  # before the new one takes memory
            self._prepared.merge(dict.fromkeys(members, 1.0), parameters, staged)
            ones = dict.fromkeys(members, 1.0)
            found = [self._sizes(each, each.steps_to(staged, self._scratch), ones) for each in self._batches]
            self._kept = Kept(members, dict(parameters), found)
        return self._kept.directions

    def _sizes(self, batch: Matrices, step: Tensor, factors: Mapping[str, float]) -> tuple[Tensor, Tensor]:
        """u_r [B, out, r] of Δ and s [B, r, T]."""
        left, _, _ = triples(step)
        if self._inner.flat:
            total = batch.moved(factors, self._scratch)
            left, _, _ = triples(left @ (left.mT @ total), norms(total))
        merged = left.mT @ step
        sizes = []
        for member in factors:
            moved = batch.moved({member: 1.0}, self._scratch)
            own = left.mT @ moved
            square = own.square().sum(2)
            seen = square > (NOISE * norms(moved)[:, None]).square()
            sizes.append(torch.where(seen, (merged * own).sum(2) / torch.where(seen, square, 1.0), 0.0))
        return left, torch.stack(sizes, dim=2)

    def _stage(self, weight: Weight, destination: Tensor) -> Tensor:
        if destination.dtype == torch.float32 and destination.is_contiguous():
            return destination
        return self._scratch.take(f"merged {weight.name}", *destination.shape, device=destination.device)

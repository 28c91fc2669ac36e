"""RegMean: each linear layer is a least-squares fit to what the members put out, from Grams of inputs."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from merging.methods.base import Context, Method, Parameter, Prepared, Weight, register
from merging.methods.blocks import Scratch
from merging.methods.checks import check_weights, chosen
from merging.methods.grams import Batch, batches
from merging.methods.solve import factor, solve
from merging.methods.sums import mean_step
from merging.recipe import Value


@register
class RegMean(Method):
    """W = ((Σ G̃_t)⁻¹ @ Σ G̃_t @ W_tᵀ)ᵀ with G̃ = ρ G + (1 − ρ) diag(G) (Jin et al. 2023, equation 2).

    Weights without a Gram (biases, LayerNorm, embeddings) are the plain mean. The scaling factors scale what
    each member adds to the base, θ_0 + Σ α_t u_t with u_t = (Σ G̃_s)⁻¹ G̃_t τ_t (τ_t / T where there is no Gram):
    linear in α, and one shared factor scales the whole merge. With `factors` = `gram` they weigh the Grams inside
    the solve instead, (Σ α_t G̃_t)⁻¹ Σ α_t G̃_t τ_t; both are RegMean at α = 1. On a real pool of seven members a search
    over contributions gained one to five points of accuracy over RegMean, one over weights inside the solve and ρ
    nothing; so contributions are the default, and ρ is not searched unless a campaign gives it a range.

    Computed as W_0 + (Σ α_t G̃_t)⁻¹ Σ α_t G̃_t τ_tᵀ, so that rounding is relative to τ. Where the sum is
    singular, an r-th part of its diagonal is added to it, and that part of the members' mean to the right
    side: inputs that no member ever saw get the plain mean. `report()` says how large r was.
    """

    name = "regmean"
    summary = "least squares per linear layer, from the Grams of its inputs"
    requires = ("gram",)
    scaling = Parameter(1.0, "scale of the member's contribution, or its weight in the solve", low=0.0, high=1.5)
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "rho": Parameter(
            0.9,
            "share of the Grams' off-diagonal entries that is kept",
            low=0.0,
            high=1.0,
            minimum=0.0,
            maximum=1.0,
            search=False,
        ),
        "factors": Parameter(
            "contribution",
            "scaling factors scale each member's contribution to the solution, or weigh the Grams inside the solve",
            choices=("contribution", "gram"),
            search=False,
        ),
    }

    def is_linear(self, parameters: Mapping[str, Value]) -> bool:
        """Where factors scale contributions."""
        return parameters.get("factors", self.parameters["factors"].default) == "contribution"

    def prepare(self, weights: Sequence[Weight], context: Context) -> Prepared:
        """Computes G_t @ τ_tᵀ of every weight that has Grams.

        Raises:
            MethodError: A Gram is missing, not finite, of another shape, or has a negative diagonal.
        """
        return PreparedRegMean(weights)


class PreparedRegMean(Prepared):
    """Grams, products of Grams and task vectors, and the weights themselves.

    Args:
        weights: The weights to merge.
    """

    def __init__(self, weights: Sequence[Weight]) -> None:
        self._members = check_weights(weights)
        self._scratch = Scratch()
        self._batches = batches(weights, self._scratch)
        solved = {weight.name for batch in self._batches for system in batch.systems for weight in system.weights}
        self._rest = [weight for weight in weights if weight.name not in solved]
        self._report: dict[str, float] = {}
        self._basis: tuple[tuple[tuple[str, ...], float], list[list[Tensor]]] | None = None

    def report(self) -> dict[str, float]:
        """`ridge`, the largest share of a diagonal that was added; `ridged_layers`, in how many systems."""
        return dict(self._report)

    @torch.no_grad()
    def merge(self, scaling: Mapping[str, float], parameters: Mapping[str, Value], out: Mapping[str, Tensor]) -> None:
        """One weighted sum and one batched Cholesky solve for each group of layers of one shape.

        Raises:
            MethodError: The weighted sum of Grams is not positive semi-definite.
        """
        members = chosen(scaling, self._members)
        factors = [scaling[member] for member in members]
        rho = float(parameters["rho"])
        if parameters["factors"] == "gram":
            self._report = {"ridge": 0.0, "ridged_layers": 0.0}
            for batch in self._batches:
                (moved,) = self._solve(batch, members, factors, rho, separate=False)
                for index, system in enumerate(batch.systems):
                    system.write([(moved[index], 1.0)], out, self._scratch)
        else:
            for batch, basis in zip(self._batches, self._contributions(members, rho), strict=True):
                for index, system in enumerate(batch.systems):
                    terms = [(moved[index], factor) for moved, factor in zip(basis, factors, strict=True)]
                    system.write(terms, out, self._scratch)
        inside = parameters["factors"] == "gram"
        mean_step(self._rest, {member: 1.0 if inside else scaling[member] for member in members}, out, self._scratch)

    def _solve(
        self, batch: Batch, members: Sequence[str], factors: Sequence[float], rho: float, *, separate: bool
    ) -> list[Tensor]:
        """(Σ α_t G̃_t)⁻¹ Σ α_t G̃_t τ_tᵀ for a batch, summed over members or for each; [B, out, in] float32."""
        sums = batch.gram_sum(members, factors, rho)
        cholesky, scale, ridges = factor(sums, [system.weights[0].name for system in batch.systems])
        self._report["ridge"] = max(self._report["ridge"], float(ridges.max()))
        self._report["ridged_layers"] += float((ridges > 0).sum())
        pull = ridges[:, None] * scale.square()
        parts = [[index] for index in range(len(members))] if separate else [list(range(len(members)))]
        moved = []
        for part in parts:
            right = batch.right(members, factors, part, rho, pull)
            moved.append(solve(cholesky, scale, right.mT).mT.float().contiguous())
        return moved

    def _contributions(self, members: tuple[str, ...], rho: float) -> list[list[Tensor]]:
        """u_t of every batch and member; kept until other members or another ρ are asked for."""
        if self._basis is None or self._basis[0] != (members, rho):
            self._report = {"ridge": 0.0, "ridged_layers": 0.0}
            ones = [1.0] * len(members)
            basis = [self._solve(batch, members, ones, rho, separate=True) for batch in self._batches]
            self._basis = ((members, rho), basis)
        return self._basis[1]

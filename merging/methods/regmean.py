"""RegMean: each linear layer is a least-squares fit to what the members put out, from Grams of inputs."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from merging.methods.base import Context, Method, Parameter, Prepared, Weight, register
from merging.methods.blocks import Scratch, target, weighted_sum
from merging.methods.checks import check_weights, chosen
from merging.methods.grams import Batch, batches
from merging.methods.solve import factor, solve
from merging.recipe import Value


@register
class RegMean(Method):
    """W = ((Σ α_t G̃_t)⁻¹ @ Σ α_t G̃_t @ W_tᵀ)ᵀ with G̃ = ρ G + (1 − ρ) diag(G) (Jin et al. 2023, equation 2).

    Weights without a Gram (biases, LayerNorm, embeddings) are the plain mean. With `factors` = `contribution`
    the solve has α = 1 and the factors scale what each member adds, θ_0 + Σ α_t u_t: the same at α = 1, and
    linear in α.

    Computed as W_0 + (Σ α_t G̃_t)⁻¹ Σ α_t G̃_t τ_tᵀ, so that rounding is relative to τ. Where the sum is
    singular, an r-th part of its diagonal is added to it, and that part of the members' mean to the right
    side: inputs that no member ever saw get the plain mean. `report()` says how large r was.
    """

    name = "regmean"
    summary = "least squares per linear layer, from the Grams of its inputs"
    requires = ("gram",)
    scaling = Parameter(1.0, "the member's weight in the solve, or the scale of its contribution", low=0.0, high=1.5)
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "rho": Parameter(
            0.9,
            "share of the Grams' off-diagonal entries that is kept",
            low=0.0,
            high=1.0,
            minimum=0.0,
            maximum=1.0,
        ),
        "factors": Parameter(
            "gram",
            "scaling factors weight the Grams inside the solve, or scale each member's contribution to it",
            choices=("gram", "contribution"),
            search=False,
        ),
    }

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
        self._merge_rest(members, factors if parameters["factors"] == "contribution" else [1.0] * len(members), out)

    def _merge_rest(self, members: Sequence[str], factors: Sequence[float], out: Mapping[str, Tensor]) -> None:
        """θ_0 + Σ α_t τ_t / T."""
        for weight in self._rest:
            terms = [
                (weight.members[member], factor / len(members)) for member, factor in zip(members, factors, strict=True)
            ]
            rest = 1.0 - sum(factor for _, factor in terms)
            terms.append((weight.base, rest if abs(rest) > 1e-12 else 0.0))
            weighted_sum(terms, target(out, weight), self._scratch)

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

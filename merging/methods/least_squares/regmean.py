"""RegMean: each linear layer is a least-squares fit to what the members put out, from Grams of inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from merging.kernels.blockwise import Scratch
from merging.methods.averaging.weighted_sum import mean_step
from merging.methods.checks import check_weights, chosen
from merging.methods.latest import Latest
from merging.methods.least_squares.blocks import InBlocks
from merging.methods.least_squares.cholesky import factor, solve
from merging.methods.least_squares.gram_systems import averaged_layers, batches, unreached
from merging.methods.method import Context, Method, Parameter, Prepared, Weight, register
from merging.methods.model_types import T5
from merging.recipe import Value


@register
class RegMean(Method):
    """W = ((Σ G̃_t)⁻¹ @ Σ G̃_t @ W_tᵀ)ᵀ with G̃ = ρ G + (1 − ρ) diag(G) + β mean(diag(G)) I (Jin et al. 2023, equation 2).

    ρ and β are two choices of the diagonal Λ_t that the paper's objective adds, Σ tr (W − W_t) Λ_t (W − W_t)ᵀ (appendix A):
    Λ_t = (1/ρ − 1) diag(G_t), a penalty per input, and Λ_t = β mean(diag(G_t)) I, the same for all inputs.

    Weights without a Gram (biases, LayerNorm, embeddings) are the plain mean. An embedding's Gram would be diagonal, how often
    each row is read, and row v of the merge Σ c_t[v] W_t[v] / Σ c_t[v]; on two pools of encoders that gained nothing worth
    having over the mean (sentiment −0.20 ± 0.17 points of accuracy counted on the Grams' examples, +0.05 ± 0.18 on all training
    texts; parts of speech +0.02 ± 0.01), so it is not there.

    The scaling factors scale what each member adds to the base, θ_0 + Σ α_t u_t with u_t = (Σ G̃_s)⁻¹ G̃_t τ_t (τ_t / T where
    there is no Gram): linear in α, and one shared factor scales the whole merge. With `factors` = `gram` they weigh the Grams
    inside the solve instead, (Σ α_t G̃_t)⁻¹ Σ α_t G̃_t τ_t; both are RegMean at α = 1. On a real pool of seven members a search
    over contributions gained one to five points of accuracy over RegMean, one over weights inside the solve and ρ
    nothing; so contributions are the default, and ρ is not searched unless a campaign gives it a range.

    Computed as W_0 + (Σ α_t G̃_t)⁻¹ Σ α_t G̃_t τ_tᵀ, so that rounding is relative to τ. Factors that are all equal ask for
    one solution, that of the sum; others, as contributions, for one of every member. Where the sum is singular, an r-th part
    of its diagonal is added to it, and that part of the members' mean to the right side: inputs that no member ever saw
    get the plain mean. A Gram in float32 is singular where its smallest eigenvalue may be a rounding error. `report()` says how
    large r was, how many matrices besides embeddings have no Gram and are the mean (a mixture's router), and how many of a
    mixture's experts no member's tokens reached, which are the mean, too.
    """

    name = "regmean"
    summary = "least squares per linear layer, from the Grams of its inputs"
    requires = ("gram",)
    scaling = Parameter(1.0, "scale of the member's contribution, or its weight in the solve", low=0.0, high=1.5)
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "rho": Parameter(
            0.9,
            "share of the Grams' off-diagonal entries that is kept (T5 and its kin: 0.1)",
            low=0.0,
            high=1.0,
            minimum=0.0,
            maximum=1.0,
            search=False,
            default_for=dict.fromkeys(T5, 0.1),
        ),
        "beta": Parameter(
            0.0,
            "added to each Gram's diagonal, as a share of the diagonal's mean",
            low=0.0,
            high=1.0,
            minimum=0.0,
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
        """Looks at all Grams; G_t @ τ_tᵀ is computed when a candidate first has the member.

        Raises:
            MethodError: A Gram is missing, not finite, of another shape, or has a negative diagonal.
        """
        return InBlocks(weights, PreparedRegMean)


@dataclass(frozen=True)
class RegMeanUpdate:
    """What some members' weights move by.

    Args:
        moved: Of every batch: what all move by together, or u_t of each; [B, out, in] float32.
        report: How far ridges were needed.
    """

    moved: list[list[Tensor]]
    report: dict[str, float]


class PreparedRegMean(Prepared):
    """Grams and the weights themselves; products and solutions as candidates ask for them.

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
        # whether each member's part is kept apart → the solution for factors of 1
        self._kept: dict[bool, Latest[RegMeanUpdate]] = {False: Latest(), True: Latest()}

    def report(self) -> dict[str, float]:
        """What was added to systems, and what is the mean.

        `ridge`, the largest share of a diagonal that was added; `ridged_layers`, in how many systems; `averaged_layers`;
        `unreached_experts`, matrices that no member's tokens reached.
        """
        return self._report | averaged_layers(self._rest) | unreached(self._batches)

    @torch.no_grad()
    def merge(self, scaling: Mapping[str, float], parameters: Mapping[str, Value], out: Mapping[str, Tensor]) -> None:
        """One weighted sum; before it, where members, ρ or factors inside the solve are new, a Cholesky solve of each layer.

        Which solutions are summed up depends on the candidate alone, not on what was solved before it.

        Raises:
            MethodError: The weighted sum of Grams is not positive semi-definite.
        """
        members = chosen(scaling, self._members)
        factors = [scaling[member] for member in members]
        rho, beta = float(parameters["rho"]), float(parameters.get("beta", 0.0))
        inside = parameters["factors"] == "gram"
        even = len(set(factors)) == 1
        if inside and not (even and factors[0] > 0):  # a positive factor of all cancels
            solution, scales = self._solve(members, factors, rho, beta, apart=False), [1.0]
        elif even:
            solution, scales = self._solution(members, rho, beta, apart=False), [1.0 if inside else factors[0]]
        else:
            solution, scales = self._solution(members, rho, beta, apart=True), factors
        self._report = solution.report
        for batch, moved in zip(self._batches, solution.moved, strict=True):
            for index, system in enumerate(batch.systems):
                terms = [(value[index], scale) for value, scale in zip(moved, scales, strict=True)]
                system.write(terms, out, self._scratch)
        mean_step(self._rest, {member: 1.0 if inside else scaling[member] for member in members}, out, self._scratch)

    def _solution(self, members: tuple[str, ...], rho: float, beta: float, *, apart: bool) -> RegMeanUpdate:
        """The solution for factors of 1; kept until other members, another ρ or another β are asked for."""
        ones = [1.0] * len(members)
        return self._kept[apart].get((members, rho, beta), lambda: self._solve(members, ones, rho, beta, apart=apart))

    def _solve(
        self, members: tuple[str, ...], factors: Sequence[float], rho: float, beta: float, *, apart: bool
    ) -> RegMeanUpdate:
        """(Σ α_t G̃_t)⁻¹ Σ α_t G̃_t τ_tᵀ of every batch, summed over members or for each."""
        report = {"ridge": 0.0, "ridged_layers": 0.0}
        parts = [[index] for index in range(len(members))] if apart else [list(range(len(members)))]
        every = []
        for batch in self._batches:
            sums = batch.gram_sum(members, factors, rho, beta)
            names = [system.weights[0].name for system in batch.systems]
            cholesky, scale, ridges = factor(sums, names, batch.rounding(members))
            report["ridge"] = max(report["ridge"], float(ridges.max()))
            report["ridged_layers"] += float((ridges > 0).sum())
            pull = ridges[:, None] * scale.square()
            rights = (batch.right(members, factors, part, rho, pull, beta) for part in parts)
            every.append([solve(cholesky, scale, right.mT).mT.float().contiguous() for right in rights])
        return RegMeanUpdate(every, report)

"""ACE: RegMean with Grams that are estimated from the task vectors."""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from merging.methods.least_squares.task_vector_grams import PreparedTaskVectorGrams, normalised_gram
from merging.methods.method import Context, Method, Parameter, Prepared, Weight, register
from merging.methods.spectral.singular_vectors import EMBEDDINGS, Matrices, triples
from merging.recipe import Value

EPSILON = {"gpt2": 4e-2, "roberta": 2e-4, "xlm-roberta": 2e-4}
"""Model types for which the paper has another ε."""
STRONGEST = 0.3
"""Share of the directions that the refinement adds to."""


@register
class Ace(Method):
    """θ_0 + Σ α_t τ̃_t (Σ̂_t + ε I) M⁻¹ for every matrix [out, in], M = Σ (Σ̂_s + ε I) + 1 c (Xu et al. 2026, ACE-Merging).

    τ̃_t is τ_t less its mean over outputs; Σ̂_t = τ̃_tᵀ τ̃_t over its trace stands for the Gram of the member's inputs; c has
    the mean of each column of Σ Σ̂_s. The trace normalises always: the authors' switch on the variance of log ‖τ‖² depends
    on the unit of weights. With `refine`, W̄ of the solution becomes W̄ + mean(S_1…k) U_k V_kᵀ, k = 0.3 min(out, in), with
    U S Vᵀ = Σ α_t τ_t (Σ̂_t − Σ Σ̂_s / T) + W̄. A factor shared by all members scales the result. What is no matrix is the
    members' mean, θ_0 + Σ α_t τ_t / T.
    """

    name = "ace"
    summary = "least squares per matrix, from the Grams of its task vectors"
    extras = ("layout",)
    signed: ClassVar[bool] = True
    scaling = Parameter(1.0, "scale of the member's contribution", low=0.0, high=1.5)
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "epsilon": Parameter(
            1e-5,
            "ridge on each Gram of trace 1 (GPT-2: 0.04, RoBERTa: 0.0002)",
            low=1e-6,
            high=1e-1,
            log=True,
            minimum=1e-12,
            default_for=EPSILON,
        ),
        "refine": Parameter(
            False, "make the solution's strongest directions stronger", choices=(False, True), search=False
        ),
        "embeddings": EMBEDDINGS,
    }

    def is_linear(self, parameters: Mapping[str, Value]) -> bool:
        """Without the refinement."""
        return not parameters.get("refine", False)

    def prepare(self, weights: Sequence[Weight], context: Context) -> Prepared:
        """Keeps references; what members contribute is kept for the latest members and parameters."""
        return PreparedAce(weights)


class PreparedAce(PreparedTaskVectorGrams):
    """Base and members as they are stored."""

    def is_sum(self, parameters: Mapping[str, Value]) -> bool:
        """Without the refinement."""
        return not parameters["refine"]

    def centred(self, moved: Tensor) -> Tensor:
        """τ̃."""
        return moved - moved.mean(1, keepdim=True)

    def term(self, moved: Tensor, gram: Tensor, parameters: Mapping[str, Value]) -> Tensor:
        """τ̃ (Σ̂ + ε I)."""
        return moved @ gram + float(parameters["epsilon"]) * moved

    def solver(self, total: Tensor, members: int, parameters: Mapping[str, Value]) -> Callable[[Tensor], Tensor]:
        """By LU, for M is not symmetric."""
        system = total + total.mean(1, keepdim=True)
        system.diagonal(dim1=1, dim2=2).add_(members * float(parameters["epsilon"]))
        factors, pivots = torch.linalg.lu_factor(system)
        return lambda right: torch.linalg.lu_solve(factors, pivots, right, left=False)

    def finish(
        self,
        step: Tensor,
        batch: Matrices,
        factors: Mapping[str, float],
        total: Tensor,
        parameters: Mapping[str, Value],
    ) -> Tensor:
        """With the refinement, where it is asked for."""
        if not parameters["refine"]:
            return step
        mixed = step.clone()
        for member, factor in factors.items():
            moved = batch.moved({member: factor}, self.scratch)
            gram = normalised_gram(self.centred(moved))
            mixed += moved @ (gram - total / len(factors))
        first = max(int(STRONGEST * batch.rank), 1)
        left, sizes, right = (part[..., :first] for part in triples(mixed))
        return step.addcmul_(left @ right.mT, sizes.mean(1)[:, None, None])

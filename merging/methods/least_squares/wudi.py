"""WUDI: the merge that interferes least with the task vectors' own input directions, in closed form."""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from merging.methods.least_squares.task_vector_grams import PreparedTaskVectorGrams
from merging.methods.method import Context, Method, Parameter, Prepared, Weight, register
from merging.methods.spectral.singular_vectors import EMBEDDINGS
from merging.recipe import Value


@register
class Wudi(Method):
    """θ_0 + the τ of every matrix that minimises Σ_t ‖(τ − τ_t) τ_tᵀ‖² / ‖τ_t‖² (Cheng et al. 2025), in closed form.

    The normal equations give τ = Σ α_t τ_t Σ̂_t (Σ Σ̂_s)⁺ with Σ̂_t = τ_tᵀ τ_t / ‖τ_t‖²; the pseudo-inverse leaves out
    eigenvalues below `filter` of the largest. It is where the paper's gradient descent from Σ τ_t ends, which never leaves the
    rows of the task vectors. A factor shared by all members scales the result. What is no matrix is the members' mean,
    θ_0 + Σ α_t τ_t / T.
    """

    name = "wudi"
    summary = "least interference with the rows of the task vectors"
    extras = ("layout",)
    scaling = Parameter(1.0, "scale of the member's contribution", low=0.0, high=1.5)
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "filter": Parameter(
            1e-10,
            "input directions below this share of the strongest are left out",
            low=1e-10,
            high=1e-2,
            log=True,
            minimum=1e-14,
            maximum=1.0,
        ),
        "embeddings": EMBEDDINGS,
    }

    def is_linear(self, parameters: Mapping[str, Value]) -> bool:
        """Always."""
        return True

    def prepare(self, weights: Sequence[Weight], context: Context) -> Prepared:
        """Keeps references; what members contribute is kept for the latest members and parameters."""
        return PreparedWudi(weights)


class PreparedWudi(PreparedTaskVectorGrams):
    """Base and members as they are stored."""

    def solver(self, total: Tensor, members: int, parameters: Mapping[str, Value]) -> Callable[[Tensor], Tensor]:
        """By eigenvalues."""
        values, vectors = torch.linalg.eigh(total)
        kept = values > float(parameters["filter"]) * values[:, -1:]
        inverse = torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0)
        return lambda right: (right @ vectors) * inverse[:, None, :] @ vectors.mT

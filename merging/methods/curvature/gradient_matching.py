"""Gradient matching: task vectors weighted by their curvature relative to the merged model's."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from merging.errors import MethodError
from merging.methods.checks import chosen, example_counts
from merging.methods.curvature.diagonal import Curvature, Diagonal
from merging.methods.method import Context, Method, Needs, Parameter, Prepared, Weight, register
from merging.recipe import BASE, Recipe, Value

DELTA_WITH_FISHER = 1e-12


@register
class GradientMatching(Method):
    """θ = θ_0 + Σ α_t (H_0 + H_t) τ_t / (H_0 + Σ α_s H_s), elementwise (Daheim et al. 2024, equation 10).

    H_t = s_t F_t with s_t the member's number of training examples, 1 where no member's is known. H_0 is
    `delta`, plus s_0 F_0 of the base where `base_curvature` is `fisher`. Weights without Fisher information
    have H_t = 0 and are merged by task arithmetic. With `delta: 0` (Fisher averaging, whatever the factors sum to) entries of
    which no curvature says anything, 0/0, are the members' mean, weighted by the factors; `report()` has their number.
    """

    name = "gradient_matching"
    summary = "task vectors weighted by curvature"
    requires = ("fisher",)
    elementwise = True
    scaling = Parameter(1.0, "scale of the member's task; negative to remove it", low=0.0, high=1.5)
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "base_curvature": Parameter(
            "identity",
            "the base's curvature H_0: delta, or delta plus its Fisher",
            choices=("identity", "fisher"),
            search=False,
        ),
        "delta": Parameter(
            1.0,
            "constant part of H_0 (1e-12 with the base's Fisher); 0 for none",
            low=1e-8,
            high=10.0,
            log=True,
            minimum=0.0,
        ),
        "clamp": Parameter(
            False,
            "raise denominators to delta instead of refusing those not above 0",
            choices=(False, True),
            search=False,
        ),
    }

    def needs(self, parameters: Mapping[str, Value]) -> Needs:
        """The members' Fisher; the base's, too, where it is H_0."""
        return Needs(self.requires, base=self.requires if parameters["base_curvature"] == "fisher" else ())

    def prior(self, parameters: Mapping[str, Value]) -> tuple[float, bool]:
        """H_0."""
        return float(parameters["delta"]), parameters["base_curvature"] == "fisher"

    def complete(self, recipe: Recipe, model_type: str = "") -> Recipe:
        """As for any method; `delta` is 1e-12 where the base's Fisher is used and nothing else is said."""
        if recipe.parameters.get("base_curvature") == "fisher" and "delta" not in recipe.parameters:
            recipe = replace(recipe, parameters={**recipe.parameters, "delta": DELTA_WITH_FISHER})
        return super().complete(recipe, model_type)

    def prepare(self, weights: Sequence[Weight], context: Context) -> Prepared:
        """Keeps references to base, members and statistics.

        Raises:
            MethodError: A Fisher is missing, negative, not finite, or of another shape; or only some members'
                numbers of examples are known.
        """
        return PreparedGradientMatching(weights, context.examples)


class PreparedGradientMatching(Prepared):
    """Base, members and Fisher information, as they are stored.

    Args:
        weights: The weights to merge.
        examples: Number of training examples by member, and the base's.
    """

    def __init__(self, weights: Sequence[Weight], examples: Mapping[str, int]) -> None:
        self._diagonal = Diagonal(weights)
        self._examples = example_counts(examples, self._diagonal.members)
        self._base_examples = float(examples.get(BASE, 1))

    def report(self) -> dict[str, float]:
        """`mean_entries`, how many entries are the mean because no curvature says anything of them."""
        return {"mean_entries": float(self._diagonal.gaps)} if self._diagonal.gaps else {}

    @torch.no_grad()
    def merge(self, scaling: Mapping[str, float], parameters: Mapping[str, Value], out: Mapping[str, Tensor]) -> None:
        """One pass over base, members and Fisher information.

        Raises:
            MethodError: Scaling factors that cancel, or no Fisher of the base though it is asked for.
        """
        members = chosen(scaling, self._diagonal.members)
        with_fisher = parameters["base_curvature"] == "fisher"
        if with_fisher:
            self._require_base()
        curvature = Curvature(
            members,
            [scaling[member] for member in members],
            [float(self._examples[member]) for member in members],
            base_scale=self._base_examples if with_fisher else 0.0,
            delta=float(parameters["delta"]),
            clamp=bool(parameters["clamp"]),
        )
        self._diagonal.merge(curvature, out)

    def _require_base(self) -> None:
        for weight, fishers in zip(self._diagonal.weights, self._diagonal.fishers, strict=True):
            if fishers and BASE not in fishers:
                raise MethodError(
                    "base_curvature = 'fisher' needs the base's Fisher, which has nothing for "
                    f"'{weight.name}'. Compute the fisher statistic of the base, or use base_curvature = "
                    "'identity'"
                )

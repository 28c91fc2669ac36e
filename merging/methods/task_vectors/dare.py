"""DARE: drop task-vector entries at random and rescale the rest, then add them up, or only those that agree."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from merging.kernels import cpu
from merging.methods.method import Context, Method, Parameter, Prepared, Weight, register
from merging.methods.task_vectors.elementwise import Block, Deltas, combined
from merging.methods.task_vectors.random_masks import LEVELS, Chance, keys, level
from merging.recipe import Value

AGREE = Parameter(
    "all", "add up all entries, or those with the elected sign (TIES)", choices=("all", "elected"), search=False
)
OF_AGREE = {"all": "all", "elected": "sum"}
"""What the compiled loops call the choices of `AGREE`."""
SEED = Parameter(0, "seed of the random masks", minimum=0, search=False)


@register
class Dare(Method):
    """θ_0 + Σ α_t m_t ∘ τ_t / (1 − p), m_t kept with probability 1 − p (Yu et al. 2024).

    `entries` = `elected` leaves out what disagrees with the sign of the sum (DARE-TIES). p is rounded to 1/65536.
    """

    name = "dare"
    summary = "random drop and rescale of task vectors"
    elementwise = True
    scaling = Parameter(0.3, "scale of the member's task vector", low=0.0, high=1.5)
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "drop": Parameter(0.5, "probability p of dropping an entry", low=0.0, high=0.95, minimum=0.0, maximum=0.999),
        "entries": AGREE,
        "seed": SEED,
    }

    def prepare(self, weights: Sequence[Weight], context: Context) -> Prepared:
        """Keeps references to base and members; random numbers are drawn once for a seed."""
        return PreparedDare(weights)


class PreparedDare(Deltas):
    """Base and members as they are stored; the compiled loops draw as they go, torch keeps two bytes for each entry."""

    def __init__(self, weights: Sequence[Weight]) -> None:
        super().__init__(weights)
        self._chance = Chance()

    def plan(self, members: Sequence[str], factors: Sequence[float], parameters: Mapping[str, Value]) -> Block:
        """Masks in place; the rescaling goes into the factors."""
        dropped, seed = level(float(parameters["drop"])), int(parameters["seed"])
        rescaled = [factor * LEVELS / (LEVELS - dropped) for factor in factors]

        def block(weight: Weight, start: int, deltas: Tensor) -> Tensor:
            first = start - weight.start
            drawn = self.scratch.take("drawn", deltas.shape[1], device=deltas.device)
            for row, member in zip(deltas, members, strict=True):
                drawn.copy_(self._chance.numbers(seed, member, weight)[first : first + deltas.shape[1]])
                # what was drawn at or below the threshold is set to 0, in one pass
                torch.ops.aten.threshold_backward.grad_input(row, drawn, dropped - LEVELS / 2 - 0.5, grad_input=row)
            return combined(deltas, rescaled, str(parameters["entries"]), self.scratch)

        return block

    def rule(
        self, weight: Weight, members: Sequence[str], factors: Sequence[float], parameters: Mapping[str, Value]
    ) -> cpu.Rule:
        """Draws, masks and adds up."""
        dropped, seed = level(float(parameters["drop"])), int(parameters["seed"])
        return cpu.Rule(
            factors=[factor * LEVELS / (LEVELS - dropped) for factor in factors],
            entries=OF_AGREE[str(parameters["entries"])],
            keys=[keys(seed, member, weight.name) for member in members],
            level=dropped,
            offset=weight.start,
        )

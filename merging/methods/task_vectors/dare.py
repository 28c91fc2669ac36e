"""DARE: drop task-vector entries at random and rescale the rest, then add them up, or only those that agree."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from merging.kernels import cpu
from merging.methods.method import Context, Method, Parameter, Prepared, Weight, of_member, register
from merging.methods.task_vectors.elementwise import AGREE, LAMBDA, OF_AGREE, Block, Deltas, combined
from merging.methods.task_vectors.random_masks import LEVELS, Chance, keys, level
from merging.methods.task_vectors.rescaling import RESCALE, NormRatios
from merging.recipe import Value

SEED = Parameter(0, "seed of the random masks", minimum=0, search=False)


@register
class Dare(Method):
    """θ_0 + Σ α_t m_t ∘ τ_t / (1 − p), m_t kept with probability 1 − p (Yu et al. 2024).

    `entries` = `elected` leaves out what disagrees with the sign of the sum (DARE-TIES), `elected_mean` divides what is left by
    its members' Σ |α_t|. `rescale` = `l1` is mergekit's. p is rounded to 1/65536, and may be a member's own (`drop@amazon`).
    """

    name = "dare"
    summary = "random drop and rescale of task vectors"
    elementwise = True
    per_member = ("drop",)
    scaling = Parameter(0.3, "scale of the member's task vector", low=0.0, high=1.5)
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "drop": Parameter(0.5, "probability p of dropping an entry", low=0.0, high=0.95, minimum=0.0, maximum=0.999),
        "entries": AGREE,
        "rescale": RESCALE,
        "lambda": LAMBDA,
        "seed": SEED,
    }

    def is_elementwise(self, parameters: Mapping[str, Value]) -> bool:
        """Unless the norm of a whole weight is asked for."""
        return parameters["rescale"] != "l1"

    def prepare(self, weights: Sequence[Weight], context: Context) -> Prepared:
        """Keeps references to base and members; random numbers are drawn once for a seed."""
        return PreparedDare(weights)


class PreparedDare(Deltas):
    """Base and members as they are stored; the compiled loops draw as they go, torch keeps two bytes for each entry."""

    def __init__(self, weights: Sequence[Weight]) -> None:
        super().__init__(weights)
        self._chance = Chance()
        self._ratios = NormRatios()

    def plan(self, members: Sequence[str], factors: Sequence[float], parameters: Mapping[str, Value]) -> Block:
        """Masks and rescales in place."""
        seed, scale, rescale = int(parameters["seed"]), float(parameters["lambda"]), str(parameters["rescale"])
        levels = {member: level(of_member(parameters, "drop", member)) for member in members}

        def mask(weight: Weight, member: str, first: int, row: Tensor) -> None:
            drawn = self.scratch.take("drawn", len(row), device=row.device)
            drawn.copy_(self._chance.numbers(seed, member, weight)[first : first + len(row)])
            # what was drawn at or below the threshold is set to 0, in one pass
            torch.ops.aten.threshold_backward.grad_input(row, drawn, levels[member] - LEVELS / 2 - 0.5, grad_input=row)

        def block(weight: Weight, start: int, deltas: Tensor) -> Tensor:
            masks = [(seed, levels[member]) for member in members]
            ratios = self._ratios.of(weight, members, masks, mask) if rescale == "l1" else _ratios(levels, rescale)
            for row, member in zip(deltas, members, strict=True):
                mask(weight, member, start - weight.start, row)
            common = ratios[0] if len(set(ratios)) == 1 else 1.0
            if common != ratios[0]:
                deltas.mul_(deltas.new_tensor(ratios)[:, None])
            return combined(deltas, factors, str(parameters["entries"]), self.scratch).mul_(scale * common)

        return block

    def rule(
        self, weight: Weight, members: Sequence[str], factors: Sequence[float], parameters: Mapping[str, Value]
    ) -> cpu.Rule | None:
        """Draws, masks and adds up, where all members have the same p."""
        seed, rescale = int(parameters["seed"]), str(parameters["rescale"])
        levels = {member: level(of_member(parameters, "drop", member)) for member in members}
        if rescale == "l1" or len(set(levels.values())) > 1:
            return None
        return cpu.Rule(
            factors=factors,
            entries=OF_AGREE[str(parameters["entries"])],
            scale=float(parameters["lambda"]) * _ratios(levels, rescale)[0],
            keys=[keys(seed, member, weight.name) for member in members],
            level=next(iter(levels.values())),
            offset=weight.start,
        )


def _ratios(levels: Mapping[str, int], rescale: str) -> list[float]:
    """1 / (1 − p) of every member, or 1."""
    return [LEVELS / (LEVELS - dropped) if rescale == "probability" else 1.0 for dropped in levels.values()]

"""DELLA: DARE with drop probabilities that fall with an entry's rank in its row."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from merging.errors import MethodError
from merging.methods.method import Context, Method, Parameter, Prepared, Weight, of_member, register
from merging.methods.task_vectors.dare import SEED
from merging.methods.task_vectors.elementwise import AGREE, LAMBDA, Block, Deltas, combined
from merging.methods.task_vectors.random_masks import LEVELS, Chance
from merging.methods.task_vectors.rescaling import RESCALE, NormRatios
from merging.recipe import Value


@register
class Della(Method):
    """θ_0 + Σ α_t m_t ∘ τ_t / q_t, m_t kept with probability q_t (Deep et al. 2024).

    q rises evenly from density − ε for the smallest entry of a row (of the last dimension) to density + ε for the
    largest; equal entries share the mean of their ranks, so that none is favoured by its place. `entries` = `elected` leaves
    out what disagrees with the sign of the sum, `elected_mean` divides what is left by its members' Σ |α_t|. `rescale` = `l1`
    is mergekit's. Density and ε may be a member's own (`density@amazon`).
    """

    name = "della"
    summary = "random drop by magnitude rank, and rescale, of task vectors"
    per_member = ("density", "epsilon")
    scaling = Parameter(0.3, "scale of the member's task vector", low=0.0, high=1.5)
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "density": Parameter(0.5, "mean probability of keeping an entry", low=0.1, high=0.9, minimum=0.01, maximum=1.0),
        "epsilon": Parameter(
            0.1, "how far a row's ends lie from the mean probability", low=0.0, high=0.1, minimum=0.0, maximum=0.5
        ),
        "entries": AGREE,
        "rescale": RESCALE,
        "lambda": LAMBDA,
        "seed": SEED,
    }

    def prepare(self, weights: Sequence[Weight], context: Context) -> Prepared:
        """Keeps references to base and members; ranks and random numbers are computed when first asked for."""
        return PreparedDella(weights)


class PreparedDella(Deltas):
    """Base and members as they are stored; two bytes of rank and two of randomness for each member's entry."""

    def __init__(self, weights: Sequence[Weight]) -> None:
        super().__init__(weights)
        self._chance = Chance()
        self._ranks: dict[tuple[str, str], Tensor] = {}
        self._ratios = NormRatios()

    def plan(self, members: Sequence[str], factors: Sequence[float], parameters: Mapping[str, Value]) -> Block:
        """Masks and rescales in place.

        Raises:
            MethodError: Probabilities outside 0 … 1.
        """
        seed, scale, rescale = int(parameters["seed"]), float(parameters["lambda"]), str(parameters["rescale"])
        ends: dict[str, tuple[float, float]] = {}
        for member in members:
            density, epsilon = (of_member(parameters, name, member) for name in ("density", "epsilon"))
            if density - epsilon <= 0 or density + epsilon > 1:
                raise MethodError(f"density {density:g} ± epsilon {epsilon:g} leaves 0 … 1: use a smaller epsilon")
            ends[member] = density, epsilon

        def mask(weight: Weight, member: str, first: int, row: Tensor, by_probability: bool = False) -> None:
            density, epsilon = ends[member]
            keep, chance = (self.scratch.take(name, len(row), device=row.device) for name in ("keep", "chance"))
            keep.copy_(self._rank(weight, member)[first : first + len(row)])
            keep.mul_(2 * epsilon / (LEVELS - 1)).add_(density + epsilon / (LEVELS - 1))
            chance.copy_(self._chance.numbers(seed, member, weight)[first : first + len(row)])
            chance.add_(LEVELS // 2).mul_(1 / LEVELS)
            if by_probability:
                row.div_(keep)
            row.mul_(torch.lt(chance, keep, out=keep))

        def block(weight: Weight, start: int, deltas: Tensor) -> Tensor:
            masks = [(seed, *ends[member]) for member in members]
            ratios = self._ratios.of(weight, members, masks, mask) if rescale == "l1" else None
            for row, member in zip(deltas, members, strict=True):
                mask(weight, member, start - weight.start, row, rescale == "probability")
            if ratios is not None:
                deltas.mul_(deltas.new_tensor(ratios)[:, None])
            return combined(deltas, factors, str(parameters["entries"]), self.scratch).mul_(scale)

        return block

    def _rank(self, weight: Weight, member: str) -> Tensor:
        """Rank of each entry's magnitude in its row, from −32768 for the smallest to 32767 for the largest."""
        if (weight.name, member) not in self._ranks:
            delta = (weight.members[member].float() - weight.base.float()).abs_()
            rows = delta.reshape(-1, delta.shape[-1]) if delta.dim() else delta.reshape(1, 1)
            ordered = rows.sort(dim=1).values
            ranks = torch.searchsorted(ordered, rows, out_int32=True)
            ranks += torch.searchsorted(ordered, rows, out_int32=True, right=True)  # twice the mean rank from 0, plus 1
            most = rows.shape[1] - 1
            share = (ranks - 1) / (2 * most) if most else torch.full(rows.shape, 0.5, device=rows.device)
            self._ranks[weight.name, member] = (
                share.mul_(LEVELS - 1).round_().sub_(LEVELS // 2).to(torch.int16).view(-1)
            )
        return self._ranks[weight.name, member]

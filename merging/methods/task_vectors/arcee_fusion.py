"""Arcee Fusion: task vectors without the entries that are of little importance, by a threshold of each tensor's own."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from merging.kernels.blockwise import blocks_of_rows, difference, smallest
from merging.methods.method import Context, Method, Parameter, Prepared, Weight, register
from merging.methods.task_vectors.elementwise import Block, Deltas, combined
from merging.recipe import Value

QUARTILES = (0.25, 0.5, 0.75)
EPSILON = 1e-8
"""Added to every probability."""


@register
class ArceeFusion(Method):
    """θ_0 + Σ α_t m_t ∘ τ_t, m_t the entries whose importance is at least median + 1.5 (q₃ − q₁) of their tensor's.

    An entry's importance is |τ_t| times the Kullback–Leibler divergence KL(softmax θ_t ‖ softmax θ_0) of its row (of the last
    dimension), and q₁, q₃ are the quartiles. Of one member with factor 1 that is mergekit's `arcee_fusion`, with
    quartiles of all entries instead of a million drawn at random, and divergences in float64: rows of near members differ by
    less than float32 resolves.
    """

    name = "arcee_fusion"
    summary = "task vectors where they are important, by a dynamic threshold"
    signed: ClassVar[bool] = True
    scaling = Parameter(1.0, "scale of the member's masked task vector", low=0.0, high=1.5)

    def prepare(self, weights: Sequence[Weight], context: Context) -> Prepared:
        """Keeps references to base and members; a member's masks are computed when first asked for."""
        return PreparedArceeFusion(weights)


class PreparedArceeFusion(Deltas):
    """Base and members as they are stored; a byte for each entry of a member that was asked for."""

    def __init__(self, weights: Sequence[Weight]) -> None:
        super().__init__(weights)
        self._masks: dict[tuple[str, str], Tensor] = {}

    def plan(self, members: Sequence[str], factors: Sequence[float], parameters: Mapping[str, Value]) -> Block:
        """Masks in place, then adds up."""

        def block(weight: Weight, start: int, deltas: Tensor) -> Tensor:
            for row, member in zip(deltas, members, strict=True):
                row.mul_(self._mask(weight, member)[start : start + deltas.shape[1]])
            return combined(deltas, factors, "all", self.scratch)

        return block

    def _mask(self, weight: Weight, member: str) -> Tensor:
        """Which entries are important [n], bool."""
        if (weight.name, member) not in self._masks:
            importance = self._importance(weight, member)
            places = [int(share * (len(importance) - 1)) for share in QUARTILES]
            first, median, third = smallest(importance, places)
            self._masks[weight.name, member] = importance >= median + 1.5 * (third - first)
        return self._masks[weight.name, member]

    def _importance(self, weight: Weight, member: str) -> Tensor:
        """|τ| KL of every entry [n], float32."""
        width = weight.base.shape[-1] if weight.base.dim() else 1
        base, value = (v.reshape(-1, width) for v in (weight.base, weight.members[member]))
        importance = torch.empty(base.shape, device=base.device)
        for first, last in blocks_of_rows(base, 8):
            p, q = (torch.softmax(v[first:last].double(), dim=1).add_(EPSILON) for v in (value, base))
            divergence = (p * (p.log() - q.log())).sum(dim=1, keepdim=True)
            moved = difference(value[first:last], base[first:last], importance[first:last])
            moved.copy_(moved.abs() * divergence)
        return importance.view(-1)

"""Consensus: task vectors without the entries that matter to too few members, found by TALL masks."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from merging.kernels import cpu
from merging.methods.method import Context, Method, Parameter, Prepared, Weight, register
from merging.methods.task_vectors.elementwise import Block, Deltas, total
from merging.recipe import Value


@register
class Consensus(Method):
    """θ_0 + m ∘ Σ α_t τ_t, m the entries in at least k of the masks |τ_t| > λ |Σ_s τ_s − τ_t| (Wang et al. 2024).

    Σ_s runs over the members that take part; with fewer than k of them, k is their number.
    """

    name = "consensus"
    summary = "task vectors where enough members need them"
    elementwise = True
    scaling = Parameter(0.3, "scale of the member's task vector", low=0.0, high=1.5)
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "lambda": Parameter(
            0.4, "how far an entry must stand out to matter to a member", low=0.1, high=1.0, minimum=0.0
        ),
        "k": Parameter(2, "members that an entry must matter to", choices=(1, 2, 3, 4), search=False),
    }

    def prepare(self, weights: Sequence[Weight], context: Context) -> Prepared:
        """Keeps references to base and members."""
        return PreparedConsensus(weights)


class PreparedConsensus(Deltas):
    """Base and members as they are stored."""

    def plan(self, members: Sequence[str], factors: Sequence[float], parameters: Mapping[str, Value]) -> Block:
        """Counts masks, then adds up."""
        threshold, needed = float(parameters["lambda"]), min(int(parameters["k"]), len(members))

        def block(weight: Weight, start: int, deltas: Tensor) -> Tensor:
            size, device = deltas.shape[1], deltas.device
            whole, other, count = (self.scratch.take(name, size, device=device) for name in ("whole", "other", "count"))
            torch.sum(deltas, dim=0, out=whole)
            count.zero_()
            for row in deltas:
                torch.sub(whole, row, out=other)
                other.abs_().mul_(-threshold).add_(row.abs())
                count.add_(other.clamp_(min=0).sign_())
            mask = torch.ge(count, needed, out=count)
            return total(deltas, torch.tensor(list(factors), device=device), self.scratch).mul_(mask)

        return block

    def rule(
        self, weight: Weight, members: Sequence[str], factors: Sequence[float], parameters: Mapping[str, Value]
    ) -> cpu.Masks:
        """Counts masks, and adds up."""
        return cpu.Masks(factors, float(parameters["lambda"]), min(int(parameters["k"]), len(members)))

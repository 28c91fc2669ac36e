"""RAM: task vectors are averaged where several members move an entry, and kept whole where one does."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from merging.kernels.blockwise import Scratch
from merging.methods.latest import Latest
from merging.methods.method import Context, Method, Parameter, Prepared, Weight, register
from merging.methods.task_vectors.elementwise import Block, Deltas, combined, task_vectors
from merging.recipe import Value

MOVED = Parameter(1e-5, "magnitude above which a member moves an entry", low=1e-6, high=1e-3, log=True, minimum=0.0)


@register
class Ram(Method):
    """θ_0 + Σ α_t m_t ∘ τ_t / Σ_s m_s, m_t the entries that member t moves, |τ_t| > ε (Yuan et al. 2026, reinforced agents).

    Entries that one member alone moves are not diluted by the others.
    """

    name = "ram"
    summary = "mean over those members that move an entry"
    elementwise = True
    scaling = Parameter(1.0, "scale of the member's task vector", low=0.0, high=1.5)
    parameters: ClassVar[Mapping[str, Parameter]] = {"epsilon": MOVED}

    def prepare(self, weights: Sequence[Weight], context: Context) -> Prepared:
        """Keeps references to base and members."""
        return PreparedRam(weights)


@register
class RamPlus(Ram):
    """RAM with entries that member t alone moves scaled by 1 + r min(ρ_t, α), ρ_t its shared entries over its own, by tensor.

    So a member's own entries make up for what is lost of its shared ones in their mean. mergekit's `ramplus_tl`.
    """

    name = "ram_plus"
    summary = "RAM, with entries that one member alone moves scaled up"
    elementwise = False
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "epsilon": MOVED,
        "r": Parameter(0.1, "how much own entries make up for shared ones", low=0.0, high=1.0, minimum=0.0),
        "alpha": Parameter(0.2, "most that ρ counts for", low=0.0, high=1.0, minimum=0.0),
    }

    def prepare(self, weights: Sequence[Weight], context: Context) -> Prepared:
        """Keeps references to base and members; entries are counted for the latest members and ε."""
        return PreparedRamPlus(weights)


def movers(deltas: Tensor, scratch: Scratch) -> Tensor:
    """How many rows of a block [T, n] have an entry other than 0 [n], float32."""
    moved = scratch.take("moved", *deltas.shape, device=deltas.device)
    count = scratch.take("count", deltas.shape[1], device=deltas.device)
    return torch.mv(torch.ne(deltas, 0, out=moved).t(), deltas.new_ones(len(deltas)), out=count)


class PreparedRam(Deltas):
    """Base and members as they are stored."""

    def plan(self, members: Sequence[str], factors: Sequence[float], parameters: Mapping[str, Value]) -> Block:
        """Masks in place, adds up, and divides by how many members move an entry."""
        epsilon = float(parameters["epsilon"])

        def block(weight: Weight, start: int, deltas: Tensor) -> Tensor:
            torch.ops.aten.hardshrink.out(deltas, epsilon, out=deltas)
            count = movers(deltas, self.scratch)
            if scales := self.own_scales(weight, members, parameters):
                alone = count == 1
                for row, scale in zip(deltas, scales, strict=True):
                    row.mul_(torch.where(alone, scale, 1.0))
            return combined(deltas, factors, "all", self.scratch).div_(count.clamp_(min=1))

        return block

    def own_scales(self, weight: Weight, members: Sequence[str], parameters: Mapping[str, Value]) -> Sequence[float]:
        """What the entries that one member alone moves are multiplied by, per member; empty for nothing."""
        return ()


class PreparedRamPlus(PreparedRam):
    """Base and members as they are stored; for the latest members and ε, how many entries are shared."""

    def __init__(self, weights: Sequence[Weight]) -> None:
        super().__init__(weights)
        self._ratios: Latest[Tensor] = Latest()
        self._looking = Scratch()  # a look comes while a block is at hand

    def own_scales(self, weight: Weight, members: Sequence[str], parameters: Mapping[str, Value]) -> Sequence[float]:
        """1 + r min(ρ, α)."""
        epsilon = float(parameters["epsilon"])
        ratios = self._ratios.get(
            (tuple(members), epsilon), lambda: self._ratio(weight, members, epsilon), place=weight.name
        )
        scales: list[float] = (1 + float(parameters["r"]) * ratios.clamp(max=float(parameters["alpha"]))).tolist()
        return scales

    def _ratio(self, weight: Weight, members: Sequence[str], epsilon: float) -> Tensor:
        """Entries that a member shares, over those that are its own, one at least [T]."""
        shared, own = torch.zeros(2, len(members), dtype=torch.float64, device=weight.base.device)
        for _, deltas in task_vectors(weight, members, self._looking):
            count = movers(torch.ops.aten.hardshrink.out(deltas, epsilon, out=deltas), self._looking)
            moved = deltas.ne_(0)
            mine = torch.mv(moved, count.eq(1).float())
            own += mine
            shared += moved.sum(dim=1).sub_(mine)
        ratio: Tensor = shared / own.clamp(min=1)
        return ratio

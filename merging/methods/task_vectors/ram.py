"""RAM: task vectors are averaged where several members move an entry, and kept whole where one does."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from merging.kernels.blockwise import Scratch, cut, difference, step_of, widened
from merging.methods.method import Context, Method, Parameter, Prepared, Weight, register
from merging.methods.task_vectors.elementwise import Block, Deltas, combined
from merging.recipe import Value

MOVED = Parameter(1e-5, "magnitude above which a member moves an entry", low=1e-6, high=1e-3, log=True, minimum=0.0)


@register
class Ram(Method):
    """θ_0 + Σ α_t m_t ∘ τ_t / Σ_s m_s, m_t the entries that member t moves, |τ_t| > ε (reinforced agent merging, 2026).

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
            self.raise_own(weight, members, count, deltas, parameters)
            return combined(deltas, factors, "all", self.scratch).div_(count.clamp_(min=1))

        return block

    def raise_own(
        self,
        weight: Weight,
        members: Sequence[str],
        count: Tensor,
        deltas: Tensor,
        parameters: Mapping[str, Value],
    ) -> None:
        """Scales what one member alone moves, in place."""


class PreparedRamPlus(PreparedRam):
    """Base and members as they are stored; for the latest members and ε, how many entries are shared."""

    def __init__(self, weights: Sequence[Weight]) -> None:
        super().__init__(weights)
        self._counted_for: tuple[tuple[str, ...], float] | None = None
        self._shared: dict[str, Tensor] = {}
        self._looking = Scratch()  # a look comes while a block is at hand

    def raise_own(
        self,
        weight: Weight,
        members: Sequence[str],
        count: Tensor,
        deltas: Tensor,
        parameters: Mapping[str, Value],
    ) -> None:
        """By 1 + r min(ρ, α)."""
        alone = count == 1
        ratios = self._ratios(weight, members, float(parameters["epsilon"]))
        scales = 1 + float(parameters["r"]) * ratios.clamp(max=float(parameters["alpha"]))
        for row, scale in zip(deltas, scales.tolist(), strict=True):
            row.mul_(torch.where(alone, scale, 1.0))

    def _ratios(self, weight: Weight, members: Sequence[str], epsilon: float) -> Tensor:
        """Entries that a member shares, over those that are its own, one at least [T]."""
        key = tuple(members), epsilon
        if key != self._counted_for:
            self._counted_for = key
            self._shared.clear()
        if weight.name not in self._shared:
            shared, own = torch.zeros(2, len(members), dtype=torch.float64, device=weight.base.device)
            values = [weight.members[member].reshape(-1) for member in members]
            step = step_of(weight.base.device, rows=2 * len(members))
            for before, *after in cut((weight.base.reshape(-1), *values), step):
                wide = widened(before, self._looking)
                counted = self._looking.take("counted", len(members), before.numel(), device=before.device)
                for row, value in zip(counted, after, strict=True):
                    difference(value, wide, row)
                count = movers(torch.ops.aten.hardshrink.out(counted, epsilon, out=counted), self._looking)
                moved = counted.ne_(0)
                alone = count.eq(1).float()
                mine = torch.mv(moved, alone)
                own += mine
                shared += moved.sum(dim=1).sub_(mine)
            self._shared[weight.name] = shared / own.clamp(min=1)
        return self._shared[weight.name]

"""SCE: select entries by variance, calculate coefficients by squared magnitudes, erase minority signs."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from merging.kernels.blockwise import Scratch, smallest
from merging.methods.latest import Latest
from merging.methods.method import Context, Method, Parameter, Prepared, Weight, register
from merging.methods.task_vectors.elementwise import LARGEST, Block, Deltas, task_vectors, total
from merging.methods.task_vectors.random_masks import LEVELS, Chance, level
from merging.methods.task_vectors.top_k import EVERYBODY, SEED
from merging.recipe import Value


@register
class Sce(Method):
    """θ_0 + Σ α_t η_t a_t ∘ τ_t / Σ α_t η_t a_t in every tensor (Wan et al. 2024, FuseChat).

    Selected are the entries of largest variance among the members' τ, a share of those that have any; all others are 0.
    η_t = Σ τ_t² over the selected entries; a_t, the entries of τ_t with the sign of Σ α_t τ_t. Equal variances at the
    threshold, which are many in 16-bit models, are kept by a random number of weight and index. Where no entry has any variance
    (one member alone) all are selected, and a share above 0 selects one entry at least.
    """

    name = "sce"
    summary = "entries of large variance, weighted by squared magnitudes"
    scale_free = True
    scaling = Parameter(1.0, "the member's weight in the election and in the mean", low=0.0, high=1.5, minimum=0.0)
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "select": Parameter(
            0.1, "share of entries that are selected, by variance", low=0.05, high=1.0, minimum=0.0, maximum=1.0
        ),
        "lambda": Parameter(1.0, "scale of the merged task vector", low=0.1, high=1.5),
    }

    def prepare(self, weights: Sequence[Weight], context: Context) -> Prepared:
        """Keeps references to base and members; what is selected of the latest members is kept, a byte for each entry."""
        return PreparedSce(weights)


class PreparedSce(Deltas):
    """Base and members as they are stored; for the latest members and share, masks and squared magnitudes."""

    def __init__(self, weights: Sequence[Weight]) -> None:
        super().__init__(weights)
        self._chance = Chance()
        self._looking = Scratch()  # a look comes while a block is at hand
        self._selected: Latest[tuple[Tensor | None, Tensor]] = Latest()

    def plan(self, members: Sequence[str], factors: Sequence[float], parameters: Mapping[str, Value]) -> Block:
        """Selects, elects, and merges what agrees, by α_t η_t."""
        scale, share = float(parameters["lambda"]), float(parameters["select"])
        largest = max(factors) or 1.0

        def block(weight: Weight, start: int, deltas: Tensor) -> Tensor:
            key = tuple(members), share
            mask, squares = self._selected.get(key, lambda: self._select(weight, members, share), place=weight.name)
            if mask is not None:
                deltas.mul_(mask[start : start + deltas.shape[1]])
            votes = deltas.new_tensor([factor / largest for factor in factors])
            limit = total(deltas, votes, self.scratch).mul_(LARGEST).mul_(LARGEST)
            low, high = limit.clamp(max=0), limit.clamp(min=0)
            torch.clamp(deltas, low, high, out=deltas)
            parts = votes.double() * squares
            weights = (parts / (parts.max() if parts.max() > 0 else 1.0)).float()
            merged = torch.mv(deltas.t(), weights)
            agreeing = torch.mv(deltas.sign_().t(), weights).abs_()
            return merged.div_(agreeing.clamp_(min=torch.finfo(torch.float32).tiny)).mul_(scale)

        return block

    def _select(self, weight: Weight, members: Sequence[str], share: float) -> tuple[Tensor | None, Tensor]:
        """The selected entries [n], bool, or None for all; every member's Σ τ² over them [T], float64."""
        mask = None if share >= 1 else self._mask(weight, members, share)
        squares = torch.zeros(len(members), dtype=torch.float64, device=weight.base.device)
        for start, deltas in task_vectors(weight, members, self._looking):
            kept = deltas if mask is None else deltas * mask[start : start + deltas.shape[1]]
            squares += kept.double().square_().sum(dim=1)
        return mask, squares

    def _mask(self, weight: Weight, members: Sequence[str], share: float) -> Tensor | None:
        variance = torch.empty(weight.base.numel(), device=weight.base.device)
        for start, deltas in task_vectors(weight, members, self._looking):
            wide = deltas.double()
            squares = wide.square().sum(dim=0).mul_(len(members))
            spread = squares - wide.sum(dim=0).square_()
            # of equal task vectors the difference is that of two roundings
            variance[start : start + deltas.shape[1]] = spread.masked_fill_(spread <= 1e-12 * squares, 0.0)
        if not share:
            return torch.zeros_like(variance, dtype=torch.bool)
        some = int((variance > 0).sum())
        keep = min(max(round(share * some), 1), some)
        if not some:
            return None
        (least,) = smallest(variance, [len(variance) - keep])
        mask, equal = variance > least, variance == least
        chance = level(float((keep - mask.sum()) / equal.sum()))
        if chance < LEVELS:
            equal &= self._chance.numbers(SEED, EVERYBODY, weight) < chance - LEVELS // 2
        return mask.logical_or_(equal)

"""What makes up for the entries that are dropped from a task vector at random."""

from collections.abc import Callable, Hashable, Sequence
from functools import partial

import torch
from torch import Tensor

from merging.kernels.blockwise import Scratch
from merging.methods.latest import Latest
from merging.methods.method import Parameter, Weight
from merging.methods.task_vectors.elementwise import task_vectors

RESCALE = Parameter(
    "probability",
    "divide what is kept by its probability, or scale it to the L1 norm of the task vector in every tensor, or leave it",
    choices=("probability", "l1", "none"),
    search=False,
)
Mask = Callable[[Weight, str, int, Tensor], None]
"""(weight, member, first entry at hand, entries of the member's task vector): sets those that are dropped to 0."""


class NormRatios:
    """‖τ‖₁ over ‖m ∘ τ‖₁ of whole weights, kept for the latest masks."""

    def __init__(self) -> None:
        self._kept: Latest[float] = Latest()
        self._scratch = Scratch()  # a look comes while a block is at hand

    def of(self, weight: Weight, members: Sequence[str], masks: Sequence[Hashable], mask: Mask) -> list[float]:
        """A weight's ratio for every member; 1 where nothing is kept.

        Args:
            weight: The whole weight.
            members: The members that take part.
            masks: What decides over every member's masks besides weight and member.
            mask: Applies them.
        """
        key = tuple(zip(members, masks, strict=True))
        return [
            self._kept.get(key, partial(self._ratio, weight, member, mask), place=(weight.name, member))
            for member in members
        ]

    def _ratio(self, weight: Weight, member: str, mask: Mask) -> float:
        before, after = torch.zeros(2, dtype=torch.float64, device=weight.base.device)
        for first, (row,) in task_vectors(weight, [member], self._scratch):
            before += row.abs().sum()
            mask(weight, member, first, row)
            after += row.abs().sum()
        return float(before / after) if after > 0 else 1.0

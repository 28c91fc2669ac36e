"""Which rows of a layer's input count: real tokens, and of these only what the task's logits depend on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from merging.statistics.capture.layers import real_rows


@dataclass(frozen=True)
class UsedPositions:
    """A rule for the positions that count.

    Args:
        ranks: Ranks among an example's real positions; empty: all of them.
        from_end: Ranks are counted from the last real position (a decoder's classifier), not from the first (CLS).
    """

    ranks: tuple[int, ...] = ()
    from_end: bool = False

    def take(self, value: Tensor, mask: Tensor | None) -> Tensor:
        """The rows that count [rows, D].

        Args:
            value: [N, …, D].
            mask: Which positions are real [N, S], or None.
        """
        if not self.ranks:
            return real_rows(value, mask)
        rank = _ranks(_real(value, mask), self.from_end)
        return value[torch.isin(rank, torch.tensor(self.ranks, device=rank.device))]


ALL = UsedPositions()


def used_rows(gradient: Tensor | None, mask: Tensor | None) -> UsedPositions:
    """The rule that some examples show: where the logits' gradient for a layer's output is not zero.

    Args:
        gradient: [N, …, D], or None where there is none.
        mask: Which positions are real [N, S], or None.

    Returns:
        The same few ranks of every example, or all real positions where there are no such ranks.
    """
    if gradient is None or gradient.dim() != 3 or (mask is not None and mask.shape != gradient.shape[:2]):
        return ALL
    real = _real(gradient, mask)
    used = (gradient != 0).any(-1) & real
    if bool((used == real).all()) or not bool(used.any()):
        return ALL
    for from_end in (False, True):
        rank = _ranks(real, from_end)
        first, *others = ({int(n) for n in row[there]} for row, there in zip(rank, used, strict=True))
        if all(other == first for other in others):
            return UsedPositions(tuple(sorted(first)), from_end)
    return ALL


def _real(value: Tensor, mask: Tensor | None) -> Tensor:
    """[N, S] bool."""
    return torch.ones(value.shape[:2], dtype=torch.bool, device=value.device) if mask is None else mask.bool()


def _ranks(real: Tensor, from_end: bool) -> Tensor:
    """Rank of each real position among an example's real positions [N, S]; −1 for padding."""
    counted = real.long().flip(1).cumsum(1).flip(1) if from_end else real.long().cumsum(1)
    return torch.where(real, counted - 1, -1)

"""Token ids side by side."""

from collections.abc import Sequence

import torch
from torch import Tensor


def padded(rows: Sequence[Sequence[int]], padding: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids and their mask [N, S]."""
    width = max(len(row) for row in rows)
    ids, mask = torch.full((len(rows), width), padding), torch.zeros(len(rows), width, dtype=torch.long)
    for place, row in enumerate(rows):
        there = slice(width - len(row), width) if left else slice(0, len(row))
        ids[place, there] = torch.tensor(row)
        mask[place, there] = 1
    return ids, mask

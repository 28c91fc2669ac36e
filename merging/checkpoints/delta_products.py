"""What task vectors say of members without any data."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from merging.checkpoints.pool import Pool

ENTRIES = 1 << 20
"""Entries of each task vector that are multiplied at once, in float64: long float32 sums are good to three digits."""


def inner_products(pool: Pool, progress: Callable[[int], None] = lambda done: None) -> npt.NDArray[np.float64]:
    """Inner products of all pairs of task vectors, weight by weight, so that no more than one weight of each is held.

    Args:
        pool: Base and members.
        progress: Told how many more weights are done.

    Returns:
        Gram matrix of the task vectors [T, T] float64, in the order of `pool.members`.
    """
    total = torch.zeros(len(pool.members), len(pool.members), dtype=torch.float64)
    pool.prefetch(pool.weights)
    for name in pool.weights:
        base = pool.base_weight(name).flatten()
        members = [pool.member_weight(member, name).flatten() for member in pool.members]
        for start in range(0, len(base), ENTRIES):
            part = slice(start, start + ENTRIES)
            deltas = torch.stack([member[part].double() for member in members]) - base[part].double()
            total += deltas @ deltas.T
        progress(1)
    return total.numpy()

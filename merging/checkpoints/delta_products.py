"""What task vectors say of members without any data."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from merging.checkpoints.pool import Pool


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
        base = pool.base_weight(name).to(torch.float32).flatten()
        deltas = torch.stack(
            [pool.member_weight(member, name).to(torch.float32).flatten() - base for member in pool.members]
        )
        total += (deltas @ deltas.T).double()
        progress(1)
    return total.numpy()

"""Random numbers that belong to an entry of a member's weight, wherever and in whatever order they are drawn."""

import hashlib

import numpy as np
import torch
from torch import Tensor

LEVELS = 1 << 16
"""Distinct values of a random number: probabilities are multiples of 1 / LEVELS."""


class Chance:
    """One uniform number of 16 bits for each entry; those of the last seed asked for are kept.

    A counter-based generator (Philox), keyed by seed, member and weight, makes the flat index its counter. So a mask
    depends neither on the device nor on which other weights are merged beside this one.
    """

    def __init__(self) -> None:
        self._seed = -1
        self._kept: dict[tuple[str, str], Tensor] = {}

    def numbers(self, seed: int, member: str, weight: str, like: Tensor) -> Tensor:
        """Numbers −32768 … 32767, int16, one for each entry of `like`, flat and on its device."""
        if seed != self._seed:
            self._seed = seed
            self._kept.clear()
        if (member, weight) not in self._kept:
            key = hashlib.sha256(f"{seed}\0{member}\0{weight}".encode()).digest()
            bits = np.random.Philox(key=np.frombuffer(key[:16], dtype=np.uint64)).random_raw(-(-like.numel() // 4))
            numbers = bits.astype("<u8", copy=False).view(np.int16)[: like.numel()]
            self._kept[member, weight] = torch.from_numpy(numbers).to(like.device)
        return self._kept[member, weight]


def level(probability: float) -> int:
    """The nearest number of levels to a probability, 0 … LEVELS."""
    return min(max(round(probability * LEVELS), 0), LEVELS)

"""Random numbers that belong to an entry of a member's weight, wherever and in whatever order they are drawn."""

import hashlib

import numpy as np
import torch
from torch import Tensor

from merging.methods.base import Weight

LEVELS = 1 << 16
"""Distinct values of a random number: probabilities are multiples of 1 / LEVELS."""
DRAWN = 4
"""Numbers that the generator draws at once."""


class Chance:
    """One uniform number of 16 bits for each entry; those of the last seed asked for are kept.

    A generator that can leap ahead (PCG64, half the cost of counter-based ones), seeded by seed, member and weight, leaps to
    the flat index. So a mask depends neither on the device nor on which other weights are merged beside this one.
    """

    def __init__(self) -> None:
        self._seed = -1
        self._kept: dict[tuple[str, str, int], Tensor] = {}

    def numbers(self, seed: int, member: str, weight: Weight) -> Tensor:
        """Numbers −32768 … 32767, int16, one for each entry of the weight, flat and on its device."""
        if seed != self._seed:
            self._seed = seed
            self._kept.clear()
        place = member, weight.name, weight.start
        if place not in self._kept:
            key = hashlib.sha256(f"{seed}\0{member}\0{weight.name}".encode()).digest()
            skipped, first = divmod(weight.start, DRAWN)
            generator = np.random.PCG64(int.from_bytes(key)).advance(skipped)
            last = first + weight.base.numel()
            bits = generator.random_raw(-(-last // DRAWN))
            numbers = bits.astype("<u8", copy=False).view(np.int16)[first:last]
            self._kept[place] = torch.from_numpy(numbers).to(weight.base.device)
        return self._kept[place]


def level(probability: float) -> int:
    """The nearest number of levels to a probability, 0 … LEVELS."""
    return min(max(round(probability * LEVELS), 0), LEVELS)

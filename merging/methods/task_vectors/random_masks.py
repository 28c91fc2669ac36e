"""Random numbers that belong to an entry of a member's weight, wherever and in whatever order they are drawn."""

import hashlib

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from merging.kernels import cpu
from merging.methods.latest import Latest
from merging.methods.method import Weight

LEVELS = cpu.LEVELS
"""Distinct values of a random number: probabilities are multiples of 1 / LEVELS."""
_11, _14, _15, _17 = (np.uint32(shift) for shift in (11, 14, 15, 17))
PIECE = 1 << 16
"""Numbers drawn at a time, which a cache holds."""


def keys(seed: int, member: str, weight: str) -> tuple[int, int]:
    """Two numbers of 32 bits that all random numbers of a member's weight follow from."""
    key = hashlib.sha256(f"{seed}\0{member}\0{weight}".encode()).digest()
    return int.from_bytes(key[:4], "little"), int.from_bytes(key[4:8], "little")


def drawn(key: int, other: int, start: int, stop: int) -> npt.NDArray[np.uint16]:
    """Numbers 0 … 65535 of the entries [start, stop) of a weight.

    Two neighbours, the first with an even index, share the 32 bits that are mixed from half its index and the keys by
    xor with what is shifted down and multiplication by odd numbers (the finalizer of a hash function): so a number depends
    neither on the device nor on what else is drawn. The compiled loops do the same (`loops.random_bits`).
    """
    pairs = np.arange(start >> 1, (stop + 1) >> 1, dtype=np.uint64)
    x: npt.NDArray[np.uint32] = pairs.astype(np.uint32) ^ np.uint32(key)
    x = (x ^ (x >> _17)) * np.uint32(0xED5AD4BB)
    x ^= (pairs >> np.uint64(32)).astype(np.uint32) + np.uint32(other)
    x = (x ^ (x >> _11)) * np.uint32(0xAC4C1B51)
    x = (x ^ (x >> _15)) * np.uint32(0x31848BAB)
    x ^= x >> _14
    return x.astype("<u4", copy=False).view("<u2")[start & 1 :][: stop - start]


class Chance:
    """One uniform number of 16 bits for each entry; those of the last seed asked for are kept."""

    def __init__(self) -> None:
        self._kept: Latest[Tensor] = Latest()

    def numbers(self, seed: int, member: str, weight: Weight) -> Tensor:
        """Numbers −32768 … 32767, int16, one for each entry of the weight, flat and on its device."""
        return self._kept.get(seed, lambda: _numbers(seed, member, weight), place=(member, weight.name, weight.start))


def _numbers(seed: int, member: str, weight: Weight) -> Tensor:
    """See `Chance.numbers`."""
    stream, size = keys(seed, member, weight.name), weight.base.numel()
    numbers = np.empty(size, np.uint16)
    for start in range(0, size, PIECE):
        stop = min(start + PIECE, size)
        numbers[start:stop] = drawn(*stream, weight.start + start, weight.start + stop)
    return torch.from_numpy((numbers ^ LEVELS // 2).view(np.int16)).to(weight.base.device)


def level(probability: float) -> int:
    """The nearest number of levels to a probability, 0 … LEVELS."""
    return min(max(round(probability * LEVELS), 0), LEVELS)

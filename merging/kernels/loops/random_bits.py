"""Random bits that follow from an entry's number and a key: `merging.methods.task_vectors.random_masks` draws the same."""

import numpy as np

from merging.kernels.loops.compiling import inner
from merging.kernels.loops.rows import Array, Scalar


@inner
def draw(drawn: Array, pair: int, count: int, key: Scalar, other: Scalar) -> None:
    """Random bits for pairs of entries, from the number `pair` of the first: the same wherever a tile starts."""
    here = min(count, (1 << 32) - (pair & 0xFFFFFFFF))  # until a number's lower half begins anew
    _draw(drawn[:here], pair, key, other)
    if here < count:
        _draw(drawn[here:count], pair + here, key, other)


@inner
def _draw(drawn: Array, pair: int, key: Scalar, other: Scalar) -> None:
    """The same of numbers that share their upper half.

    A finalizer of three multiplications (xor with what is shifted down, multiply by an odd number), which lets every bit
    of a number and of its key change every bit of what comes out with a probability near a half.
    """
    number, turned = np.uint32(pair & 0xFFFFFFFF), np.uint32(other + np.uint32(pair >> 32))
    for i in range(len(drawn)):
        x = np.uint32(number ^ key)
        number = np.uint32(number + np.uint32(1))  # of its own, as a number of 32 bits: i has 64
        x = np.uint32((x ^ (x >> np.uint32(17))) * np.uint32(0xED5AD4BB))
        x = np.uint32(x ^ turned)
        x = np.uint32((x ^ (x >> np.uint32(11))) * np.uint32(0xAC4C1B51))
        x = np.uint32((x ^ (x >> np.uint32(15))) * np.uint32(0x31848BAB))
        drawn[i] = x ^ (x >> np.uint32(14))

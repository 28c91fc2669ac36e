"""Random bits that follow from an entry's number and a key: `merging.methods.chance` draws the same."""

import numpy as np

from merging.methods.loops.compiling import inner
from merging.methods.loops.rows import Array, Scalar


@inner
def draw(drawn: Array, pair: int, count: int, key: Scalar, other: Scalar) -> None:
    """Random bits for pairs of entries, from the number `pair` of the first: the same wherever a tile starts.

    A finalizer of three multiplications (xor with what is shifted down, multiply by an odd number), which lets every bit
    of a number and of its key change every bit of what comes out with a probability near a half.
    """
    first = np.uint32(pair & 0xFFFFFFFF)
    above = np.uint32(pair >> 32)
    for i in range(count):
        x = np.uint32(first + np.uint32(i))
        turned = np.uint32(other + above + np.uint32(x < first))
        x = np.uint32(x ^ key)
        x = np.uint32((x ^ (x >> np.uint32(17))) * np.uint32(0xED5AD4BB))
        x = np.uint32(x ^ turned)
        x = np.uint32((x ^ (x >> np.uint32(11))) * np.uint32(0xAC4C1B51))
        x = np.uint32((x ^ (x >> np.uint32(15))) * np.uint32(0x31848BAB))
        drawn[i] = x ^ (x >> np.uint32(14))

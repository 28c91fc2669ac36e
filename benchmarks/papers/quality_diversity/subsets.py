"""What the paper's experiments share: its kernel, and what subsets of each size score."""

from itertools import combinations

import numpy as np
import numpy.typing as npt

from benchmarks.papers.bench import Bench
from search.subsets import dpp, dpp_kernel

Subset = tuple[str, ...]
METHODS = ("task_arithmetic", "ties")


def kernel(bench: Bench, *, unit: bool = True) -> npt.NDArray[np.float64]:
    """L with the paper's S (validation examples, not centred), q (gain over the base) and ‖q‖ = 1."""
    base = bench.base("validation").scores
    own = {name: bench.member(name, "validation").scores[bench.own(name)] for name in bench.members}
    q, _ = dpp_kernel.quality(own, {name: base[bench.own(name)] for name in bench.members})
    values = np.array([q[name] for name in bench.members])
    return dpp_kernel.kernel(values / np.linalg.norm(values) if unit else values, bench.similarity())


def mode(bench: Bench, k: int) -> Subset:
    """The most probable subset of k members."""
    return tuple(bench.members[i] for i in dpp.map_subset(kernel(bench), k))


def every(bench: Bench, k: int) -> list[Subset]:
    """All subsets of k members."""
    return list(combinations(bench.members, k))


def expected_size(L: npt.NDArray[np.float64]) -> float:
    """E|Y| = tr L (L + I)⁻¹ of the unconstrained process."""
    values = np.linalg.eigvalsh(L)
    return float((values / (1 + values)).sum())

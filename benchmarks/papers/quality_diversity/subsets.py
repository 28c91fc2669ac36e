"""What the paper's experiments share: its kernel, and what subsets of each size score."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt

from benchmarks.papers.bench import Bench
from search.subsets import dpp, dpp_kernel

Subset = tuple[str, ...]
METHODS = ("task_arithmetic", "ties")
DRAWS = 30
"""Random subsets of a size."""
FEW = 4
"""Up to so many members, subsets of every size are measured."""


def kernel(bench: Bench) -> npt.NDArray[np.float64]:
    """L with the paper's S (validation examples, not centred), q (gain over the base) and ‖q‖ = 1."""
    base = bench.base("validation").scores
    own = {name: bench.member(name, "validation", [bench.own(name)]).mean for name in bench.members}
    q, _ = dpp_kernel.quality(own, {name: base[bench.own(name)] for name in bench.members})
    values = np.array([q[name] for name in bench.members])
    return dpp_kernel.kernel(values / np.linalg.norm(values), bench.similarity())


def mode(bench: Bench, k: int, *, ours: bool = False) -> Subset:
    """The most probable subset of k members by the paper's kernel, or by ours: S of centred representations, equal q."""
    L = bench.similarity(centered=True) if ours else kernel(bench)
    return tuple(bench.members[i] for i in dpp.map_subset(L, k))


def probabilities(bench: Bench, subsets: Sequence[Subset]) -> list[float]:
    """How likely a k-DPP of the paper's kernel draws each of these subsets of one size; they are all there are."""
    logs = dpp.log_determinants(kernel(bench), [[bench.members.index(name) for name in Y] for Y in subsets])
    likely = np.exp(np.asarray(logs) - np.max(logs))
    return [float(value) for value in likely / likely.sum()]


def sizes(bench: Bench) -> tuple[int, ...]:
    """Sizes that subsets are looked at in: all from 2 for a pool of few members, else two of them."""
    count = len(bench.members)
    return tuple(range(2, count)) if count <= FEW else (2, count // 2)


def drawn(bench: Bench, k: int, without: str | None = None) -> list[Subset]:
    """Random subsets of k members, one of them left out or not; where there are no more than `DRAWS`, all of them."""
    subsets = list(combinations([member for member in bench.members if member != without], k))
    if len(subsets) <= DRAWS:
        return subsets
    return [subsets[i] for i in np.random.default_rng(0).choice(len(subsets), DRAWS, replace=False)]


def expected_size(L: npt.NDArray[np.float64]) -> float:
    """E|Y| = tr L (L + I)⁻¹ of the unconstrained process."""
    values = np.linalg.eigvalsh(L)
    return float((values / (1 + values)).sum())

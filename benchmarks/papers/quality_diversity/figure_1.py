"""Figure 1: the members' embeddings, what S is made of, in the two directions in which they differ most."""

from collections.abc import Iterator, Mapping
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from benchmarks.papers.bench import Bench
from benchmarks.papers.result import Claim, Result, verdict
from search.subsets import dpp_kernel

POOLS = ("parts", "sentiment", "images")
DRAWS = 200
Rows: TypeAlias = Mapping[str, npt.NDArray[np.float32]]
"""Member → representations [examples, D]."""
COSINE, CENTERED = "mean cosine (the paper's S)", "mean cosine of centred representations"


def run(bench: Bench) -> Result:
    """Principal coordinates of S, whose distances are those between representations of the same validation examples."""
    result = Result(plot="points", labels=("first principal coordinate", "second"))
    rows = bench.representations()
    S, centered = (dpp_kernel.similarity_from_representations(rows, centered) for centered in (False, True))
    for name, (x, y) in zip(bench.members, _coordinates(S), strict=True):
        result.row(name, round(float(x), 4), round(float(y), 4))
    for quantity, matrix in ((COSINE, S), (CENTERED, centered)):
        for name, row in zip(bench.members, matrix, strict=True):
            for other, value in zip(bench.members, row, strict=True):
                result.row(name, other, float(value), quantity=quantity)
    ranks, gaps = _ranks(rows), [np.subtract(*_ranks(drawn)) for drawn in _resamples(rows)]
    gap, error = ranks[0] - ranks[1], float(np.std(gaps))
    ours = f"centred {ranks[0]:.2f}, not centred {ranks[1]:.2f}, of {len(S)} members: {gap:+.2f} ± {error:.2f}"
    claim = "Ours: centred, representations tell more members apart (effective rank of S)"
    result.claims.append(Claim(claim, ours, verdict(gap, error)))
    return result


def _ranks(rows: Rows) -> tuple[float, float]:
    """The effective rank of S of centred representations, and of the paper's S."""
    both = [dpp_kernel.similarity_from_representations(rows, centered) for centered in (True, False)]
    return dpp_kernel.effective_rank(both[0]), dpp_kernel.effective_rank(both[1])


def _resamples(rows: Rows) -> Iterator[Rows]:
    """The same with examples drawn again, for the error of what is made of them."""
    generator, count = np.random.default_rng(0), len(next(iter(rows.values())))
    for _ in range(DRAWS):
        places = generator.integers(0, count, count)
        yield {name: own[places] for name, own in rows.items()}


def _coordinates(S: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Members in a plane [N, 2] (Gower 1966); signs are those that make the first member's coordinates positive."""
    middle = np.eye(len(S)) - 1 / len(S)
    values, vectors = np.linalg.eigh(middle @ S @ middle)
    places = vectors[:, ::-1][:, :2] * np.sqrt(np.maximum(values[::-1][:2], 0.0))
    return np.asarray(places * np.where(places[0] < 0, -1.0, 1.0))

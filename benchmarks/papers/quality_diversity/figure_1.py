"""Figure 1: the members' embeddings, what S is made of, in the two directions in which they differ most."""

import numpy as np
import numpy.typing as npt

from benchmarks.papers.bench import Bench
from benchmarks.papers.result import Claim, Result
from search.subsets.dpp_kernel import effective_rank

POOLS = ("parts", "sentiment", "images")
COSINE, CENTERED = "mean cosine (the paper's S)", "mean cosine of centred representations"


def run(bench: Bench) -> Result:
    """Principal coordinates of S, whose distances are those between representations of the same validation examples."""
    result = Result(plot="points", labels=("first principal coordinate", "second"))
    S, centered = bench.similarity(), bench.similarity(centered=True)
    for name, (x, y) in zip(bench.members, _coordinates(S), strict=True):
        result.row(name, round(float(x), 4), round(float(y), 4))
    for quantity, matrix in ((COSINE, S), (CENTERED, centered)):
        for name, row in zip(bench.members, matrix, strict=True):
            for other, value in zip(bench.members, row, strict=True):
                result.row(name, other, float(value), quantity=quantity)
    ranks = effective_rank(S), effective_rank(centered)
    result.claims.append(
        Claim(
            "Ours: centred, representations tell more members apart (effective rank of S)",
            f"centred {ranks[1]:.2f}, not centred {ranks[0]:.2f}, of {len(S)} members",
            "agrees" if ranks[1] > ranks[0] else "contradicts",
        )
    )
    return result


def _coordinates(S: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Members in a plane [N, 2] (Gower 1966); signs are those that make the first member's coordinates positive."""
    middle = np.eye(len(S)) - 1 / len(S)
    values, vectors = np.linalg.eigh(middle @ S @ middle)
    places = vectors[:, ::-1][:, :2] * np.sqrt(np.maximum(values[::-1][:2], 0.0))
    return np.asarray(places * np.where(places[0] < 0, -1.0, 1.0))

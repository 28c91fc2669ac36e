"""The merges that several of the paper's experiments look at."""

from collections.abc import Iterator

from benchmarks.papers.bench import Bench
from merging.recipe import Recipe

ALPHAS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5)
"""One scaling factor for all members."""
METHODS = ("task arithmetic", "gradient matching, H₀ = I", "gradient matching, H₀ = Fisher")


def scaled(bench: Bench, method: str, alpha: float, delta: float | None = None) -> Recipe:
    """One of `METHODS` with the same factor for all members; `delta` is 1, or 1e-6 with the base's Fisher."""
    if method == METHODS[0]:
        recipe = bench.default("task_arithmetic")
    else:
        curvature = "fisher" if method == METHODS[2] else "identity"
        delta = delta or (1e-6 if curvature == "fisher" else 1.0)
        recipe = bench.default("gradient_matching", base_curvature=curvature, delta=delta)
    return Recipe(recipe.method, dict.fromkeys(recipe.scaling, alpha), recipe.parameters)


def known(bench: Bench) -> Iterator[str]:
    """The methods that the pool has statistics for: the base's Fisher asks for a task that the base was trained on."""
    yield from METHODS if bench.pool.base_task else METHODS[:2]

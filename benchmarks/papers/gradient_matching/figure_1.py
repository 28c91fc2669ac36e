"""Figure 1: gradient mismatch of a merge (equation 8) against its error, over many candidates, with their correlation."""

import numpy as np
from scipy.stats import pearsonr, spearmanr

from benchmarks.papers.bench import Bench
from benchmarks.papers.gradient_matching.candidates import ALPHAS, known, scaled
from benchmarks.papers.result import Claim, Result

POOLS = ("continued",)
CLAIM = "The larger the gradient mismatch, the larger the error of the merge"
DRAWS = 2000


def run(bench: Bench) -> Result:
    """Mismatch with α = 1, s_t and H₀ = I whatever a candidate was merged by, so that one number orders all of them."""
    result = Result(plot="points", labels=("gradient mismatch, log₁₀", "test error, mean over the members' domains"))
    own = [bench.own(member) for member in bench.members]
    recipes = [scaled(bench, method, alpha) for method in known(bench) for alpha in ALPHAS[::2]]
    recipes += [bench.default(name) for name in ("average", "ties", "fisher", "regmean")]
    points = []
    for recipe in recipes:
        error = 1 - bench.measure(recipe, tasks=own).mean
        exact = float(np.log10(bench.mismatch(recipe).total))
        quadratic = float(np.log10(bench.quadratic(recipe).total))
        points.append((exact, quadratic, error))
        result.row("gradients", exact, error)
        result.row("quadratic form", quadratic, error)
    for number, name in enumerate(("gradients", "quadratic form")):
        xs, ys = np.array([point[number] for point in points]), np.array([point[2] for point in points])
        rank, linear = spearmanr(xs, ys).statistic, pearsonr(xs, ys).statistic
        low, high = _interval(xs, ys)
        ours = f"Spearman {rank:.2f} (95 % of resamples {low:.2f} … {high:.2f}), Pearson {linear:.2f}, {len(xs)} candidates"
        kind = "agrees" if low > 0 else "contradicts" if high < 0 else "no difference"
        result.claims.append(Claim(f"{CLAIM}: by {name}", ours, kind))  # type: ignore[arg-type]
    return result


def _interval(xs: np.ndarray, ys: np.ndarray) -> tuple[float, float]:
    """Bootstrap interval of Spearman's correlation over candidates."""
    generator = np.random.default_rng(0)
    results = []
    for _ in range(DRAWS):
        places = generator.integers(0, len(xs), len(xs))
        if len(set(xs[places])) > 2:
            results.append(spearmanr(xs[places], ys[places]).statistic)
    return float(np.nanquantile(results, 0.025)), float(np.nanquantile(results, 0.975))

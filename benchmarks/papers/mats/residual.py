"""Conjugate gradients from several starts: the residual and the accuracy over iterations."""

from benchmarks.papers.bench import Bench
from benchmarks.papers.result import Result

POOLS = ("sentiment",)
RESIDUAL = "largest residual"
STARTS = ("average", "task_arithmetic", "fisher")
ITERATIONS = (0, 2, 5, 20)
PRECONDITIONED = (2, 5)
"""Iterations with the preconditioner, which is near the solution at once."""


def run(bench: Bench) -> Result:
    """MaTS with the layers' input Grams; the exact solution of the same system is RegMean with ρ = 1."""
    bench.need("gram", "fisher")
    result = Result(plot="lines", labels=("iterations of conjugate gradients", "test accuracy, mean over tasks"))
    recipes = {(start, n): bench.default("mats", start=start, iterations=n) for start in STARTS for n in ITERATIONS}
    ends = {}
    for start in STARTS:
        for iterations in ITERATIONS:
            measured = bench.measure(recipes[start, iterations])
            result.add(f"from {start.replace('_', ' ')}", iterations, measured)
            result.row(f"from {start.replace('_', ' ')}", iterations, measured.report["residual"], quantity=RESIDUAL)
            ends[start, iterations] = measured
    for iterations in PRECONDITIONED:
        name = "from average, preconditioned"
        measured = bench.measure(bench.default("mats", iterations=iterations, preconditioner="kfac"))
        result.add(name, iterations, measured)
        result.row(name, iterations, measured.report["residual"], quantity=RESIDUAL)
    exact = bench.measure(bench.default("regmean", rho=1.0))
    damped = bench.measure(bench.default("regmean"))
    result.add("RegMean, ρ = 1 (exact)", ITERATIONS[-1], exact)
    result.add("RegMean, ρ = 0.9", ITERATIONS[-1], damped)
    last = ITERATIONS[-1]
    result.compare(
        f"{last} iterations from the average are above the average",
        ends["average", last],
        ends["average", 0],
        (f"{last}", "0"),
    )
    best = max(ITERATIONS, key=lambda iterations: bench.measure(recipes["average", iterations], "validation").mean)
    result.compare(
        "Stopping early (where validation is best) is above solving exactly",
        ends["average", best],
        exact,
        (f"{best} iterations", "exact"),
    )
    result.compare(
        "A better start (Fisher averaging) ends higher",
        ends["fisher", last],
        ends["average", last],
        ("Fisher", "average"),
    )
    result.compare("MaTS is above RegMean", ends["average", last], damped, ("MaTS", "RegMean"))
    return result

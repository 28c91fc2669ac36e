"""Figure 2: accuracy over the scaling factor α, task arithmetic beside gradient matching. Which is more robust?"""

from benchmarks.papers.bench import Bench, averaged
from benchmarks.papers.gradient_matching.candidates import ALPHAS, METHODS, known, scaled
from benchmarks.papers.result import Result

POOLS = ("continued", "sentiment", "images")


def run(bench: Bench) -> Result:
    """The curves; their area is the mean over α, example by example, and the worst α is each method's own."""
    result = Result(plot="lines", labels=("scaling factor α of all members", "test accuracy, mean over domains"))
    curves = {}
    for method in known(bench):
        results = {alpha: bench.measure(scaled(bench, method, alpha)) for alpha in ALPHAS}
        for alpha, measured in results.items():
            result.add(method, alpha, measured)
        curves[method] = list(results.values())
    for method in list(curves)[1:]:
        short, name = method.replace("gradient matching", "GM"), method.replace("gradient", "Gradient")
        area = averaged(curves[method]), averaged(curves[METHODS[0]])
        claim = f"{name}, is more robust to α than task arithmetic"
        result.compare(f"{claim}: by area under the curve", *area, names=(short, "TA"))
        worst = [min(curves[each], key=lambda one: one.mean) for each in (method, METHODS[0])]
        result.compare(f"{claim}: by the worst α", *worst, names=(short, "TA"))
        best = [max(curves[each], key=lambda one: one.mean) for each in (method, METHODS[0])]
        claim = f"{name}, is better at its best α (chosen on test, as in the paper)"
        result.compare(claim, *best, names=(short, "TA"))
    return result

"""Table 1: all-data training beside average, Fisher averaging, task arithmetic and gradient matching."""

from collections.abc import Sequence

from benchmarks.papers.bench import Bench, Measured
from benchmarks.papers.gradient_matching.candidates import ALPHAS, METHODS, known, scaled
from benchmarks.papers.result import Result
from merging.recipe import Recipe

POOLS = ("continued",)
DELTAS = (1e-12, 1e-9, 1e-3)
"""Other constants in H₀ than that of the curves."""


def run(bench: Bench) -> Result:
    """Rows of the table; task arithmetic and gradient matching at α = 1, and at the best α on test, as in the paper."""
    result = Result()
    rows: dict[str, Measured] = {"base": bench.base()}
    rows |= {f"member {name}": bench.member(name) for name in bench.members}
    rows["average"] = bench.measure(bench.default("average"))
    rows["fisher"] = bench.measure(bench.default("fisher"))
    for method in known(bench):
        rows[f"{method}, α = 1"] = bench.measure(scaled(bench, method, 1.0))
        curve = [bench.measure(scaled(bench, method, alpha)) for alpha in ALPHAS]
        rows[f"{method}, best α on test"] = max(curve, key=lambda one: one.mean)
    last = list(known(bench))[-1]
    for delta in DELTAS:
        rows[f"{last}, α = 1, δ = {delta:g}"] = bench.measure(scaled(bench, last, 1.0, delta))
    if (whole := bench.all_data()) is not None:
        rows["all data"] = whole
    for name, measured in rows.items():
        result.add(name, "", measured)
    ours = rows[f"{last}, α = 1"]  # H₀ from the base's Fisher, as in the paper, where there is one
    ta = rows[f"{METHODS[0]}, α = 1"]
    result.compare("Gradient matching (α = 1) is above task arithmetic (α = 1)", ours, ta, ("GM", "TA"))
    result.compare("Gradient matching (α = 1) is above Fisher averaging", ours, rows["fisher"], ("GM", "Fisher"))
    result.compare("Gradient matching (α = 1) is above the plain average", ours, rows["average"], ("GM", "average"))
    others = [scaled(bench, last, 1.0, delta) for delta in DELTAS]
    claim = (
        "Control: gradient matching (α = 1) at the δ of three others that validation chooses is above the plain average"
    )
    result.compare(claim, _chosen(bench, others), rows["average"], ("GM", "average"))
    curves = [scaled(bench, method, alpha) for method in list(known(bench))[1:] for alpha in ALPHAS]
    claim = "Control: gradient matching at the H₀ and α that validation chooses is above the plain average"
    result.compare(claim, _chosen(bench, curves), rows["average"], ("GM", "average"))
    result.compare(
        "Fisher averaging is above the plain average", rows["fisher"], rows["average"], ("Fisher", "average")
    )
    if whole is not None:
        result.compare("All-data training is above every merge", whole, max(
            (m for name, m in rows.items() if name != "all data"), key=lambda one: one.mean
        ), ("all data", "best other row"))  # fmt: skip
    return result


def _chosen(bench: Bench, recipes: Sequence[Recipe]) -> Measured:
    """What the best of these on validation scores on test."""
    return bench.measure(max(recipes, key=lambda recipe: bench.measure(recipe, "validation").mean))

"""Figures 3 and 4: pairs of members, and by how much each task drops below its own member."""

from itertools import combinations

import numpy as np

from benchmarks.papers.bench import Bench, Measured, together
from benchmarks.papers.result import Result

POOLS = ("sentiment", "pairs", "tagging", "images")
DROP = "relative drop"
METHODS = ("average", "fisher", "regmean")


def run(bench: Bench) -> Result:
    """The mean relative drop of every pair by every method, on the pair's own tasks."""
    result = Result()
    own = bench.own_members()
    scores: dict[str, list[Measured]] = {method: [] for method in METHODS}
    for pair in combinations(bench.members, 2):
        tasks = [bench.own(member) for member in pair]
        for method in METHODS:
            results = bench.measure(bench.default(method, pair), tasks=tasks)
            scores[method].append(results)
            drops = [_drop(results.scores[task], own.scores[task]) for task in tasks]
            result.row(method, "+".join(pair), float(np.mean(drops)), quantity=DROP)
    for method in METHODS:
        drops = [row["value"] for row in result.rows if row["series"] == method and row["quantity"] == DROP]
        result.row(method, "all pairs", float(np.mean(drops)), quantity=DROP)
    whole = {method: together(results) for method, results in scores.items()}
    result.compare(
        "Over pairs, RegMean is above the average", whole["regmean"], whole["average"], ("RegMean", "average")
    )
    result.compare(
        "Over pairs, RegMean is above Fisher averaging", whole["regmean"], whole["fisher"], ("RegMean", "Fisher")
    )
    return result


def _drop(merged: float, own: float) -> float:
    """Which share of its own member's score a task loses; no number where there is nothing to lose."""
    return 1 - merged / own if own > 0 else float("nan")

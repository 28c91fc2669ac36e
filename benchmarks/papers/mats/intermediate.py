"""Intermediate-task merging: each member in turn is the target, and another is merged into it for the target's sake."""

from collections.abc import Mapping
from typing import Any

from benchmarks.papers.bench import Bench, Measured
from benchmarks.papers.result import Result
from merging.recipe import Recipe

POOLS = ("sentiment", "pairs")
METHODS: Mapping[str, Mapping[str, Any]] = {"linear": {"normalize": True}, "fisher": {}, "mats": {"iterations": 20}}
"""Method → its parameters."""
NAMES = {"linear": "weighted average", "fisher": "Fisher averaging", "mats": "MaTS"}
WEIGHTS = (0.3, 1.0)
"""Of the other member; the target's own is 1."""


def run(bench: Bench) -> Result:
    """Which other member, and with which weight, is chosen on the target's validation examples."""
    result = Result(
        note="The other member and its weight (0.3 or 1 beside 1) are the best on the target's validation data."
    )
    own = bench.own_members()
    result.add("the target's own member", "", own)
    chosen = {method: _chosen(bench, method) for method in METHODS}
    for method, measured in chosen.items():
        result.add(NAMES[method], "", measured)
        claim = f"Merging another member in by {NAMES[method]} is above the target's own member"
        result.compare(claim, measured, own, (NAMES[method], "own member"))
    for other in list(METHODS)[:2]:
        names = (NAMES["mats"], NAMES[other])
        result.compare(f"{names[0]} is above {names[1]}", chosen["mats"], chosen[other], names)
    return result


def _chosen(bench: Bench, method: str) -> Measured:
    """Every target's score on test, merged with what was best on validation."""
    values = {}
    for target in bench.members:
        task = bench.own(target)
        recipes = [
            _recipe(bench, method, target, other, weight)
            for other in bench.members
            for weight in WEIGHTS
            if other != target
        ]
        best = max(recipes, key=lambda recipe: bench.measure(recipe, "validation", [task]).mean)
        values[task] = bench.measure(best, tasks=[task]).values[task]
    return Measured(values)


def _recipe(bench: Bench, method: str, target: str, other: str, weight: float) -> Recipe:
    recipe = bench.default(method, (target, other), **METHODS[method])
    return Recipe(method, {target: 1.0, other: weight}, recipe.parameters)

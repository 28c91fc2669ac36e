"""Table 1: members chosen by the process, merged by task arithmetic and TIES, beside all, random and greedy members."""

from collections.abc import Sequence
from math import comb

import numpy as np

from benchmarks.papers.bench import Bench, Measured, averaged
from benchmarks.papers.quality_diversity.subsets import (
    METHODS,
    drawn,
    expected_size,
    kernel,
    mode,
    probabilities,
    sizes,
)
from benchmarks.papers.result import Claim, Result
from search.subsets import dpp
from search.subsets.greedy import greedy_forward

PLACE = "share of random subsets that score less"
POOLS = ("parts", "sentiment", "images")


def run(bench: Bench) -> Result:
    """Targets seen (the mean over all tasks) and unseen (a task from the members of the others), sizes from 2."""
    result = Result(note="Greedy has what the process has not: labelled validation examples of its target.")
    L = kernel(bench)
    size = expected_size(L)
    result.claims.append(
        Claim(
            "Ours: with ‖q‖ = 1 the process draws fewer than one model (tr L = 1), and its mode is the empty set",
            f"E|Y| = {size:.2f}; largest det L_Y = {max(L.diagonal().max(), 0):.2f} of one member, 1 of none",
            "agrees" if size < 1 and L.diagonal().max() < 1 else "contradicts",
        )
    )
    for method in METHODS:
        _seen(bench, method, result)
    return result


def _seen(bench: Bench, method: str, result: Result) -> None:
    name, count = method.replace("_", " "), len(bench.members)
    whole = bench.measure(bench.default(method))
    result.add(f"{name}, all members", count, whole)
    if bench.has_ensembles:
        result.add("ensemble h_ENS", count, bench.ensemble())
    greedy = _greedy(bench, method) if method == METHODS[0] else {}
    for k in sizes(bench):
        subsets, best, control = drawn(bench, k), mode(bench, k), mode(bench, k, ours=True)
        results = {Y: bench.measure(bench.default(method, Y)) for Y in dict.fromkeys([*subsets, best, control])}
        chosen, others = results[best], [results[Y] for Y in subsets]
        result.add(f"{name}, DPP", k, chosen)
        result.add(f"{name}, random", k, averaged(others))
        claim = f"{name}, k = {k}: the DPP's subset is above"
        result.compare(f"{claim} {len(others)} random subsets", chosen, averaged(others), ("DPP", "random"))
        result.compare(f"{claim} all members", chosen, whole, ("DPP", "all"))
        result.row(f"{name}, DPP", k, _place(chosen, others), quantity=PLACE)
        if len(subsets) == comb(count, k):
            drawn_by_dpp = averaged(others, probabilities(bench, subsets))
            result.add(f"{name}, k-DPP (mean of its draws)", k, drawn_by_dpp)
            claim_drawn = f"{name}, k = {k}: a subset drawn from the k-DPP is above one drawn blindly"
            result.compare(claim_drawn, drawn_by_dpp, averaged(others), ("k-DPP", "random"))
        if k in greedy:
            result.add(f"{name}, greedy on validation", k, greedy[k])
            result.row(f"{name}, greedy on validation", k, _place(greedy[k], others), quantity=PLACE)
            result.compare(f"{claim} the greedy one", chosen, greedy[k], ("DPP", "greedy"))
        result.add(f"{name}, DPP of equal q and centred S", k, results[control])
        result.row(f"{name}, DPP of equal q and centred S", k, _place(results[control], others), quantity=PLACE)
        claim = f"Control: {name}, k = {k}: with equal q and centred S it is above random subsets"
        result.compare(claim, results[control], averaged(others), ("DPP", "random"))
        _unseen(bench, method, k, result)


def _greedy(bench: Bench, method: str) -> dict[int, Measured]:
    """Size → what the greedy subset of that size scores on test."""

    def scores(subsets: Sequence[Sequence[str]]) -> list[float | None]:
        return [bench.measure(bench.default(method, Y), "validation").mean for Y in subsets]

    path = greedy_forward(bench.members, scores, max(sizes(bench)))
    return {len(Y): bench.measure(bench.default(method, Y)) for Y in path if len(Y) in sizes(bench)}


def _unseen(bench: Bench, method: str, k: int, result: Result) -> None:
    """A task from the members of the others, where these are more than k."""
    if len(bench.members) - 1 <= k or not bench.tasks_apart:
        return
    chosen, random = {}, {}
    L = kernel(bench)
    for owner in bench.members:
        task = bench.own(owner)
        others = [i for i, member in enumerate(bench.members) if member != owner]
        subset = tuple(bench.members[others[i]] for i in dpp.map_subset(L[np.ix_(others, others)], k))
        chosen[task] = bench.measure(bench.default(method, subset), tasks=[task]).values[task]
        subsets = [bench.measure(bench.default(method, Y), tasks=[task]) for Y in drawn(bench, k, without=owner)]
        random[task] = averaged(subsets).values[task]
    name = method.replace("_", " ")
    result.add(f"{name}, DPP, unseen target", k, Measured(chosen))
    result.add(f"{name}, random, unseen target", k, Measured(random))
    result.compare(
        f"{name}, k = {k}, unseen target: the DPP's subset is above random subsets",
        Measured(chosen),
        Measured(random),
        ("DPP", "random"),
    )


def _place(one: Measured, drawn: list[Measured]) -> float:
    """Share of random subsets that score less; equal ones count half."""
    return float(np.mean([(other.mean < one.mean) + 0.5 * (other.mean == one.mean) for other in drawn]))

"""Table 1: members chosen by the process, merged by task arithmetic and TIES, beside all members and random subsets."""

import numpy as np

from benchmarks.papers.bench import Bench, Measured, averaged
from benchmarks.papers.quality_diversity.subsets import METHODS, Subset, every, expected_size, kernel, mode
from benchmarks.papers.result import Claim, Result

POOLS = ("images", "sentiment")
DRAWS = 30
"""Random subsets; where there are no more than these, all of them."""


def run(bench: Bench) -> Result:
    """Targets seen (the mean over all tasks) and unseen (a task from the members of the others), sizes from 2."""
    result = Result()
    L = kernel(bench)
    size = expected_size(L)
    result.claims.append(
        Claim(
            "With ‖q‖ = 1 the unconstrained process draws fewer than one model (tr L = 1), and its mode is the empty set",
            f"E|Y| = {size:.2f}; largest det L_Y = {max(L.diagonal().max(), 0):.2f} of one member, 1 of none",
            "agrees" if size < 1 and L.diagonal().max() < 1 else "contradicts",
        )
    )
    for method in METHODS:
        _seen(bench, method, result)
    return result


def _seen(bench: Bench, method: str, result: Result) -> None:
    name = method.replace("_", " ")
    whole = bench.measure(bench.default(method))
    result.add(f"{name}, all members", len(bench.members), whole)
    result.add(f"{name}, ensemble h_ENS", len(bench.members), bench.ensemble())
    for k in range(2, len(bench.members)):
        chosen = mode(bench, k)
        subsets = _drawn(every(bench, k))
        found = {Y: bench.measure(bench.default(method, Y)) for Y in {*subsets, chosen}}
        result.add(f"{name}, DPP", k, found[chosen])
        drawn = [found[Y] for Y in subsets]
        result.add(f"{name}, random", k, averaged(drawn))
        result.compare(
            f"{name}, k = {k}: the DPP's subset is above random subsets",
            found[chosen],
            averaged(drawn),
            ("DPP", "random"),
        )
        result.compare(f"{name}, k = {k}: the DPP's subset is above all members", found[chosen], whole, ("DPP", "all"))
        place = _place(found[chosen], drawn)
        result.row(f"{name}, DPP's place", k, place, task="share of random subsets that score less")
        _unseen(bench, method, k, result)


def _unseen(bench: Bench, method: str, k: int, result: Result) -> None:
    """A task from the members of the others, where these are more than k."""
    if len(bench.members) - 1 <= k:
        return
    chosen, drawn = {}, {}
    L = kernel(bench)
    from search.subsets import dpp

    for owner in bench.members:
        others = [i for i, member in enumerate(bench.members) if member != owner]
        picked = dpp.map_subset(L[np.ix_(others, others)], k)
        subset = tuple(bench.members[others[i]] for i in picked)
        task = bench.own(owner)
        chosen[owner] = bench.measure(bench.default(method, subset)).values[task]
        subsets = [Y for Y in every(bench, k) if owner not in Y]
        drawn[owner] = np.mean([bench.measure(bench.default(method, Y)).values[task] for Y in subsets], axis=0)
    name = method.replace("_", " ")
    result.add(f"{name}, DPP, unseen target", k, Measured(chosen))
    result.add(f"{name}, random, unseen target", k, Measured(drawn))
    result.compare(
        f"{name}, k = {k}, unseen target: the DPP's subset is above random subsets",
        Measured(chosen),
        Measured(drawn),
        ("DPP", "random"),
    )


def _drawn(subsets: list[Subset]) -> list[Subset]:
    if len(subsets) <= DRAWS:
        return subsets
    generator = np.random.default_rng(0)
    return [subsets[i] for i in generator.choice(len(subsets), DRAWS, replace=False)]


def _place(one: Measured, drawn: list[Measured]) -> float:
    """Share of random subsets that score less; equal ones count half."""
    return float(np.mean([(other.mean < one.mean) + 0.5 * (other.mean == one.mean) for other in drawn]))

"""Figure 6: an unseen domain; members join in the order of their single scores on its validation data, or greedily."""

from collections.abc import Sequence
from typing import TypeAlias

from benchmarks.papers.bench import Bench, Measured
from benchmarks.papers.result import Result
from merging.tasks.task import Split
from search.subsets.greedy import greedy_forward

POOLS = ("sentiment", "continued", "topics")
METHODS = ("average", "regmean")
Part: TypeAlias = tuple[str, Measured]
"""The member whose domain is the unseen one, and what a merge of others scores on it."""


def run(bench: Bench) -> Result:
    """Every domain in turn is the unseen one, and the members of the others are merged; means over domains."""
    note = "A domain's head is its own member's: it was trained above another encoder than the merged one."
    shared = "classifier.weight" in bench.weights.weights
    result = Result(
        note="" if shared else note, plot="lines", labels=("members in the merge", "test accuracy on the unseen domain")
    )
    single, greedy = [], []
    prefixes: dict[tuple[str, int], list[Part]] = {}
    validation: dict[int, list[Part]] = {}
    for owner in bench.members:
        target, others = bench.own(owner), [member for member in bench.members if member != owner]
        alone = {member: bench.member(member, "validation", [target]).scores[target] for member in others}
        order = sorted(others, key=lambda member: -alone[member])
        single.append((owner, bench.member(order[0], tasks=[target])))
        for method in METHODS:
            for k in range(1, len(order) + 1):
                results = _merged(bench, method, order[:k], target)
                prefixes.setdefault((method, k), []).append((owner, results))
        for k in range(1, len(order) + 1):
            results = _merged(bench, "regmean", order[:k], target, "validation")
            validation.setdefault(k, []).append((owner, results))

        def scores(subsets: Sequence[Sequence[str]], target: str = target) -> list[float | None]:
            return [_merged(bench, "regmean", Y, target, "validation").mean for Y in subsets]

        path = greedy_forward(others, scores)
        best = max(path, key=lambda Y: scores([Y])[0] or 0.0)
        greedy.append((owner, _merged(bench, "regmean", best, target)))
    for (method, k), parts in prefixes.items():
        result.add(f"{method}, prefixes", k, _unseen(parts))
    most = len(bench.members) - 1
    result.add("regmean, greedy on validation", most, _unseen(greedy))
    ours = _unseen(prefixes["regmean", most])
    result.compare(
        "On an unseen domain, RegMean of all is above the best single member",
        ours,
        _unseen(single),
        ("RegMean", "member"),
    )
    average = _unseen(prefixes["average", most])
    result.compare(
        "On an unseen domain, RegMean of all is above their plain average", ours, average, ("RegMean", "average")
    )
    length = max(validation, key=lambda k: _unseen(validation[k]).mean)
    result.compare(
        "A prefix of the best members, its length chosen on validation, is above all members",
        _unseen(prefixes["regmean", length]),
        ours,
        (f"{length} of them", f"all {most}"),
    )
    return result


def _merged(bench: Bench, method: str, subset: Sequence[str], target: str, split: Split = "test") -> Measured:
    """A subset's merge on one task; a single member is itself."""
    if len(subset) == 1:
        return bench.member(subset[0], split, [target])
    return bench.measure(bench.default(method, subset), split, [target])


def _unseen(parts: Sequence[Part]) -> Measured:
    return Measured({owner: values for owner, results in parts for values in results.values.values()})

"""Table 2: members, ensemble, average, Fisher averaging, RegMean and multi-task training."""

from benchmarks.papers.bench import Bench, Measured, averaged
from benchmarks.papers.result import Result
from merging.recipe import base_recipe

UNSEEN = "score on tests that belong to no member"
HEAD = ("bert.pooler.", "classifier.")
"""A head that all members share, and the layer below it that only it reads."""
POOLS = ("sentiment", "parts", "pairs", "topics", "topic-parts", "tagging", "images", "seq2seq")


def run(bench: Bench) -> Result:
    """The rows of the table on one pool; RegMean propagated is ours and not the paper's."""
    members = {name: bench.member(name) for name in bench.members}
    validation = {name: bench.member(name, "validation").mean for name in bench.members}
    rows: dict[str, Measured] = {
        "base": bench.base(),
        "members, mean": averaged(list(members.values())),
        "members, best by validation": members[max(validation, key=lambda name: validation[name])],
        **({"members, each on its own task": bench.own_members()} if bench.tasks_apart else {}),
        **({"ensemble": bench.ensemble()} if bench.has_ensembles else {}),
        "average": bench.measure(bench.default("average")),
        "fisher": bench.measure(bench.default("fisher")),
        "regmean": bench.measure(bench.default("regmean")),
    }
    if shared := "classifier.weight" in bench.weights.weights:
        rows["regmean, pooler and head averaged"] = bench.measure(bench.default("regmean"), averaged=HEAD)
    if (whole := bench.all_data()) is not None:
        rows["multi-task"] = whole
    result = Result()
    for name, measured in rows.items():
        result.add(name, "", measured)
    if bench.unseen:
        _unseen(bench, result)
    regmean = rows["regmean"]
    result.compare("RegMean is above Fisher averaging", regmean, rows["fisher"], ("RegMean", "Fisher"))
    result.compare(
        "Fisher averaging is above the plain average", rows["fisher"], rows["average"], ("Fisher", "average")
    )
    best = rows["members, best by validation"]
    result.compare("RegMean is above the best member", regmean, best, ("RegMean", "best member"))
    if "ensemble" in rows:
        result.compare("RegMean is above the ensemble", regmean, rows["ensemble"], ("RegMean", "ensemble"))
    if shared:
        part = rows["regmean, pooler and head averaged"]
        claim = "Control: RegMean of all but the pooler and the shared head, which are averaged, is above RegMean"
        result.compare(claim, part, regmean, ("all but the head", "RegMean"))
        claim = (
            "Control: RegMean of all but the pooler and the shared head, which are averaged, is above the plain average"
        )
        result.compare(claim, part, rows["average"], ("all but the head", "average"))
    if whole is not None:
        result.compare("Multi-task training is above RegMean", whole, regmean, ("multi-task", "RegMean"))
    return result


def _unseen(bench: Bench, result: Result) -> None:
    """Merges beside the ensemble on tasks that belong to no member."""
    rows = {name: bench.measure(bench.default(name), tasks=bench.unseen) for name in ("average", "fisher", "regmean")}
    rows = {"base": bench.measure(base_recipe(), tasks=bench.unseen), **rows}
    if bench.has_ensembles:
        rows["ensemble"] = bench.ensemble(tasks=bench.unseen)
    members = [bench.member(name, tasks=bench.unseen) for name in bench.members]
    rows["members, mean"] = averaged(members)
    rows["members, best on these tests"] = max(members, key=lambda one: one.mean)
    for name, measured in rows.items():
        for task, score in measured.scores.items():
            result.row(name, task, 100 * score, quantity=UNSEEN)
        result.row(name, "unseen mean", 100 * measured.mean, 100 * measured.error, quantity=UNSEEN)
    claim = "On unseen domains, RegMean of all is above"
    result.compare(
        f"{claim} the best member (chosen on test)",
        rows["regmean"],
        rows["members, best on these tests"],
        ("RegMean", "member"),
    )
    result.compare(f"{claim} the plain average", rows["regmean"], rows["average"], ("RegMean", "average"))
    result.compare(f"{claim} Fisher averaging", rows["regmean"], rows["fisher"], ("RegMean", "Fisher"))

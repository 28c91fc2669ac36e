"""Subsets chosen by quality and diversity, beside greedy and random ones and the best that there are.

    python benchmarks/selection.py runs/quickstart

Every subset of a finished campaign's members is merged once, by one method at its defaults, and measured on the first
examples of each task's validation and test split (kept in a file, to be read at the next call). Then each policy chooses
with what it may see (the DPP q and S of the campaign's selection, greedy the validation scores), and the tables tell what
its subsets score on test: in the mean over all tasks, and on each task from the members of the *other* tasks alone, as
where the target is a task that none of them was trained on. The last table ranks what each policy has of a size among all
subsets of that size, and what it ends with among all of two members or more; a random subset is the mean of these, and
differences from it are paired over the test examples.
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flows.config.campaign_file import load_campaign
from merging.checkpoints.pool import Pool
from merging.evaluation.live_models import LiveModels, best_device
from merging.evaluation.steps import EvaluationPlan
from merging.mergers.material import Material, open_statistics
from merging.methods import METHODS
from merging.tasks import make_task
from merging.tasks.predictions import Predictions
from merging.tasks.task import Split, Task
from search.subsets import dpp, dpp_kernel
from search.subsets.choose_subsets import Selection
from search.subsets.greedy import greedy_forward, greedy_soup

Subset = tuple[str, ...]
Floats = npt.NDArray[np.float64]
Scores = Mapping[str, Mapping[Subset, Mapping[str, Floats]]]
"""Split → subset → task → one number an example [N], whose mean is the score."""


@dataclass(frozen=True)
class Ended:
    """What a policy ends with.

    Args:
        policy: Its name.
        measured: Merges that it had measured on validation.
        subset: The best of those on validation.
        size: Where only subsets of one size were asked for.
    """

    policy: str
    measured: int
    subset: Subset
    size: int | None = None


def recording(task: Task) -> list[Predictions]:
    """Lets a task remember its predictions: a trace has none of what metrics of all predictions are made of."""
    seen: list[Predictions] = []
    predict = task.predict

    def remember(*given: Any, **named: Any) -> Predictions:
        seen.append(predict(*given, **named))
        return seen[-1]

    task.predict = remember  # type: ignore[method-assign]
    return seen


def values(task: Task, predictions: Predictions) -> Floats:
    """One number an example, whose mean is the score; of a ratio of sums (token accuracy) by the delta method."""
    score = task.score(predictions)
    if score.is_mean:
        return predictions.values
    if score.metric != "token_accuracy":
        raise SystemExit(f"{score.metric} is neither a mean over examples nor a ratio of such")
    right, words = (np.asarray(predictions.payload[name], np.float64) for name in ("right", "words"))
    ratio: Floats = score.value + (right - score.value * words) / words.mean()
    return ratio


def measured(directory: Path, method: str, examples: int, cache: Path) -> Scores:
    """What the merge of every subset scores, from the cache or measured now."""
    campaign = load_campaign(str(directory / "campaign.yaml"))
    members = {name: member.checkpoint for name, member in campaign.members.items()}
    subsets = [Y for k in range(1, len(members) + 1) for Y in combinations(sorted(members), k)]
    result = json.loads(cache.read_text()) if cache.exists() else {}
    splits: list[Split] = ["validation", "test"]
    wanted = [(split, Y) for split in splits for Y in subsets]
    keys = {entry: f"{method} {examples} {entry[0]} {'+'.join(entry[1])}" for entry in wanted}
    if any(key not in result for key in keys.values()):
        kinds = METHODS[method].needs({}).members
        files = {
            name: tuple(
                max((directory / "statistics").glob(f"{name}.{kind}.*"), key=_time).as_posix() for kind in kinds
            )
            for name in members
        }
        owners = campaign.owners()
        tasks = [
            make_task(name, settings, members[owners[name]], campaign.base) for name, settings in campaign.tasks.items()
        ]
        seen = {task.name: recording(task) for task in tasks}
        pool = Pool.open(campaign.base, members, campaign.heads)
        material = Material(pool, open_statistics(pool, files), {})
        live = LiveModels(material, tasks, owners, best_device(), campaign.resources.precision)
        for (split, Y), key in keys.items():
            if key not in result:
                for predictions in seen.values():
                    predictions.clear()
                live.measure(METHODS[method].default_recipe(Y, pool.model_type), split, examples, EvaluationPlan())
                joined = {task: Predictions.join(seen[task.name]) for task in tasks}
                result[key] = {task.name: values(task, own).round(6).tolist() for task, own in joined.items()}
                cache.write_text(json.dumps(result))
    return {
        split: {Y: {task: np.array(own) for task, own in result[keys[split, Y]].items()} for Y in subsets}
        for split in ("validation", "test")
    }


def _time(path: Path) -> float:
    return path.stat().st_mtime


def table(scores: Scores, selection: Selection, members: Sequence[str], tasks: Sequence[str]) -> list[list[str]]:
    """A line for each size, a column for each policy: what its subset scores on test."""

    def score(split: str, Y: Subset) -> float:
        return 100 * mean(scores[split][Y], tasks)

    sizes = sorted({len(Y) for Y in scores["test"] if set(Y) <= set(members)})
    path = {len(Y): Y for Y in greedy_path(scores, members, tasks)}
    lines = []
    for k in sizes:
        every = [score("test", Y) for Y in combinations(sorted(members), k)]
        by_q, by_equal = (chosen(selection, members, k, equal=equal) for equal in (False, True))
        figures = [score("test", Y) if Y else float("nan") for Y in (by_q, by_equal, path[k])]
        figures += [float(np.mean(every)), min(every), max(every)]
        lines.append([str(k), *(f"{figure:.1f}" for figure in figures)])
    return lines


def mean(values: Mapping[str, Floats], tasks: Iterable[str]) -> float:
    """The mean over tasks."""
    return float(np.mean([values[task].mean() for task in tasks]))


def chosen(selection: Selection, members: Sequence[str], k: int, *, equal: bool = False) -> Subset:
    """The DPP's subset of a size; empty where its kernel has no such one."""
    assert selection.similarity is not None, "the campaign's selection has no S: let it run with mode dpp-map"
    place = [selection.names.index(name) for name in members]
    q = [1.0 if equal else selection.quality[name] for name in members]
    L = dpp_kernel.kernel(q, selection.similarity[np.ix_(place, place)])
    return tuple(sorted(members[i] for i in dpp.map_subset(L, k))) if k <= dpp.rank(L) else ()


def greedy_path(scores: Scores, members: Sequence[str], tasks: Sequence[str]) -> list[Subset]:
    """The subsets of greedy forward selection by validation, of every size."""
    own = scores["validation"]
    return greedy_forward(members, lambda Ys: [mean(own[Y], tasks) for Y in Ys], len(members))


def ends(scores: Scores, selection: Selection, members: Sequence[str], tasks: Sequence[str]) -> list[Ended]:
    """What each policy ends with: the best on validation of the subsets of two members or more that it proposes."""
    own, sizes = scores["validation"], range(2, len(members) + 1)

    def best(policy: str, Ys: Iterable[Subset], measured: int | None = None) -> Ended:
        proposed = list(dict.fromkeys(Y for Y in Ys if len(Y) > 1))
        return Ended(policy, measured or len(proposed), max(proposed, key=lambda Y: mean(own[Y], tasks)))

    N, everyone = len(members), tuple(sorted(members))
    path = greedy_path(scores, members, tasks)
    sized = [
        Ended(f"{policy}, k = {k}", measured, Y, k)
        for k in range(2, N)
        for policy, measured, Y in (
            ("DPP, q", 0, chosen(selection, members, k)),
            ("DPP, equal q", 0, chosen(selection, members, k, equal=True)),
            ("greedy forward", sum(range(N, N - k, -1)), path[k - 1]),
        )
        if Y
    ]
    return [
        *sized,
        Ended("all members", 0, everyone),
        best("DPP, q", [*(chosen(selection, members, k) for k in sizes), everyone]),
        best("DPP, equal q", [*(chosen(selection, members, k, equal=True) for k in sizes), everyone]),
        best("greedy forward", path, N * (N + 1) // 2),
        best("every subset", own),
    ]


def ranking(scores: Scores, ended: Sequence[Ended], tasks: Sequence[str]) -> list[list[str]]:
    """A line for each policy: its rank on test among the subsets that there are, and how far it is from a random one."""
    lines = []
    for end in ended:
        every = {Y: own for Y, own in scores["test"].items() if (len(Y) == end.size if end.size else len(Y) > 1)}
        order = sorted((mean(own, tasks) for own in every.values()), reverse=True)
        score = mean(every[end.subset], tasks)
        apart = {
            task: every[end.subset][task] - np.mean([own[task] for own in every.values()], axis=0) for task in tasks
        }
        error = np.sqrt(sum(own.var(ddof=1) / len(own) for own in apart.values())) / len(apart)
        gain = f"{100 * mean(apart, tasks):+.1f} ± {100 * error:.1f}".replace("-", "−")
        rank = f"{1 + sum(other > score + 1e-12 for other in order)} of {len(order)}"
        lines.append([end.policy, " ".join(end.subset), str(end.measured), f"{100 * score:.1f}", rank, gain])
    return lines


def show(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Prints a table in Markdown."""
    print(f"\n{title}\n\n| " + " | ".join(columns) + " |\n" + "|---" + "|---:" * (len(columns) - 1) + "|")
    for line in lines:
        print("| " + " | ".join(line) + " |")


def averaged(tables: Sequence[Sequence[Sequence[str]]]) -> list[list[str]]:
    """The mean of tables, figure by figure."""
    figures = np.array([[[float(entry) for entry in line[1:]] for line in lines] for lines in tables]).mean(axis=0)
    return [[first[0], *(f"{figure:.1f}" for figure in line)] for first, line in zip(tables[0], figures, strict=True)]


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="a finished campaign's")
    parser.add_argument("--method", default="average", help="what merges, at its defaults")
    parser.add_argument("--examples", type=int, default=200, help="of each task and split")
    parser.add_argument("--cache", type=Path, help="file of the scores; by default in the directory")
    given = parser.parse_args()
    cache = given.cache or given.directory / "subsets.json"
    scores = measured(given.directory, given.method, given.examples, cache)
    selection = Selection.from_dict(json.loads((given.directory / "selection.json").read_text()))
    campaign = load_campaign(str(given.directory / "campaign.yaml"))
    members, tasks = sorted(campaign.members), list(campaign.tasks)
    columns = ["k", "DPP, q", "DPP, equal q", "greedy forward", "random (mean)", "worst", "best"]
    lines = table(scores, selection, members, tasks)
    own = scores["validation"]
    picked = greedy_soup(members, lambda Ys: [mean(own[Y], tasks) for Y in Ys])
    show(f"Mean over all tasks, {given.method} (the greedy soup is {' '.join(picked)})", columns, lines)
    unseen = []
    for task, owner in campaign.owners().items():
        others = [name for name in members if name != owner and campaign.task_of(name) != task]
        unseen.append(table(scores, selection, others, [task]))
    show(f"A task from the members of the others, mean over tasks, {given.method}", columns, averaged(unseen))
    columns = ["chosen by", "subset", "merges measured", "test mean", "rank", "less a random subset"]
    lines = ranking(scores, ends(scores, selection, members, tasks), tasks)
    show(f"What each policy ends with, {given.method}", columns, lines)


if __name__ == "__main__":
    main()

"""Subsets chosen by quality and diversity, beside greedy and random ones and the best that there are.

    python benchmarks/selection.py runs/quickstart

Every subset of a finished campaign's members is merged once, by one method at its defaults, and measured on the first
examples of each task's validation and test split (kept in a file, to be read at the next call). Then each policy chooses
with what it may see (the DPP q and S of the campaign's selection, greedy the validation scores), and the table tells what
its subsets score on test: in the mean over all tasks, and on each task from the members of the *other* tasks alone, as
where the target is a task that none of them was trained on.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from flows.config.campaign_file import load_campaign
from merging.checkpoints.pool import Pool
from merging.evaluation.live_models import LiveModels, best_device
from merging.mergers.material import Material, open_statistics
from merging.methods import METHODS
from merging.tasks import make_task
from search.subsets import dpp, dpp_kernel
from search.subsets.choose_subsets import Selection
from search.subsets.greedy import greedy_forward, greedy_soup

Subset = tuple[str, ...]
Scores = Mapping[str, Mapping[Subset, Mapping[str, float]]]
"""Split → subset → task → score."""


def measured(directory: Path, method: str, examples: int, cache: Path) -> Scores:
    """What the merge of every subset scores, from the cache or measured now."""
    campaign = load_campaign(str(directory / "campaign.yaml"))
    members = {name: member.checkpoint for name, member in campaign.members.items()}
    subsets = [Y for k in range(1, len(members) + 1) for Y in combinations(sorted(members), k)]
    found = json.loads(cache.read_text()) if cache.exists() else {}
    wanted = [(split, Y) for split in ("validation", "test") for Y in subsets]
    keys = {entry: f"{method} {examples} {entry[0]} {'+'.join(entry[1])}" for entry in wanted}
    if any(key not in found for key in keys.values()):
        files = {
            name: tuple(sorted(map(str, (directory / "statistics").glob(f"{name}.*.safetensors")))) for name in members
        }
        owners = campaign.owners()
        tasks = [make_task(name, settings, members[owners[name]]) for name, settings in campaign.tasks.items()]
        pool = Pool.open(campaign.base, members, campaign.heads)
        live = LiveModels(Material(pool, open_statistics(pool, files), {}), tasks, owners, best_device())
        for (split, Y), key in keys.items():
            if key not in found:
                scores = live.measure(METHODS[method].default_recipe(Y), split, examples).scores
                found[key] = {task: score.value for task, score in scores.items()}
                cache.write_text(json.dumps(found))
    return {split: {Y: found[keys[split, Y]] for Y in subsets} for split in ("validation", "test")}


def table(scores: Scores, selection: Selection, members: Sequence[str], value: Callable[..., float]) -> list[list[str]]:
    """A line for each size, a column for each policy: what its subset scores on test."""

    def score(split: str, Y: Subset) -> float:
        return 100 * value(scores[split][Y])

    path = {len(Y): Y for Y in greedy_forward(members, lambda Ys: [score("validation", Y) for Y in Ys], len(members))}
    soup = greedy_soup(members, lambda Ys: [score("validation", Y) for Y in Ys])
    place = [selection.names.index(name) for name in members]
    assert selection.similarity is not None, "the campaign's selection has no S: let it run with mode dpp-map"
    S = selection.similarity[np.ix_(place, place)]
    lines = []
    for k in range(1, len(members) + 1):
        every = [score("test", Y) for Y in combinations(sorted(members), k)]
        chosen = {}
        for name, q in (("q", [selection.quality[m] for m in members]), ("equal", [1.0] * len(members))):
            L = dpp_kernel.kernel(q, S)
            picked = dpp.map_subset(L, k) if k <= dpp.rank(L) else ()
            chosen[name] = score("test", tuple(sorted(members[i] for i in picked))) if picked else float("nan")
        figures = [chosen["q"], chosen["equal"], score("test", path[k]), float(np.mean(every)), min(every), max(every)]
        mark = " *" if len(soup) == k else ""
        lines.append([f"{k}{mark}", *(f"{figure:.1f}" for figure in figures)])
    return lines


def show(title: str, lines: Sequence[Sequence[str]]) -> None:
    """Prints a table in Markdown."""
    starred = any("*" in line[0] for line in lines)
    print(f"\n{title}{' (* the size of the greedy soup)' if starred else ''}\n")
    print("| k | DPP, q | DPP, equal q | greedy forward | random (mean) | worst | best |\n" + "|---|" + "---:|" * 6)
    for line in lines:
        print("| " + " | ".join(line) + " |")


def averaged(tables: Sequence[Sequence[Sequence[str]]]) -> list[list[str]]:
    """The mean of tables, figure by figure."""
    figures = np.array([[[float(entry) for entry in line[1:]] for line in lines] for lines in tables]).mean(axis=0)
    return [[str(k), *(f"{figure:.1f}" for figure in line)] for k, line in enumerate(figures, start=1)]


def main() -> None:
    """Prints both tables."""
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
    members = sorted(campaign.members)
    lines = table(scores, selection, members, lambda found: float(np.mean(list(found.values()))))
    show(f"Mean over all tasks, {given.method}", lines)
    unseen = []
    for task, owner in campaign.owners().items():
        others = [name for name in members if name != owner and campaign.task_of(name) != task]
        unseen.append(table(scores, selection, others, lambda found, task=task: found[task]))
    show(f"A task from the members of the others, mean over tasks, {given.method}", averaged(unseen))


if __name__ == "__main__":
    main()

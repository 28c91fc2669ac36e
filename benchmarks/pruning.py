"""Examples that pruning, halving and anchor examples save, and what they cost, replayed over a finished campaign.

    python benchmarks/pruning.py runs/quickstart

Every candidate of the campaign is measured once on the whole validation split, outcome by outcome (kept in the campaign's
directory, to be read at the next call). Then each policy decides over them again and again, the examples in random orders,
and its winner is compared with the best of all candidates. Tasks' metrics must be means of examples.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import binomtest, spearmanr

from flows.config.campaign_file import load_campaign
from merging.checkpoints.pool import Pool
from merging.evaluation.live_models import LiveModels, best_device
from merging.evaluation.steps import EvaluationPlan, Trace
from merging.mergers.material import Material, open_statistics
from merging.tasks import make_task
from merging.tasks.task import Score
from search.early_stopping.anchor_examples import choose
from search.early_stopping.halving import Behind, is_rung
from search.early_stopping.wilcoxon import WorseThan
from search.ledger.ledger import Ledger
from search.ledger.row import Row
from search.objective import make_objective


@dataclass(frozen=True)
class Played:
    """What a policy made of a campaign: the share of the search's examples that it took, and its winner's lag."""

    share: float
    regret: float


def outcomes(directory: str, rows: Sequence[Row]) -> dict[str, Trace]:
    """Candidate → its trace on the whole validation split, from the directory's file or measured now."""
    cache = Path(directory) / "outcomes.json"
    measured = json.loads(cache.read_text()) if cache.exists() else {}
    missing = [row for row in rows if row.candidate not in measured]
    if missing:
        campaign = load_campaign(str(Path(directory) / "campaign.yaml"))
        members = {name: member.checkpoint for name, member in campaign.members.items()}
        place = Path(directory) / "statistics"
        files = {name: tuple(sorted(map(str, place.glob(f"{name}.*.safetensors")))) for name in members}
        owners = campaign.owners()
        tasks = [make_task(name, settings, members[owners[name]]) for name, settings in campaign.tasks.items()]
        pool = Pool.open(campaign.base, members, campaign.heads)
        sizes = {task.name: task.size("train") for task in tasks}
        examples = {name: sizes[task] for name in members if (task := campaign.task_of(name))}
        live = LiveModels(Material(pool, open_statistics(pool, files), examples), tasks, owners, best_device())
        for row in missing:
            trace = live.measure(row.recipe, "validation", plan=EvaluationPlan()).trace
            assert trace is not None
            measured[row.candidate] = trace.as_dict()
            cache.write_text(json.dumps(measured))
    return {row.candidate: Trace.from_dict(measured[row.candidate]) for row in rows}


def in_steps(whole: Trace, order: Mapping[str, np.ndarray], steps: int) -> Trace:
    """The trace that measuring in an order and in so many steps would have left."""
    values = {task: whole.values[task][order[task]] for task in whole.values}
    chosen = {task: whole.surrogates[task][order[task]] for task in whole.surrogates}
    scores = []
    for number in range(1, steps + 1):
        part = {task: len(measured) * number // steps for task, measured in values.items()}
        scores.append(
            {
                task: Score(
                    float(values[task][:count].mean()),
                    float(values[task][:count].std() / np.sqrt(count)),
                    count,
                    whole.scores[-1][task].metric,
                    expected_error=1 - float(chosen[task][:count].mean()),
                    is_mean=True,
                )
                for task, count in part.items()
            }
        )
    return Trace(scores, values, chosen)


def cut(trace: Trace, steps: int) -> Trace:
    """A trace's first steps."""
    scores = trace.scores[:steps]
    counts = {task: score.examples for task, score in scores[-1].items()}
    return Trace(
        scores,
        {task: measured[: counts[task]] for task, measured in trace.values.items()},
        {task: measured[: counts[task]] for task, measured in trace.surrogates.items()},
    )


Stops = Callable[[Trace, Trace, Mapping[int, list[float]]], bool]
"""Whether a policy stops a candidate: its trace so far, the best's whole trace, the rungs so far."""


def play(traces: Sequence[Trace], prunable: Sequence[bool], value: Callable[..., float], stops: Stops) -> Played:
    """Runs a policy over candidates in the order in which the search proposed them."""
    bar, rungs, taken = traces[0], {}, 0.0
    complete = []
    for trace, may_stop in zip(traces, prunable, strict=True):
        steps = len(trace.scores)
        at = steps
        for number in range(1, steps):
            so_far = cut(trace, number)
            stop = may_stop and stops(so_far, bar, rungs)
            if is_rung(number, 2):
                rungs.setdefault(number, []).append(value(so_far.scores[-1]))
            if stop:
                at = number
                break
        taken += at / steps * may_stop
        if at == steps:
            complete.append(value(trace.scores[-1]))
            if complete[-1] > value(bar.scores[-1]):
                bar = trace
    best = max(value(trace.scores[-1]) for trace in traces)
    return Played(taken / max(1, sum(prunable)), best - max(complete))


def anchored(
    traces: Sequence[Trace], references: Sequence[Trace], count: int, confirm: int, seed: int, names: Sequence[str]
) -> tuple[Played, float, float]:
    """Estimates from anchor examples, then the best of them on everything; also their error and rank correlation."""
    estimates = np.zeros(len(traces))
    truth = np.zeros(len(traces))
    for number, task in enumerate(names):
        features = np.stack([trace.surrogates[task].astype(float) for trace in references], axis=1)
        anchors = choose(features, count, seed * len(names) + number)
        for place, trace in enumerate(traces):
            values = trace.values[task].astype(float)
            estimates[place] += anchors.estimate(values[anchors.positions])[0] / len(names)
            truth[place] += values.mean() / len(names)
    chosen = np.argsort(-estimates, kind="stable")[:confirm]
    size = np.mean([len(traces[0].values[task]) for task in names])
    share = (count * len(traces) + size * confirm) / (size * len(traces))
    error = float(np.sqrt(np.mean((estimates - truth) ** 2)))
    return Played(share, truth.max() - truth[chosen].max()), error, float(spearmanr(estimates, truth).statistic)


def main() -> None:
    """Plays every policy and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="a finished campaign's")
    parser.add_argument("--orders", type=int, default=20, help="random orders of the examples")
    parser.add_argument("--steps", type=int, default=8, help="steps over the examples")
    arguments = parser.parse_args()
    rows = [row for row in Ledger(f"{arguments.directory}/ledger").rows() if row.split == "validation"]
    rows = [row for row in rows if row.status == "complete"]
    whole = outcomes(arguments.directory, rows)
    tried = sorted(
        (row for row in rows if row.origin != "reference"), key=lambda row: -1 if row.trial is None else row.trial
    )
    prunable = [row.origin == "search" for row in tried]
    references = [whole[row.candidate] for row in rows if row.origin == "reference"]
    candidates = [whole[row.candidate] for row in tried]
    names = sorted(candidates[0].values)
    plain = make_objective("mean", names).parts["mean"]
    smooth = make_objective("expected_mean", names).parts["expected_mean"]

    def gate(value: Callable[..., float], threshold: float) -> Stops:
        return lambda trace, bar, _: WorseThan(bar, value, threshold)(trace)

    def mcnemar(threshold: float) -> Stops:
        """On right and wrong answers alone."""

        def stops(trace: Trace, bar: Trace, _: Mapping[int, list[float]]) -> bool:
            differences = [measured - bar.values[task][: len(measured)] for task, measured in trace.values.items()]
            better, worse = (sum(int((sign * measured > 0).sum()) for measured in differences) for sign in (1, -1))
            return worse > better and binomtest(better, better + worse, alternative="less").pvalue < threshold

        return stops

    def behind(trace: Trace, _: Trace, rungs: Mapping[int, list[float]]) -> bool:
        return Behind(rungs, plain, 1, 2)(trace)

    policies: dict[str, Stops] = {
        **{f"wilcoxon, p < {p}": gate(plain, p) for p in (0.02, 0.05, 0.1)},
        **{f"without the objective's veto, p < {p}": gate(smooth, p) for p in (0.02, 0.05, 0.1)},
        **{f"on right and wrong (McNemar), p < {p}": mcnemar(p) for p in (0.02, 0.05, 0.1)},
        "halving": behind,
    }
    played: dict[str, list[Played]] = {name: [] for name in policies}
    generator = np.random.default_rng(0)
    for _ in range(arguments.orders):
        order = {task: generator.permutation(len(candidates[0].values[task])) for task in names}
        traces = [in_steps(trace, order, arguments.steps) for trace in candidates]
        for name, stops in policies.items():
            played[name].append(play(traces, prunable, plain, stops))
    print(f"{len(candidates)} candidates, {sum(prunable)} of them proposals that may be pruned\n")
    print("| policy | examples of proposals saved | winner kept | mean lag of the winner, points |\n|---|---|---|---|")
    for name, measured in played.items():
        _line(name, measured)
    for count in (25, 50, 100):
        results = [anchored(candidates, references, count, 5, seed, names) for seed in range(arguments.orders)]
        error, rank = (np.mean([result[place] for result in results]) for place in (1, 2))
        _line(f"{count} anchor examples (error {100 * error:.1f}, rank {rank:.2f})", [played for played, *_ in results])


def _line(name: str, measured: Sequence[Played]) -> None:
    saved = 1 - np.mean([one.share for one in measured])
    kept = np.mean([one.regret <= 1e-9 for one in measured])
    print(f"| {name} | {saved:.0%} | {kept:.0%} | {100 * np.mean([one.regret for one in measured]):.2f} |")


if __name__ == "__main__":
    main()

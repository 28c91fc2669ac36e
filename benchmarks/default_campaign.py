"""A finished default campaign's winner beside all else that the same models and data could be used for, paired on test.

    python -m benchmarks.default_campaign runs/quickstart
    python -m benchmarks.default_campaign runs/quickstart --groups inputs --inputs 50 100 400 1600 --seeds 3

Beside it stand: the members, each on its own task, and one model trained on all data (where the campaign has it as a
baseline); every method at its defaults; mergekit's and fusion-bench's methods, each with one number tuned on the same
validation data; methods that need weights alone, likewise; TPE alone, which may evaluate and train on as many examples as
the campaign did; the best merge trained on the validation labels; distillation from the campaign's start with fewer inputs
of each member, and with inputs that no member was trained on. Each is chosen on validation and measured on test. What is
measured is kept below the campaign's directory, so that a run that was cut goes on where it was; the table is written to
`--out` as CSV.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks.papers.bench import Bench, Measured, influences, paired
from benchmarks.papers.pools import PaperPool
from flows.campaign.baselines import ALL_DATA
from flows.config.campaign_file import load_campaign
from flows.directory.progress import Display
from merging.errors import MergequestError
from merging.evaluation.shared_weights import share_weights
from merging.io import atomic
from merging.optimization.descent import DescentSettings, descend
from merging.optimization.distillation import distil
from merging.optimization.distillation_settings import DistillationSettings
from merging.optimization.label_tuning import tune
from merging.propagation import PropagationSettings, propagate
from merging.recipe import Recipe, Value
from merging.tasks.task import Score, Split
from search.budget import Budget
from search.candidate import Candidate, Measurement, Outcome, Provenance
from search.ledger.ledger import Ledger
from search.ledger.row import Row
from search.loop import search
from search.objective import best, make_objective
from search.samplers.make_sampler import make_sampler
from search.space.method_space import MethodSpace
from search.space.search_space import Space
from search.study import build_study

GROUPS = ("references", "defaults", "tuned", "labels", "data_free", "tpe", "inputs", "unseen")
CPU = torch.device("cpu")
BACKWARD = 3
"""An example that is run forward and backward costs as much as so many that are evaluated."""
SMALL, WHOLE, WIDE = (0.2, 0.3, 0.5, 0.7), (0.75, 1.0, 1.25), (1.0, 1.25, 1.5, 2.0, 3.0)
"""Factors that are tried, of methods that add task vectors up, of those that do not, and of those that flatten the spectrum."""
FILTERS = (1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3)
"""Shares of the strongest direction below which WUDI leaves one out."""
SCALING = "scaling"
TESTED = 3
"""So many of a group, those that validation likes best, are measured on test."""


@dataclass(frozen=True)
class Tuned:
    """A peer's method, and the one number of it that is tuned.

    Args:
        method: What it is here.
        parameters: That make it the peer's.
        number: A parameter's name, or `scaling` for one factor of all members.
        values: What is tried.
    """

    method: str
    parameters: Mapping[str, Value]
    number: str | None = None
    values: tuple[float, ...] = ()


PEERS: Mapping[str, Tuned] = {
    "linear (mergekit)": Tuned("average", {}),
    "task_arithmetic": Tuned("task_arithmetic", {}, SCALING, SMALL),
    "ties": Tuned("ties", {}, "lambda", WHOLE),
    "dare_linear": Tuned("dare", {"entries": "all"}, SCALING, SMALL),
    "dare_ties": Tuned("dare", {"entries": "elected"}, SCALING, SMALL),
    "della": Tuned("della", {"entries": "elected_mean"}, "lambda", WHOLE),
    "della_linear": Tuned("della", {"entries": "all"}, SCALING, SMALL),
    "breadcrumbs": Tuned("breadcrumbs", {}, SCALING, SMALL),
    "sce": Tuned("sce", {}, "lambda", WHOLE),
    "ram": Tuned("ram", {}, SCALING, WHOLE),
    "multislerp": Tuned("multi_slerp", {}),
    "karcher": Tuned("karcher", {}),
    "model_stock": Tuned("model_stock", {}),
    "fisher": Tuned("fisher", {}),
    "regmean": Tuned("regmean", {}, "rho", (0.5, 0.9, 1.0)),
    "tall masks": Tuned("consensus", {}, SCALING, SMALL),
    "iso_c": Tuned("iso_c", {}, SCALING, WIDE),
    "iso_cts": Tuned("iso_cts", {}, SCALING, WIDE),
    "tsv_m": Tuned("tsv_m", {}, SCALING, WHOLE),
    "wudi": Tuned("wudi", {}, "filter", FILTERS),
}
"""mergekit's methods of more than two members, and fusion-bench's; ours give the same weights."""
DATA_FREE: Mapping[str, Tuned] = {
    "task_arithmetic": PEERS["task_arithmetic"],
    "ties": PEERS["ties"],
    "tsv_m": PEERS["tsv_m"],
    "iso_c": PEERS["iso_c"],
    "iso_cts": PEERS["iso_cts"],
    "svc+task_arithmetic": Tuned("svc+task_arithmetic", {}, SCALING, SMALL),
    "svc+tsv_m": Tuned("svc+tsv_m", {}, SCALING, WHOLE),
    "svc+iso_cts": Tuned("svc+iso_cts", {}, SCALING, WIDE),
    "ace": Tuned("ace", {}, SCALING, WHOLE),
}
"""Methods that need weights alone, in the order of their papers' published averages; the modifier beside what it modifies."""


@dataclass(frozen=True)
class Arm:
    """One way to use the models and data.

    Args:
        group: What kind of way.
        name: Which.
        test: What it scores on test; None where it was not looked at.
        validation: Its mean on validation; NaN where it was not looked at.
        chosen: What validation chose.
        seconds: Processor time of its training, where there is any.
    """

    group: str
    name: str
    test: Measured | None
    validation: float = float("nan")
    chosen: str = ""
    seconds: float = float("nan")


class Comparison:
    """A campaign's pool, and what else is made of it.

    Args:
        directory: Of a finished campaign whose members each have a task.
        display: Shows what is measured.
        examples: Most examples of a task and split; None for all.
        peers: Which of the peers' and the data-free methods; all where none is named.
    """

    def __init__(
        self, directory: Path, display: Display, examples: int | None = None, peers: Sequence[str] = ()
    ) -> None:
        self.peers = peers
        self.campaign = load_campaign(str(directory / "campaign.yaml"))
        whole = directory / ALL_DATA
        places = {task: whole / task if (whole / task).is_dir() else whole for task in self.campaign.tasks}
        together = {task: str(place) for task, place in places.items()}
        made = (lambda: together) if whole.is_dir() else None
        pool = PaperPool(self.campaign.name, self.campaign.seed, self.campaign, made, None, directory)
        self.bench = Bench(pool, display, examples)
        self.bench.need("fisher", "gram")
        self.rows = Ledger(str(directory / "ledger"), self.campaign.name).rows()
        self._directory, self._display, self._examples = directory, display, examples
        self._made: tuple[Any, Any] = (None, None)

    @property
    def winner(self) -> Row:
        """The campaign's."""
        return best(self.rows)[0]

    @property
    def distilled(self) -> Row | None:
        """The candidate that was distilled, where one was."""
        return next((row for row in self.rows if row.method == "distilled" and row.split == "validation"), None)

    @property
    def start(self) -> Recipe:
        """The merge that was distilled into; where none was, the winner."""
        if self.distilled is None:
            return self.winner.recipe
        begin = self.distilled.parameters["start"]
        return next(row.recipe for row in self.rows if row.candidate == begin)

    @property
    def spent(self) -> int:
        """Examples that the campaign evaluated, those that it ran backward counted `BACKWARD` times."""
        candidates = [row for row in self.rows if row.split == "validation" and row.origin != "reference"]
        evaluated = sum(sum(row.examples.values()) for row in candidates)
        backward = self.distilled.proxies.get("distil:examples", 0.0) if self.distilled is not None else 0.0
        return evaluated + BACKWARD * int(backward)

    def references(self, seeds: int, inputs: Sequence[int]) -> Iterator[Arm]:
        """The members, each on its own task, and the model of all data."""
        yield Arm("references", "members, each on its own task", self.bench.own_members())
        if (whole := self.bench.all_data()) is not None:
            yield Arm("references", "one model trained on all data", whole)

    def defaults(self, seeds: int, inputs: Sequence[int]) -> Iterator[Arm]:
        """(a) The search's methods at their defaults: those that validation likes best, the best of them first."""
        known = {row.candidate: row.objective for row in self.rows if row.split == "validation"}
        recipes = {name: self.bench.default(name) for name in ("average", *self.campaign.search.methods)}
        recipes = {name: recipe for name, recipe in recipes.items() if known.get(recipe.identity) is not None}
        means = {name: float(known[recipe.identity] or 0.0) for name, recipe in recipes.items()}
        yield from self._tested("defaults", {name: (recipe, means[name], "") for name, recipe in recipes.items()})

    def tuned(self, seeds: int, inputs: Sequence[int]) -> Iterator[Arm]:
        """(c) The peers' methods, each with one number tuned on validation: those that it likes best, the best first."""
        chosen = {name: self._tuned(peer) for name, peer in PEERS.items() if not self.peers or name in self.peers}
        yield from self._tested("tuned", chosen)
        others = {"regmean++": self._plusplus, "adaptive": self._adaptive}
        yield from (make() for name, make in others.items() if not self.peers or name in self.peers)

    def data_free(self, seeds: int, inputs: Sequence[int]) -> Iterator[Arm]:
        """The methods that need weights alone, each with one factor tuned on validation, all of them on test."""
        chosen = DATA_FREE if not self.peers else {name: DATA_FREE[name] for name in self.peers if name in DATA_FREE}
        for name, peer in chosen.items():
            recipe, mean, value = self._tuned(peer)
            yield Arm("data_free", name, self.bench.measure(recipe), mean, value)

    def _tested(self, group: str, results: Mapping[str, tuple[Recipe, float, str]]) -> Iterator[Arm]:
        """Recipes with their means on validation, best first; only the first are measured on test."""
        for place, (name, (recipe, mean, chosen)) in enumerate(sorted(results.items(), key=lambda item: -item[1][1])):
            yield Arm(group, name, self.bench.measure(recipe) if place < TESTED else None, mean, chosen)

    def labels(self, seeds: int, inputs: Sequence[int]) -> Iterator[Arm]:
        """(d) The best merge at its defaults, all its weights trained on the validation labels; heads stay."""
        start, settings = self.start, self.campaign.training

        def work(missing: Sequence[str]) -> Measured:
            begun, bench = time.process_time(), self.bench
            self._display.say(f"  {self.campaign.name}: trained on the validation labels")
            tasks = list(bench.tasks.values())
            models = tune(bench.material(start), tasks, bench.owners, start, settings, CPU)
            seconds = {"seconds": time.process_time() - begun}
            return Measured(
                {
                    task.name: influences(task, *task.measure(model, "test", limit=self._examples))
                    for task, model in zip(tasks, models, strict=True)
                },
                seconds,
            )

        what = ["labels", start.as_dict(), settings.model_dump(mode="json")]
        test = self.bench.kept(what, "test", work, self.bench.tasks)
        yield Arm(
            "labels", f"trained on the validation labels, from {start.method}", test, seconds=test.report["seconds"]
        )

    def tpe(self, seeds: int, inputs: Sequence[int]) -> Iterator[Arm]:
        """(b) TPE over the campaign's methods, which may spend as much as the campaign did."""
        for seed in range(seeds):
            ledger = Ledger(str(self._directory / "tpe" / str(seed)), "tpe")
            space = _Alone(
                {name: MethodSpace() for name in self.campaign.search.methods}, self.bench.members, None, "per_member"
            )
            search(
                build_study(ledger, space),
                space,
                lambda number, seed=seed: make_sampler("tpe", seed, {}, number),
                ledger,
                _Here(self.bench),
                make_objective("mean", list(self.campaign.tasks)),
                Provenance("tpe"),
                Budget(candidates=10**6, examples=self.spent),
            )
            winner = best(ledger.rows())[0]
            test = self.bench.measure(winner.recipe)
            yield Arm(
                "tpe",
                f"TPE alone, seed {seed}",
                test,
                winner.objective or 0.0,
                f"{winner.method} of {len(ledger.rows())}",
            )

    def inputs(self, seeds: int, inputs: Sequence[int]) -> Iterator[Arm]:
        """Distilled from the campaign's start, with fewer inputs of each member, and other seeds."""
        for number in inputs:
            for seed in range(seeds):
                settings = DistillationSettings(examples=number, seed=seed)
                what = ["distilled", self.start.as_dict(), settings.model_dump(mode="json")]
                name = f"distilled with {number} inputs a member, seed {seed}"
                yield self._trained(
                    "inputs", name, what, lambda settings=settings: self._distilled(settings), validation=False
                )

    def unseen(self, seeds: int, inputs: Sequence[int]) -> Iterator[Arm]:
        """Distilled with inputs that no member was trained on, the validation split's, and with as many training inputs."""
        number = min(task.size("validation") for task in self.bench.own_tasks().values())
        splits: dict[Split, str] = {"validation": "unseen", "train": "training"}
        for seed in range(seeds):
            settings = DistillationSettings(examples=number, seed=seed)
            for split, kind in splits.items():
                what = ["distilled", split, self.start.as_dict(), settings.model_dump(mode="json")]
                name = f"distilled with {number} {kind} inputs a member, seed {seed}"
                yield self._trained(
                    "unseen",
                    name,
                    what,
                    lambda settings=settings, split=split: self._distilled(settings, split),
                    validation=False,
                )

    def _tuned(self, peer: Tuned) -> tuple[Recipe, float, str]:
        """The best recipe on validation, its mean there, and what was chosen."""
        plain = self.bench.default(peer.method, **peer.parameters)
        recipes = {"": plain}
        if peer.number == SCALING:
            recipes = {f"{v:g}": replace(plain, scaling=dict.fromkeys(plain.scaling, v)) for v in peer.values}
        elif peer.number is not None:
            recipes = {f"{v:g}": replace(plain, parameters={**plain.parameters, peer.number: v}) for v in peer.values}
        scores = {value: self.bench.measure(recipe, "validation").mean for value, recipe in recipes.items()}
        chosen = max(scores, key=lambda value: scores[value])
        return recipes[chosen], scores[chosen], f"{peer.number} {chosen}" if peer.number else ""

    def _plusplus(self) -> Arm:
        """RegMean++, by as many inputs as RegMean propagated had."""
        settings = PropagationSettings(update="regmean++", examples=self.campaign.statistics.propagated.examples)
        what = ["regmean++", settings.model_dump()]
        return self._trained("tuned", "regmean++", what, lambda: self._propagated(settings))

    def _adaptive(self) -> Arm:
        """Task arithmetic, its factors by gradient on unlabelled inputs: kin to AdaMerging, on the members' outputs."""
        start = self.bench.default("task_arithmetic")
        settings = DescentSettings(loss="distil")

        def make() -> dict[str, torch.Tensor]:
            tasks = list(self.bench.own_tasks().values())
            steps = descend(self.bench.material(start), tasks, self.bench.owners, start, settings, CPU)
            return self.bench.merged(steps[-1].recipe)

        return self._trained(
            "tuned", "task arithmetic, factors by descent without labels", ["descent", settings.model_dump()], make
        )

    def _propagated(self, settings: PropagationSettings) -> Mapping[str, torch.Tensor]:
        return propagate(self.bench.weights, self.bench.own_tasks(), self.bench.members, settings).weights

    def _distilled(self, settings: DistillationSettings, inputs: Split = "train") -> Mapping[str, torch.Tensor]:
        tasks = list(self.bench.own_tasks(inputs).values())
        result = distil(self.bench.material(self.start), tasks, self.bench.owners, self.start, settings, CPU)
        looks = ", ".join(f"{look.step}: {look.held_out:.4f}" for look in result.looks)
        self._display.say(f"  {result.steps} steps, best {result.best}; held out {looks}")
        return result.weights

    def _trained(
        self,
        group: str,
        name: str,
        what: Sequence[Any],
        make: Callable[[], Mapping[str, torch.Tensor]],
        *,
        validation: bool = True,
    ) -> Arm:
        """Weights that are no recipe's, measured with every member's own head."""
        splits: list[Split] = ["test", "validation"] if validation else ["test"]
        results = {
            split: self.bench.kept(what, split, self._measuring(what, name, make, split), self.bench.tasks)
            for split in splits
        }
        mean = results["validation"].mean if validation else float("nan")
        return Arm(group, name, results["test"], mean, seconds=results["test"].report["seconds"])

    def _measuring(
        self, what: Sequence[Any], name: str, make: Callable[[], Mapping[str, torch.Tensor]], split: Split
    ) -> Callable[[Sequence[str]], Measured]:
        def work(missing: Sequence[str]) -> Measured:
            bench = self.bench
            if self._made[0] != what:
                self._display.say(f"  {self.campaign.name}: {name}")
                begun = time.process_time()
                weights = dict(make())
                self._made = what, (weights, time.process_time() - begun)
            weights, seconds = self._made[1]
            values = {}
            for task in missing:
                model = bench.tasks[task].load_model()
                share_weights(model, bench.weights, bench.weights.members[bench.owners[task]], dict(weights))
                measured = bench.tasks[task].measure(model, split, limit=self._examples)
                values[task] = influences(bench.tasks[task], *measured)
            return Measured(values, {"seconds": seconds})

        return work


class _Alone(Space):
    """A space whose search begins with nothing."""

    def baselines(self) -> list[Recipe]:
        """See `Space.baselines`."""
        return []


class _Here:
    """The search's executor in this process."""

    capacity = 1

    def __init__(self, bench: Bench) -> None:
        self._bench, self._queue = bench, list[Candidate]()

    def submit(self, candidate: Candidate) -> None:
        """See `search.candidate.Executor`."""
        self._queue.append(candidate)

    def wait(self, timeout: float) -> list[Outcome]:
        """See `search.candidate.Executor`."""
        candidate = self._queue.pop()
        try:
            results = self._bench.measure(candidate.recipe, "validation").values
        except MergequestError as error:
            return [Outcome(candidate, error=error)]
        scores = {
            task: Score(float(own.mean()), float(own.std() / len(own) ** 0.5), len(own), "accuracy", is_mean=True)
            for task, own in results.items()
        }
        return [Outcome(candidate, Measurement(scores))]


def table(campaign: Measured, arms: Sequence[Arm]) -> pd.DataFrame:
    """All arms' means on test in points, and what the campaign's winner has more, paired, each with its standard error."""
    rows = []
    for arm in arms:
        unknown = float("nan")
        mean, deviation, gap, error = unknown, unknown, unknown, unknown
        if arm.test is not None:
            mean, deviation, (gap, error) = arm.test.mean, arm.test.error, paired(campaign, arm.test)
        rows.append(
            {
                "group": arm.group,
                "arm": arm.name,
                "chosen": arm.chosen,
                "validation": 100 * arm.validation,
                "test": 100 * mean,
                "test_error": 100 * deviation,
                "campaign_less_this": 100 * gap,
                "error": 100 * error,
                "cpu_seconds": arm.seconds,
            }
        )
    return pd.DataFrame(rows).round(2)


def main() -> None:
    """Measures what is missing, prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="a finished campaign's directory")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS, help="by default all")
    parser.add_argument("--seeds", type=int, default=3, help="of TPE, and of distillation with fewer inputs")
    parser.add_argument("--inputs", type=int, nargs="+", default=[50, 100, 256, 400, 1600], help="of each member")
    parser.add_argument("--examples", type=int, help="most examples of a task and split; by default all")
    parser.add_argument(
        "--peers", nargs="+", default=(), help="of mergekit's, fusion-bench's and the data-free methods; by default all"
    )
    parser.add_argument("--out", type=Path, help="the CSV; by default in benchmarks/results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    comparison = Comparison(given.directory.absolute(), Display(), given.examples, given.peers)
    winner = comparison.bench.measure(comparison.winner.recipe)
    arms = [Arm("campaign", f"winner: {comparison.winner.method}", winner, comparison.winner.objective or 0.0)]
    out = given.out or Path(__file__).parent / "results" / f"default_campaign.{comparison.campaign.name}.csv"
    for group in given.groups:
        for arm in getattr(comparison, group)(given.seeds, given.inputs):
            arms.append(arm)
            frame = table(winner, arms)
            print(frame.iloc[-1].to_dict(), flush=True)
            atomic.write_bytes(str(out), frame.to_csv(index=False).encode())
    print(f"{comparison.spent} examples spent by the campaign\n{table(winner, arms).to_string()}")


if __name__ == "__main__":
    main()

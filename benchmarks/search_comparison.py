"""How many evaluated examples a search takes to come within half a point of the best known: samplers, starts, gradients.

    python benchmarks/search_comparison.py runs/quickstart --out runs/search-comparison

Every arm runs the program's own search (space, sampler, study, ledger) on two pools: the quick start's, and one of unlike
tasks made by `search_pools.py`. All members take part in every merge. A recipe that another arm or seed has measured is not
measured again, but counted again. Each run's ledger lies below `--out` and is written row by row; a run that was cut goes on
where it was, and `--report` makes the table of what is there.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from search_pools import Opened, quickstart_pool, unlike_pool
from torch import Tensor

from merging.evaluation.live_models import LiveModels
from merging.mergers.linear_basis import compute_basis
from merging.mergers.resident import ResidentMerger
from merging.methods import METHODS
from merging.optimization.descent import DescentSettings, descend
from merging.optimization.losses import Endless, GradientModels
from merging.optimization.quadratic_model import CURVATURES, Quadratic, minimiser, quadratics
from merging.recipe import Recipe
from merging.tasks.task import Score
from search.budget import Budget
from search.candidate import Candidate, Measurement, Outcome, Provenance
from search.in_flight import measure
from search.ledger.ledger import Ledger
from search.ledger.row import Row
from search.loop import search
from search.objective import best, make_objective
from search.samplers.make_sampler import make_sampler
from search.space.method_space import MethodSpace
from search.space.search_space import Space
from search.study import build_study

ALL = ("average", "task_arithmetic", "ties", "fisher", "gradient_matching", "regmean", "regmean_propagated")
LINEAR = ("task_arithmetic", "regmean")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Arm:
    """A way to search.

    Args:
        sampler: Proposes recipes; None for a search that ends with its starts.
        methods: What it may propose.
        defaults: Begin with every method's defaults.
        theory: Begin with the quadratic models' minimisers.
        gradient: Begin with recipes that gradient descent found.
    """

    sampler: str | None
    methods: tuple[str, ...] = ALL
    defaults: bool = False
    theory: bool = False
    gradient: bool = False


ARMS: Mapping[str, Arm] = {
    "random": Arm("random"),
    "TPE": Arm("tpe"),
    "CMA-ES on RegMean's contributions": Arm("cmaes", ("regmean",)),
    "TPE + theory": Arm("tpe", theory=True),
    "the methods' defaults": Arm(None, defaults=True),
    "first order on RegMean's contributions": Arm(None, ("regmean",), gradient=True),
    "all together": Arm("tpe", defaults=True, gradient=True),
}


class Began(Space):
    """A space whose search begins with these recipes and no others, unless the defaults are asked for too."""

    def __init__(self, arm: Arm, members: Sequence[str], starts: Sequence[Recipe]) -> None:
        super().__init__({name: MethodSpace() for name in arm.methods}, members, None, "per_member", (), starts)
        self._begin = None if arm.defaults else list({recipe.identity: recipe for recipe in starts}.values())

    def baselines(self) -> list[Recipe]:
        """See `Space.anchors`."""
        return super().baselines() if self._begin is None else self._begin


class Here:
    """The search's executor in this process, which knows every score that any run has found."""

    capacity = 1

    def __init__(self, opened: Opened, ledgers: Path) -> None:
        owners = {member: member for member in opened.members}
        self._live: LiveModels | None = None
        self._make = lambda: LiveModels(opened.material, opened.tasks, owners, CPU)
        self._known = {(r.candidate, r.split): r for path in ledgers.glob("*/*") for r in Ledger(str(path)).rows()}
        self._queue: list[Candidate] = []

    def submit(self, candidate: Candidate) -> None:
        """See `search.candidate.Executor`."""
        self._queue.append(candidate)

    def wait(self, timeout: float) -> list[Outcome]:
        """See `search.candidate.Executor`."""
        candidate = self._queue.pop()
        result = self._known.get((candidate.recipe.identity, candidate.split))
        if result is not None:
            return [Outcome(candidate, Measurement(_scores(result), result.merge_seconds, result.evaluate_seconds))]
        self._live = self._live or self._make()
        return [Outcome(candidate, self._live.measure(candidate.recipe, candidate.split))]

    def learn(self, rows: Sequence[Row]) -> None:
        """Remembers what a run has found."""
        self._known |= {(row.candidate, row.split): row for row in rows}


def _scores(row: Row) -> dict[str, Score]:
    return {
        task: Score(
            value,
            row.standard_errors[task],
            row.examples[task],
            "accuracy",
            row.losses[task],
            row.expected_errors[task],
        )
        for task, value in row.scores.items()
    }


def theory(opened: Opened, space: Space) -> tuple[list[Recipe], dict[str, dict[str, dict[str, Any]]]]:
    """The minimisers of the quadratic models of linear methods, shared and per member; and the models, by kind and method."""
    result, models = [], {kind: {} for kind in CURVATURES}
    for method in LINEAR:
        recipe = METHODS[method].default_recipe(opened.members)
        basis = compute_basis(opened.material, method, opened.members, recipe.parameters, CPU)
        for kind in CURVATURES:
            forms = quadratics(opened.material, basis, [list(opened.material.pool.weights)], kind)
            models[kind][method] = {member: form.as_dict() for member, form in forms.items()}
            for shared in (True, False) if kind == CURVATURES[0] else ():  # as a campaign with both statistics does
                factors = minimiser(list(forms.values()), shared=shared)
                scaling = dict(zip(basis.members, map(float, factors[0]), strict=True))
                result.append(space.nearest(Recipe(method, scaling, recipe.parameters)))
    return result, models


def gradient_starts(opened: Opened, space: Space) -> tuple[list[Recipe], int]:
    """Where gradient descent on validation leads from RegMean, and the examples that it ran forward and backward."""
    start = METHODS["regmean"].default_recipe(opened.members)
    owners = {member: member for member in opened.members}
    points = descend(opened.material, opened.tasks, owners, start, DescentSettings(), CPU)
    return [space.nearest(point.recipe) for point in points], points[-1].examples


def starts(opened: Opened, place: Path, kind: str) -> list[Recipe]:
    """Starts by `theory` or `gradient`, found once and kept beside the ledgers with what else came of it."""
    path = place / f"{kind}.json"
    if not path.exists():
        space = Began(Arm("tpe"), opened.members, [])
        result, about = theory(opened, space) if kind == "theory" else gradient_starts(opened, space)
        path.write_text(json.dumps({"starts": [recipe.as_dict() for recipe in result], "about": about}))
    return [_recipe(entry) for entry in json.loads(path.read_text())["starts"]]


def _recipe(entry: Mapping[str, Any]) -> Recipe:
    return Recipe(entry["method"], entry["scaling"], entry["parameters"])


def run(opened: Opened, place: Path, executor: Here, name: str, seed: int, candidates: int) -> None:
    """One arm with one seed, then its winner on test; goes on where it was."""
    arm = ARMS[name]
    chosen = starts(opened, place, "theory") if arm.theory else []
    chosen += starts(opened, place, "gradient") if arm.gradient else []
    space = Began(arm, opened.members, chosen)
    objective = make_objective("mean", opened.members)
    ledger, provenance = Ledger(str(place / "ledgers" / name / str(seed)), "comparison"), Provenance("comparison")
    budget = Budget(candidates if arm.sampler else len(space.baselines()))
    sampler = arm.sampler or "random"
    study = build_study(ledger, space)
    search(
        study,
        space,
        lambda number: make_sampler(sampler, seed, {}, number),
        ledger,
        executor,
        objective,
        provenance,
        budget,
    )
    winner = best(ledger.rows())[0]
    measure([Candidate(winner.recipe, "test", "final")], executor, ledger, None, provenance)
    executor.learn(ledger.rows())


def fine_tuned(opened: Opened, place: Path, epochs: int, rate: float, batch: int = 16) -> None:
    """RegMean, all its weights then trained on the search's labels; kept beside the ledgers."""
    path = place / "fine_tuned.json"
    if path.exists():
        return
    owners = {member: member for member in opened.members}
    models = GradientModels(opened.material.pool, opened.tasks, owners, "cross_entropy", CPU)
    start = METHODS["regmean"].default_recipe(opened.members)
    ResidentMerger(opened.material, models.weights).merge(start)
    adam = torch.optim.Adam(list(models.weights.values()), lr=rate)
    batches = [Endless(task, "validation", batch) for task in opened.tasks]
    steps = epochs * max(task.size("validation") for task in opened.tasks) // batch
    examples = 0
    for step in range(steps):
        chosen = [next(own) for own in batches]
        examples += sum(len(own.indices) for own in chosen)
        _, gradients = models.gradients(chosen)
        for name, weight in models.weights.items():
            weight.grad = gradients.get(name)
        adam.param_groups[0]["lr"] = rate * (1 - step / steps)
        adam.step()
    live = LiveModels(opened.material, opened.tasks, owners, CPU, source=lambda _, out: _Given(models.weights, out))
    scores = [score.value for score in live.measure(start, "test").scores.values()]
    value = {"test": float(np.mean(scores)), "examples": examples, "start": start.method}
    path.write_text(json.dumps(value))


class _Given:
    """Weights that are there already."""

    def __init__(self, weights: Mapping[str, Tensor], out: Mapping[str, Tensor]) -> None:
        self._weights, self._out = weights, out

    def merge(self, recipe: Recipe) -> dict[str, float]:
        """Copies them, whatever the recipe."""
        for name, target in self._out.items():
            target.copy_(self._weights[name].detach())
        return {}


def report(place: Path, statistic_examples: Mapping[str, int]) -> str:
    """The table of a pool, of the runs that are there."""
    runs: dict[str, list[list[Row]]] = {}
    for name in ARMS:
        for path in sorted((place / "ledgers" / name).glob("*")):
            rows = Ledger(str(path)).rows()
            if any(row.split == "test" for row in rows):
                runs.setdefault(name, []).append(rows)
    tried = [row for result in runs.values() for rows in result for row in rows if row.split == "validation"]
    known = max(row.objective or 0.0 for row in tried)
    count = len({row.candidate for row in tried})
    lines = [
        f"Best known of {count} recipes: {100 * known:.2f} on validation.",
        "",
        "| arm | seeds | reached | evaluations | examples | further examples | validation | test |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, result in runs.items():
        reached = [_reached(rows, known - 0.005) for rows in result]
        evaluations, examples = (np.median([own[place] for own in reached]) for place in (0, 1))
        arm = ARMS[name]
        kinds = {kind for method in arm.methods for kind in (*METHODS[method].requires, METHODS[method].solution)}
        further = [f"{statistic_examples[kind]} {kind}" for kind in statistic_examples if kind in kinds]
        if arm.gradient:
            further.append(f"{json.loads((place / 'gradient.json').read_text())['about']} gradient")
        ends = [best(rows)[0].objective or 0.0 for rows in result]
        tests = [np.mean(list(row.scores.values())) for rows in result for row in rows if row.split == "test"]
        shown = [f"{value:.0f}" if np.isfinite(value) else "–" for value in (evaluations, examples)]
        lines.append(
            f"| {name} | {len(result)} | {sum(np.isfinite(own[0]) for own in reached)} | {' | '.join(shown)} "
            f"| {', '.join(further)} | {100 * np.median(ends):.1f} | {100 * np.median(tests):.1f} |"
        )
    tuned = place / "fine_tuned.json"
    if tuned.exists():
        value = json.loads(tuned.read_text())
        lines.append(
            f"| fine-tuned from {value['start']} | 1 | | | | {value['examples']} trained on | | {100 * value['test']:.1f} |"
        )
    return "\n".join(lines)


def ranks(place: Path, members: Sequence[str]) -> str:
    """How predictions of the quadratic models rank the candidates of linear methods, beside their loss and score."""
    if not (place / "theory.json").exists():
        return ""
    models = json.loads((place / "theory.json").read_text())["about"]
    everything = [row for path in (place / "ledgers").glob("*/*") for row in Ledger(str(path)).rows()]
    rows = {row.candidate: row for row in everything if row.split == "validation"}
    lines = ["| method | curvature | candidates | with the loss | with the score |", "|---|---|--:|--:|--:|"]
    for method in LINEAR:
        own = [row for row in rows.values() if row.method == method]
        factors = [np.array([[row.scaling[member] for member in members]]) for row in own]
        loss, score = ([np.mean(list(getattr(row, name).values())) for row in own] for name in ("losses", "scores"))
        for kind, result in models.items():
            forms = [Quadratic.from_dict(form) for form in result[method].values()]
            predicted = [sum(form(point) for form in forms) for point in factors]
            with_loss, with_score = (
                spearmanr(predicted, truth).statistic for truth in (loss, [-value for value in score])
            )
            lines.append(f"| {method} | {kind} | {len(own)} | {with_loss:.2f} | {with_score:.2f} |")
    return "\n".join(lines)


def _reached(rows: Sequence[Row], target: float) -> tuple[float, float]:
    """Evaluations and examples until a run's first candidate at the target; infinite where there is none."""
    examples = 0
    for number, row in enumerate((row for row in rows if row.split == "validation"), start=1):
        examples += sum(row.examples.values())
        if (row.objective or 0.0) >= target:
            return number, examples
    return np.inf, np.inf


def main() -> None:
    """Runs what is missing, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quickstart", help="a finished quick start's directory")
    parser.add_argument("--out", type=Path, required=True, help="where pools, ledgers and starts are kept")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--candidates", type=int, default=24, help="evaluations of a run")
    parser.add_argument("--validation", type=int, default=128, help="validation examples of each task")
    parser.add_argument("--test", type=int, default=300, help="test examples of each task")
    parser.add_argument("--tokens", type=int, default=24, help="what texts are cut to")
    parser.add_argument("--layers", type=int, default=2, help="layers of the second pool's base")
    parser.add_argument("--pools", nargs="+", default=["unlike", "quickstart"])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--tune", action="store_true", help="also fine-tune the merge on the same labels")
    parser.add_argument("--report", action="store_true", help="only print what is there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = {"train": 1500, "validation": arguments.validation, "test": arguments.test}
    opened: dict[str, Opened] = {}
    executors: dict[str, Here] = {}
    for name in arguments.pools:
        place = arguments.out / name
        if name == "unlike":
            opened[name] = unlike_pool(arguments.quickstart, place, sizes, arguments.tokens, arguments.layers)
        else:
            opened[name] = quickstart_pool(arguments.quickstart, place, sizes, arguments.tokens)
        executors[name] = Here(opened[name], place / "ledgers")
    for seed in range(0 if arguments.report else arguments.seeds):
        for name, pool in opened.items():
            for arm in arguments.arms:
                if ARMS[arm].sampler or not seed:
                    run(pool, arguments.out / name, executors[name], arm, seed, arguments.candidates)
            if arguments.tune:
                fine_tuned(pool, arguments.out / name, epochs=10, rate=1e-4)
    for name, pool in opened.items():
        place = arguments.out / name
        print(f"\n## {pool.name}", report(place, pool.statistic_examples), ranks(place, pool.members), sep="\n\n")


if __name__ == "__main__":
    main()

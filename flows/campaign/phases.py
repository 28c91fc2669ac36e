"""The phases of a campaign that measure candidates, in the order in which a run has them."""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from flows.campaign.distil import distil
from flows.campaign.examples import choosing_anchors, confirm, make_planner, search_split
from flows.campaign.executor import RayExecutor
from flows.campaign.needed_statistics import cache_of
from flows.campaign.open_campaign import Files, OpenCampaign
from flows.campaign.selection import select_subsets
from flows.campaign.starts import starts
from flows.config.sections import DistilSettings
from flows.directory.campaign_directory import Directory
from flows.directory.progress import Display
from flows.directory.search_progress import ProgressDisplay
from flows.report.scales import scales_of
from flows.report.stages import in_a_line, smallest_visible, stages
from flows.report.table import in_words, objective_scale, plain_average
from flows.report.test_answers import KeptPredictions
from merging.errors import MergequestError, SearchError, SettingsError
from merging.io import atomic, documents, hashing, storage
from merging.methods import METHODS
from merging.recipe import Recipe, base_recipe, member_recipe
from merging.versions import code_version
from search.budget import Budget, Ending
from search.candidate import Candidate, Provenance
from search.constraints import make_constraints
from search.in_flight import measure
from search.ledger.distinct import apart, distinct
from search.ledger.ledger import Ledger
from search.ledger.row import Row
from search.loop import search
from search.objective import EXPECTED, Objective, best, make_objective, own_scores, split_name
from search.resolution import clear_best
from search.samplers.make_sampler import memories, sampler_of_trials
from search.steering import StoppedError
from search.study import build_study
from search.subsets.choose_subsets import Selection, Subset

ENDINGS: Mapping[Ending, str] = {
    "candidates": "every candidate of the budget was measured",
    "examples": "the search ended with its budget of examples",
    "seconds": "the search ended with its budget of time",
    "gpu_hours": "the search ended with its budget of GPU hours",
    "cpu_hours": "the search ended with its budget of CPU hours",
    "plateau": "the search ended on a plateau: the best candidate has not got better for long",
    "stopped": "the search ended as asked",
    "exhausted": "the sampler has nothing new to propose: the search space is exhausted",
}


def measure_references(
    opened: OpenCampaign, directory: Directory, executor: RayExecutor, ledger: Ledger, display: Display
) -> list[Row]:
    """The base and every member as they are, on validation."""
    recipes = [base_recipe(), *(member_recipe(member) for member in opened.pool.members)]
    candidates = [Candidate(recipe, "validation", "reference") for recipe in recipes]
    with (
        display.phase("References: base and members on validation"),
        choosing_anchors(opened, directory, executor, candidates),
        display.bar("models", len(candidates), may_stop=False) as bar,
    ):
        return _measured(candidates, opened, executor, ledger, display, progress=bar.reach)


def select_members(
    opened: OpenCampaign,
    references: Sequence[Row],
    directory: Directory,
    executor: RayExecutor,
    ledger: Ledger,
    display: Display,
) -> Selection:
    """The subsets of members that the search may merge; once chosen they are read from the directory."""

    def scores(subsets: Sequence[Subset]) -> list[float | None]:
        method = METHODS[opened.campaign.greedy_method()]
        candidates = [
            Candidate(method.default_recipe(subset, opened.pool.model_type), "validation", "anchor")
            for subset in subsets
        ]
        rows = _measured(candidates, opened, executor, ledger, display, objective_of(opened, ledger))
        return [row.objective for row in rows]

    path = directory / "selection.json"
    if storage.exists(path):
        return documents.read_as(path, Selection.from_dict)
    with display.phase("Selection"):
        selection = select_subsets(opened, references, cache_of(opened.campaign), display, scores)
        atomic.write_json(path, selection.as_dict())
        shown = ["+".join(subset) for subset in selection.subsets]
        more = f" and {len(shown) - 16} more" if len(shown) > 16 else ""
        display.say(f"  {selection.mode}: {', '.join(shown[:16])}{more}")
    return selection


def search_merges(
    opened: OpenCampaign,
    statistics: Files,
    selection: Selection,
    directory: Directory,
    executor: RayExecutor,
    ledger: Ledger,
    display: Display,
) -> None:
    """The baselines, then what the sampler proposes.

    Raises:
        SearchError: No candidate could be measured.
        StoppedError: Somebody asked for the end.
    """
    campaign, settings = opened.campaign, opened.campaign.search
    asked = settings.predicts or settings.gradient is not None
    with display.phase("Starts: what theory and gradients propose") if asked else nullcontext():
        begin, predict = starts(opened, statistics, opened.space(selection.subsets), directory, display)
    space = opened.space(selection.subsets, [start.recipe for start in begin])
    objective, split = objective_of(opened, ledger), search_split(opened)
    kept = KeptPredictions(directory.validation_predictions)

    def least() -> float:
        """By how much a proposal must be better to count as an improvement."""
        visible = settings.min_delta is None
        return smallest_visible(ledger.rows(), objective, kept.read) if visible else settings.min_delta or 0.0

    cost = {start.recipe.identity: {f"{start.stage}:examples": float(start.examples)} for start in begin}
    budget = Budget(
        settings.candidates,
        seconds=settings.seconds,
        examples=settings.budget_examples,
        gpu_hours=settings.gpu_hours,
        cpu_hours=settings.cpu_hours,
        patience=settings.patience,
        min_delta=least,
        identical_errors=settings.identical_errors,
        retries=campaign.resources.retries,
    )
    done = sum(row.split == split and row.origin in ("anchor", "search") for row in ledger.rows())
    with (
        display.phase(
            f"Search: {settings.candidates} candidates, {done} of them done"
            if done
            else f"Search: {settings.candidates} candidates"
        ),
        executor.planned(
            KeptPredictions(directory.validation_predictions, make_planner(opened, objective, directory, ledger))
        ),
        display.bar("candidates", max(settings.candidates, done), may_stop=False) as bar,
    ):
        ending = search(
            build_study(ledger, space, objectives=len(objective.names), split=split),
            space,
            sampler_of_trials(settings.sampler, campaign.seed, settings.sampler_arguments, selection),
            ledger,
            executor,
            objective,
            provenance_of(opened),
            budget,
            ProgressDisplay(bar, display.pulse),
            history=memories(settings.sampler, settings.sampler_arguments, settings.history),
            split=split,
            describe=lambda recipe: {**predict(recipe), **cost.get(recipe.identity, {})},
            steering=display.pulse.steering,
            line_search=settings.line_search,
        )
        display.pulse.steering.stop_here()
        if ending == "plateau" and settings.min_delta is None and (visible := least()):
            shown = f"{visible * objective_scale(ledger.rows(), scales_of(campaign.tasks)):.2g}"
            display.note(
                f"the search ended: {settings.patience} proposals in a row were not better by {shown}, the smallest difference "
                "that validation can see"
            )
        elif ending != "candidates":
            display.note(ENDINGS[ending])
        if not best(ledger.rows(), split=split):
            raise SearchError("no candidate could be measured: see the `error` column of the ledger")
    if split != "validation":
        with display.phase("Confirmation: the best by estimate on the whole validation set"):
            confirm(opened, executor, ledger, objective, provenance_of(opened), display.pulse.steering)


def distil_best(
    opened: OpenCampaign,
    statistics: Files,
    settings: DistilSettings,
    directory: Directory,
    ledger: Ledger,
    display: Display,
) -> tuple[Recipe, Files, dict[str, float]] | None:
    """Distils into the best baseline, or into a proposal that is clearly better.

    Returns:
        The distilled merge, statistics with its weights, and what its row says; None where distillation was not asked for and
        fails: the merges that were found stand without it.
    """
    merges = [row for row in best(ledger.rows(), len(ledger.rows())) if row.method != "distilled"]
    kept = KeptPredictions(directory.validation_predictions)
    start = clear_best(merges, kept.read, objective_of(opened, ledger))
    why = "the best baseline" if start.origin == "anchor" else "a proposal that is clearly better than all baselines"
    display.say(f"  starts from {in_words(start.method)} ({start.candidate}), {why}")
    try:
        return distil(opened, statistics, start.recipe, settings, cache_of(opened.campaign), display)
    except MergequestError as error:
        if opened.campaign.distil is not None or isinstance(error, StoppedError):
            raise
        display.note(f"without distillation ({error}); `distil: {{}}` insists on it, `distil: false` leaves it out")
        return None


def measure_distilled(
    opened: OpenCampaign,
    made: Recipe,
    notes: Mapping[str, float],
    executor: RayExecutor,
    ledger: Ledger,
    display: Display,
) -> None:
    """The distilled merge on validation, with `notes` in its row."""
    candidate = Candidate(made, "validation", "search")
    _measured(
        [candidate], opened, executor, ledger, display, objective_of(opened, ledger), describe=lambda recipe: notes
    )


def measure_on_test(
    opened: OpenCampaign,
    directory: Directory,
    executor: RayExecutor,
    ledger: Ledger,
    display: Display,
    distilled: Recipe | None = None,
) -> None:
    """What the table shows, once, on test: references, the plain average, each method's best, the best of all.

    Of merges that were distilled into, evaluators hold the weights of `distilled` alone: one of an earlier budget was tested
    then.
    """
    if without := [name for name, task in opened.tasks.items() if not task.has_split("test")]:
        display.note(f"no test split of {', '.join(without)}: the table stays with validation")
        return
    ranked = distinct(
        row
        for row in best(ledger.rows(), len(ledger.rows()))
        if row.method != "distilled" or row.recipe == distilled or ledger.has(row.candidate, "test")
    )
    chosen = [base_recipe(), *(member_recipe(member) for member in opened.pool.members)]
    average = plain_average(ledger.rows())
    chosen += [average.recipe] if average else []
    chosen += [row.recipe for row in {row.method: row for row in reversed(ranked)}.values()]
    chosen += [row.recipe for row in apart(ranked)[: opened.campaign.test.top]]
    candidates = [Candidate(recipe, "test", "final") for recipe in chosen]
    total = len({recipe.identity for recipe in chosen})
    with (
        display.phase(f"Test: {total} models, once"),
        executor.planned(KeptPredictions(directory.test_predictions)),
        display.bar("models", total, may_stop=False) as bar,
    ):
        _measured(candidates, opened, executor, ledger, display, progress=bar.reach)


def tell_stages(
    opened: OpenCampaign, directory: Directory, ledger: Ledger, display: Display, *, last: bool = False
) -> None:
    """Says what the stages so far, or the last of them, gained and cost."""
    gained = stages(
        ledger.rows(),
        objective_of(opened, ledger),
        KeptPredictions(directory.validation_predictions).read,
        display.timings,
    )
    times = objective_scale(ledger.rows(), scales_of(opened.campaign.tasks))
    for stage in gained[-1:] if last else gained:
        display.say(f"  {in_a_line(stage, times)}")


def objective_of(opened: OpenCampaign, ledger: Ledger) -> Objective:
    """What the campaign maximises, given the references that the ledger has.

    Raises:
        SettingsError: It is an expected error of a task that gives none.
    """
    tasks_of = {member: task for member in opened.pool.members if (task := opened.campaign.task_of(member))}
    settings, tasks = opened.campaign.search, list(opened.tasks)
    rows = ledger.rows()
    own = own_scores(rows, tasks_of, "validation")
    expected = own_scores(rows, tasks_of, "validation", expected=True)
    if any(split_name(name, tasks)[1] for name in settings.objectives):
        for row in (row for row in rows if row.origin == "reference" and row.status == "complete"):
            if blind := [task for task, error in row.expected_errors.items() if math.isnan(error)]:
                raise SettingsError(
                    f"search.objective: task '{blind[0]}' gives no expected error, only its metric: leave out `{EXPECTED}`"
                )
    bounds = make_constraints(settings.constraints, tasks, own)
    unseen = opened.campaign.unseen()
    return make_objective(settings.objectives, tasks, own, expected, settings.weights, bounds, unseen)


def provenance_of(opened: OpenCampaign) -> Provenance:
    """What every row of the campaign says."""
    return Provenance(opened.campaign.name, code_version(), hashing.fingerprint(opened.fingerprints))


def _measured(
    candidates: Sequence[Candidate],
    opened: OpenCampaign,
    executor: RayExecutor,
    ledger: Ledger,
    display: Display,
    objective: Objective | None = None,
    **more: Any,
) -> list[Row]:
    """Their rows; see `search.in_flight.measure`."""
    retries, steering = opened.campaign.resources.retries, display.pulse.steering
    return measure(candidates, executor, ledger, objective, provenance_of(opened), retries, steering, **more)

"""A campaign from beginning to end: pool → statistics → references → selection → search → test → export → report."""

import math
from collections.abc import Mapping, Sequence

from flows.campaign.baselines import measure_baselines, require_baselines
from flows.campaign.cluster import connected, worker_environment
from flows.campaign.distil import Files, distil, files_of
from flows.campaign.evaluators import evaluators, require_evaluators
from flows.campaign.examples import choosing_anchors, confirm, make_planner, search_split
from flows.campaign.executor import RayExecutor
from flows.campaign.export import export
from flows.campaign.needed_statistics import cache_of, joined, member_statistics, require_sources, usable_solutions
from flows.campaign.open_campaign import OpenCampaign, open_campaign
from flows.campaign.selection import prepare_selection, require_kernel, select_subsets
from flows.campaign.stages import distillation, divides_by_unknown, require_stages
from flows.campaign.starts import starts
from flows.campaign.summary import summary, tables_as_markdown, write_report
from flows.campaign.tracking import require_trackers, tracked
from flows.campaign.weight_checks import keep
from flows.config.campaign_file import Campaign
from flows.config.sections import DistilSettings
from flows.config.yaml_file import require_writable
from flows.directory.campaign_directory import Directory
from flows.directory.heartbeat import heartbeat
from flows.directory.progress import Display
from flows.directory.search_progress import ProgressDisplay
from flows.directory.steering import DirectorySteering, forget_stop
from flows.report.scales import scales_of
from flows.report.stages import in_a_line, smallest_visible, stages
from flows.report.table import in_words, objective_scale, plain_average
from flows.report.test_answers import KeptPredictions
from flows.versions import code_version
from merging.checkpoints.directories.manifest import require_replaceable
from merging.errors import MergequestError, SearchError, SettingsError
from merging.io import addresses, atomic, documents, hashing, storage
from merging.methods import METHODS
from merging.recipe import Recipe, base_recipe, member_recipe
from merging.statistics import STATISTICS
from ray_tasks.connect import Cluster
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


def run(campaign: Campaign, display: Display | None = None, *, retry_failed: bool = False) -> str:
    """Runs a campaign in its directory, or goes on with it; what is there already is not done again.

    Args:
        campaign: The campaign.
        display: Shows progress; by default on standard error.
        retry_failed: Whether candidates that failed are measured again.

    Returns:
        The results table and the places of what was left, for the terminal.

    Raises:
        MergequestError: Something is wrong with the input, before any work; or the search cannot go on.
    """
    directory, display = _directory(campaign), display or Display()
    directory.check(campaign)
    with directory.locked():
        display.timings = directory.read_timings()
        if directory.is_finished(campaign) and not retry_failed:
            display.say(f"{directory.path} is finished: nothing to do")
            return summary(directory)
        forget_stop(directory.path)
        with heartbeat(directory.path, display.pulse, campaign.name):
            with display.phase("Pool"):
                opened, ledger = _opened(campaign, directory, display, retry_failed)
                _require_searchable(opened, directory)
                if storage.exists(directory / "study"):
                    display.note(
                        "study/, which an earlier version kept, is not read: the ledger has all that was measured"
                    )
                if ledger.retried:
                    display.say(f"  {len(ledger.retried)} failed measurements are tried again")
            directory.claim(campaign, opened.fingerprints)
            keep(opened.pool, directory.path)
            _listen(opened, directory, display)
            try:
                with (
                    tracked(campaign.tracking, campaign.name, directory, ledger.rows, display.note),
                    connected(opened.campaign) as cluster,
                ):
                    display.say(f"  {cluster.describe()}")
                    require_evaluators(opened, cluster)
                    _work(opened, directory, cluster, ledger, display)
            finally:
                directory.write_timings(display.timings)
            directory.finish(campaign)
    return summary(directory)


def _listen(opened: OpenCampaign, directory: Directory, display: Display) -> None:
    """Has the driver look for what others leave in the directory for it."""
    methods, members = list(opened.campaign.search.methods), list(opened.pool.members)
    steering = DirectorySteering(directory.path, methods, members, opened.pool.model_type, display.note)
    display.pulse.steering, display.pulse.look = steering, steering.look


def check(campaign: Campaign, display: Display | None = None) -> None:
    """Opens and compares everything that a campaign names, and computes nothing.

    Args:
        campaign: The campaign.
        display: Shows progress; by default on standard error.

    Raises:
        MergequestError: What `run` would stop at before or between its phases.
    """
    directory = _directory(campaign)
    directory.check(campaign)
    display = display or Display()
    opened, _ = _opened(campaign, directory, display)
    _require_searchable(opened, directory)
    display.say(f"  {_what_runs(opened)}")


def _what_runs(opened: OpenCampaign) -> str:
    """The stages that a run has, in a line."""
    search, settings = opened.campaign.search, distillation(opened)
    baselines = len(opened.space().baselines())
    parts = [f"{baselines} baselines ({', '.join(search.methods)} at their defaults, the plain average)"]
    if search.candidates > baselines:
        until = f", until {search.patience} in a row are no better" if search.patience is not None else ""
        parts.append(f"at most {search.candidates - baselines} proposals by {search.sampler}{until}")
    inputs = sum(task.size("train") for task in opened.sources.values() if task.has_logits)
    parts.append(f"distillation on {inputs:,} unlabelled inputs" if settings is not None else "no distillation")
    return f"a run has {'; '.join(parts)}; then test, export and report"


def _directory(campaign: Campaign) -> Directory:
    """The campaign's directory; of one that no file resolved, below the working directory."""
    return Directory(campaign.directory or addresses.absolute(addresses.join("runs", campaign.name)))


def _opened(
    campaign: Campaign, directory: Directory, display: Display, retry_failed: bool = False
) -> tuple[OpenCampaign, Ledger]:
    """Pool and tasks of a campaign, and what its directory has of it, looked through for what would stop it later."""
    opened = open_campaign(campaign, display, directory.path)
    directory.check_pool(opened.fingerprints)
    require_kernel(opened)
    return opened, Ledger(directory.ledger, campaign.name, retry_failed=retry_failed)


def _require_searchable(opened: OpenCampaign, directory: Directory) -> None:
    require_sources(opened)
    require_stages(opened)
    require_trackers(opened.campaign.tracking)
    worker_environment(opened.campaign)  # for the errors that it raises
    search = opened.campaign.search
    sampler_of_trials(search.sampler, opened.campaign.seed, search.sampler_arguments)  # for its errors, too
    require_baselines(opened)
    require_replaceable(directory.best)


def compute_statistics(campaign: Campaign, kinds: Sequence[str] | None, out: str | None, display: Display) -> list[str]:
    """Computes every member's statistics on its own task, unless they are there.

    Args:
        campaign: The campaign.
        kinds: Kinds of statistic; by default what its methods need.
        out: Directory for the files; by default the campaign's.
        display: Shows progress.

    Returns:
        Paths of the files.

    Raises:
        MergequestError: A kind is unknown, something of the campaign is unusable, or there is no right to write.
    """
    for kind in kinds or ():
        _ = STATISTICS[kind]
    require_writable(addresses.absolute(out) if out else cache_of(campaign))
    with display.phase("Pool"):
        opened = open_campaign(campaign, display, campaign.directory)
    if campaign.directory and not out:
        keep(opened.pool, campaign.directory)
    cache = addresses.absolute(out) if out else cache_of(opened.campaign)
    with display.phase("Statistics"):
        files = member_statistics(opened, kinds or opened.kinds, cache, display)
    return [path for member in files for path in files[member]]


def run_selection(campaign: Campaign, display: Display) -> Selection:
    """Selects subsets of members as the campaign file says, and keeps them in the campaign's directory."""
    directory = _directory(campaign)
    directory.check(campaign)
    with directory.locked():
        with display.phase("Pool"):
            opened, ledger = _opened(campaign, directory, display)
        directory.claim(campaign, opened.fingerprints)
        keep(opened.pool, directory.path)
        with connected(opened.campaign) as cluster:
            with display.phase("Statistics"):
                prepare_selection(opened, cache_of(opened.campaign), display)
                greedy = campaign.selection.mode.startswith("greedy")
                cache = cache_of(campaign)
                statistics = member_statistics(opened, opened.kinds, cache, display) if greedy else {}
            with evaluators(opened, statistics, cluster, display) as executor:
                references = _references(opened, directory, executor, ledger, display)
                return _selection(opened, references, directory, executor, ledger, display)


def _work(opened: OpenCampaign, directory: Directory, cluster: Cluster, ledger: Ledger, display: Display) -> None:
    """Everything that needs a cluster."""
    campaign = opened.campaign
    if campaign.search.gpu_hours is not None and not opened.gpus:
        raise SettingsError(
            "search.gpu_hours: evaluators have no GPU here (resources.gpus); search.cpu_hours counts CPUs"
        )
    if divides_by_unknown(opened):
        # a reference of 0 or below ends the campaign: better before the statistics than after
        with evaluators(opened, {}, cluster, display) as executor:
            _references(opened, directory, executor, ledger, display)
        _objective(opened, ledger)
    with display.phase("Statistics"):
        statistics: Files = member_statistics(opened, opened.kinds, cache_of(opened.campaign), display)
        opened, solved = usable_solutions(opened, cache_of(opened.campaign), display)
        statistics = joined(statistics, solved)
        prepare_selection(opened, cache_of(opened.campaign), display)
    settings = distillation(opened)
    kept = KeptPredictions(directory.validation_predictions)
    with evaluators(opened, statistics, cluster, display) as executor, executor.planned(kept):
        references = _references(opened, directory, executor, ledger, display)
        measure_baselines(opened, statistics, directory, ledger, _provenance(opened), display)
        selection = _selection(opened, references, directory, executor, ledger, display)
        _search(opened, statistics, selection, directory, executor, ledger, display)
        _tell_stages(opened, directory, ledger, display)
        if settings is None:
            _test(opened, directory, executor, ledger, display)
    if settings is not None:
        with display.phase("Distillation"):
            merges = [row for row in best(ledger.rows(), len(ledger.rows())) if row.method != "distilled"]
            start = clear_best(merges, kept.read, _objective(opened, ledger))
            why = (
                "the best baseline"
                if start.origin == "anchor"
                else "a proposal that is clearly better than all baselines"
            )
            display.say(f"  starts from {in_words(start.method)} ({start.candidate}), {why}")
            distilled = _distil(opened, statistics, start.recipe, settings, display)
        with evaluators(opened, distilled[1] if distilled else statistics, cluster, display) as executor:
            if distilled is not None:
                made, _, notes = distilled
                candidate = Candidate(made, "validation", "search")
                with executor.planned(kept):
                    objective, retries = _objective(opened, ledger), campaign.resources.retries
                    notes_of = {made.identity: notes}
                    measure(
                        [candidate],
                        executor,
                        ledger,
                        objective,
                        _provenance(opened),
                        retries,
                        display.pulse.steering,
                        lambda recipe: notes_of.get(recipe.identity, {}),
                    )
                _tell_stages(opened, directory, ledger, display, last=True)
            _test(opened, directory, executor, ledger, display, distilled[0] if distilled else None)
    merges = [row for row in best(ledger.rows(), len(ledger.rows())) if row.method != "distilled"]
    measure_baselines(opened, statistics, directory, ledger, _provenance(opened), display, winner=merges[0].recipe)
    with display.phase("Export and report"):
        winner = best(ledger.rows())[0]
        directory.write_timings(display.timings)
        card = tables_as_markdown(directory, campaign)
        used = files_of(
            opened, statistics, winner, ledger.rows(), settings or DistilSettings(), cache_of(campaign), display
        )
        export(opened, used, winner.recipe, directory.best, table=card, row=winner)
    directory.write_timings(display.timings)
    write_report(directory.path)


def _distil(
    opened: OpenCampaign, statistics: Files, start: Recipe, settings: DistilSettings, display: Display
) -> tuple[Recipe, Files, dict[str, float]] | None:
    """Distils into a merge; None where that was not asked for, and fails: the merges that were found stand without it."""
    try:
        return distil(opened, statistics, start, settings, cache_of(opened.campaign), display)
    except MergequestError as error:
        if opened.campaign.distil is not None or isinstance(error, StoppedError):
            raise
        display.note(f"without distillation ({error}); `distil: {{}}` insists on it, `distil: false` leaves it out")
        return None


def _tell_stages(
    opened: OpenCampaign, directory: Directory, ledger: Ledger, display: Display, *, last: bool = False
) -> None:
    """Says what the stages so far, or the last of them, gained and cost."""
    gained = stages(
        ledger.rows(),
        _objective(opened, ledger),
        KeptPredictions(directory.validation_predictions).read,
        display.timings,
    )
    times = objective_scale(ledger.rows(), scales_of(opened.campaign.tasks))
    for stage in gained[-1:] if last else gained:
        display.say(f"  {in_a_line(stage, times)}")


def _references(
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
        retries, steering = opened.campaign.resources.retries, display.pulse.steering
        return measure(candidates, executor, ledger, None, _provenance(opened), retries, steering, progress=bar.reach)


def _selection(
    opened: OpenCampaign,
    references: Sequence[Row],
    directory: Directory,
    executor: RayExecutor,
    ledger: Ledger,
    display: Display,
) -> Selection:
    def scores(subsets: Sequence[Subset]) -> list[float | None]:
        method = METHODS[opened.campaign.greedy_method()]
        candidates = [
            Candidate(method.default_recipe(subset, opened.pool.model_type), "validation", "anchor")
            for subset in subsets
        ]
        retries, objective = opened.campaign.resources.retries, _objective(opened, ledger)
        steering = display.pulse.steering
        rows = measure(candidates, executor, ledger, objective, _provenance(opened), retries, steering)
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


def _search(
    opened: OpenCampaign,
    statistics: Files,
    selection: Selection,
    directory: Directory,
    executor: RayExecutor,
    ledger: Ledger,
    display: Display,
) -> None:
    campaign, settings = opened.campaign, opened.campaign.search
    with display.phase("Starts: what theory and gradients propose"):
        begin, predict = starts(opened, statistics, opened.space(selection.subsets), directory, display)
    space = opened.space(selection.subsets, [start.recipe for start in begin])
    objective, split = _objective(opened, ledger), search_split(opened)
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
            _provenance(opened),
            budget,
            ProgressDisplay(bar, display.pulse),
            history=memories(settings.sampler, settings.sampler_arguments, settings.history),
            split=split,
            describe=lambda recipe: {**predict(recipe), **cost.get(recipe.identity, {})},
            steering=display.pulse.steering,
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
            confirm(opened, executor, ledger, objective, _provenance(opened), display.pulse.steering)


def _test(
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
        retries, steering = opened.campaign.resources.retries, display.pulse.steering
        measure(candidates, executor, ledger, None, _provenance(opened), retries, steering, progress=bar.reach)


def _objective(opened: OpenCampaign, ledger: Ledger) -> Objective:
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


def _provenance(opened: OpenCampaign) -> Provenance:
    return Provenance(opened.campaign.name, code_version(), hashing.fingerprint(opened.fingerprints))

"""A campaign from beginning to end: pool → statistics → references → selection → search → test → export → report."""

from collections.abc import Sequence

from flows.campaign.baselines import measure_baselines, require_baselines
from flows.campaign.cluster import cluster_looked_at, connected, require_evaluators, worker_environment
from flows.campaign.distil import files_of
from flows.campaign.evaluators import evaluators, require_memory
from flows.campaign.export import export
from flows.campaign.needed_statistics import cache_of, joined, member_statistics, require_sources, usable_solutions
from flows.campaign.open_campaign import Files, OpenCampaign, open_campaign
from flows.campaign.phases import (
    distil_best,
    measure_distilled,
    measure_on_test,
    measure_references,
    objective_of,
    provenance_of,
    search_merges,
    select_members,
    tell_stages,
)
from flows.campaign.precision import settled
from flows.campaign.regime import require_room_for_a_model
from flows.campaign.selection import prepare_selection, require_kernel
from flows.campaign.stages import distillation, divides_by_unknown, require_kept_scores, require_stages
from flows.campaign.summary import summary, tables_as_markdown, write_report
from flows.campaign.tracking import require_trackers, tracked
from flows.campaign.weight_checks import keep
from flows.config.campaign_file import Campaign
from flows.config.sections import DistilSettings
from flows.config.yaml_file import require_writable
from flows.directory.campaign_directory import Directory
from flows.directory.heartbeat import heartbeat
from flows.directory.progress import Display
from flows.directory.steering import DirectorySteering, forget_stop
from flows.report.test_answers import KeptPredictions
from merging.checkpoints.directories.manifest import require_replaceable
from merging.errors import SettingsError
from merging.io import addresses, storage
from merging.statistics import STATISTICS
from ray_tasks.connect import Cluster
from search.ledger.ledger import Ledger
from search.objective import best
from search.samplers.make_sampler import sampler_of_trials
from search.subsets.choose_subsets import Selection

WITH_ADAM = 4
"""Weights, gradients and two averages of AdamW, in float32."""


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
        _require_settings(campaign)
        with heartbeat(directory.path, display.pulse, campaign.name), cluster_looked_at(campaign):
            with display.phase("Pool"):
                opened, ledger = _opened(campaign, directory, display, retry_failed)
                _require_searchable(opened, directory)
                require_kept_scores(opened, display.note)
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
                    require_evaluators(opened.campaign, cluster)
                    require_memory(opened, {}, cluster)
                    _work(opened, directory, cluster, ledger, display)
            finally:
                directory.write_timings(display.timings)
            directory.finish(campaign)
    return summary(directory)


def _listen(opened: OpenCampaign, directory: Directory, display: Display) -> None:
    """Has the driver look for what others leave in the directory for it."""
    methods, members = list(opened.campaign.search.methods), list(opened.pool.members)
    pool = opened.pool
    steering = DirectorySteering(directory.path, methods, members, pool.model_type, list(pool.weights), display.note)
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
    _require_settings(campaign)
    display = display or Display()
    opened, _ = _opened(campaign, directory, display)
    _require_searchable(opened, directory)
    require_kept_scores(opened, display.note)
    display.say(f"  {_what_runs(opened)}")


def _what_runs(opened: OpenCampaign) -> str:
    """The stages that a run has, in a line."""
    search, settings = opened.campaign.search, distillation(opened)
    baselines = len(opened.space().baselines())
    parts = [f"{baselines} baselines ({', '.join(search.methods)} at their defaults, the plain average)"]
    if search.candidates > baselines:
        until = f", until {search.patience} in a row are no better" if search.patience is not None else ""
        first = "the best of them with other factors, then " if search.line_search else ""
        parts.append(f"at most {search.candidates - baselines} proposals, {first}by {search.sampler}{until}")
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


def _require_settings(campaign: Campaign) -> None:
    """Looks for what is wrong without the pool, which may take long to read."""
    require_trackers(campaign.tracking)
    worker_environment(campaign)  # for the errors that it raises
    cache = campaign.statistics.cache
    if cache is not None and storage.exists(cache) and not storage.is_dir(cache):
        raise SettingsError(f"statistics.cache: {cache} is a file; name a directory")
    search = campaign.search
    sampler_of_trials(search.sampler, campaign.seed, search.sampler_arguments)  # for its errors, too


def _require_searchable(opened: OpenCampaign, directory: Directory) -> None:
    require_sources(opened)
    require_stages(opened)
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
                opened = settled(opened, directory, executor, ledger, display)
                references = measure_references(opened, directory, executor, ledger, display)
                return select_members(opened, references, directory, executor, ledger, display)


def _work(opened: OpenCampaign, directory: Directory, cluster: Cluster, ledger: Ledger, display: Display) -> None:
    """Everything that needs a cluster."""
    campaign, settings = opened.campaign, distillation(opened)
    if settings is not None:
        doing = "distillation (`distil: {rank: 16}` trains low-rank additions, `distil: false` leaves it out)"
        require_room_for_a_model(opened, cluster, doing, 1 if settings.rank else WITH_ADAM)
    if divides_by_unknown(opened):
        # a reference of 0 or below ends the campaign: better before the statistics than after
        with evaluators(opened, {}, cluster, display) as executor:
            opened = settled(opened, directory, executor, ledger, display)
            measure_references(opened, directory, executor, ledger, display)
        objective_of(opened, ledger)
    with display.phase("Statistics"):
        statistics: Files = member_statistics(opened, opened.kinds, cache_of(opened.campaign), display)
        opened, solved = usable_solutions(opened, cache_of(opened.campaign), display)
        statistics = joined(statistics, solved)
        prepare_selection(opened, cache_of(opened.campaign), display)
    kept = KeptPredictions(directory.validation_predictions)
    with evaluators(opened, statistics, cluster, display) as executor, executor.planned(kept):
        opened = settled(opened, directory, executor, ledger, display)
        references = measure_references(opened, directory, executor, ledger, display)
        measure_baselines(opened, statistics, directory, ledger, provenance_of(opened), display)
        selection = select_members(opened, references, directory, executor, ledger, display)
        search_merges(opened, statistics, selection, directory, executor, ledger, display)
        tell_stages(opened, directory, ledger, display)
        if settings is None:
            measure_on_test(opened, directory, executor, ledger, display)
    if settings is not None:
        with display.phase("Distillation"):
            distilled = distil_best(opened, statistics, settings, directory, ledger, display)
        with evaluators(opened, distilled[1] if distilled else statistics, cluster, display) as executor:
            if distilled is not None:
                made, _, notes = distilled
                with executor.planned(kept):
                    measure_distilled(opened, made, notes, executor, ledger, display)
                tell_stages(opened, directory, ledger, display, last=True)
            measure_on_test(opened, directory, executor, ledger, display, distilled[0] if distilled else None)
    merges = [row for row in best(ledger.rows(), len(ledger.rows())) if row.method != "distilled"]
    measure_baselines(opened, statistics, directory, ledger, provenance_of(opened), display, winner=merges[0].recipe)
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

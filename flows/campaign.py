"""A campaign from beginning to end: pool → statistics → references → selection → search → test → export → report."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO

from rich.console import Console

from flows.config import Campaign
from flows.directory import Directory
from flows.executor import RayExecutor
from flows.export import code_version, export
from flows.opening import Opened, open_campaign
from flows.progress import Bar, Display
from flows.reporting import write_report
from flows.selection import prepare_selection, select_subsets
from flows.statistics import member_statistics, solutions
from flows.table import as_markdown, as_rich, plain_average, results_table
from merging import storage
from merging.errors import SearchError
from merging.merge import base_recipe, member_recipe
from ray_tasks.cluster import Cluster, connect, evaluators_for
from ray_tasks.evaluation import EvaluatorPool
from search.candidate import Candidate, Provenance
from search.driver import Budget, search
from search.flight import measure
from search.ledger import Ledger
from search.objective import Objective, best, make_objective, own_scores
from search.samplers import make_sampler
from search.schema import Row
from search.selection import Selection
from search.space import Space
from search.study import open_study


def run(campaign: Campaign, display: Display) -> str:
    """Runs a campaign in its directory, or goes on with it; what is there already is not done again.

    Returns:
        The results table and the places of what was left, for the terminal.

    Raises:
        MergequestError: Something is wrong with the input, before any work; or the search cannot go on.
    """
    directory = Directory(campaign.directory or storage.absolute(storage.join("runs", campaign.name)))
    directory.check(campaign)
    with directory.locked():
        display.timings = directory.read_timings()
        if directory.is_finished(campaign):
            display.say(f"{directory.path} is finished: nothing to do")
            return summary(directory)
        with display.phase("Pool"):
            opened = open_campaign(campaign, display)
        directory.claim(campaign)
        storage.write_json(directory / "pool.json", opened.fingerprints())
        try:
            with connect() as cluster:
                display.say(f"  {cluster.describe()}")
                _work(opened, directory, cluster, display)
        finally:
            directory.write_timings(display.timings)
        directory.finish(campaign)
    return summary(directory)


def compute_statistics(campaign: Campaign, kinds: Sequence[str] | None, out: str | None, display: Display) -> list[str]:
    """Computes every member's statistics on its own task, unless they are there.

    Args:
        campaign: The campaign.
        kinds: Kinds of statistic; by default what its methods need.
        out: Directory for the files; by default the campaign's.
        display: Shows progress.

    Returns:
        Paths of the files.
    """
    with display.phase("Pool"):
        opened = open_campaign(campaign, display)
    cache = storage.absolute(out) if out else _cache(opened)
    with connect(), display.phase("Statistics"):
        files = member_statistics(opened, kinds or opened.kinds, cache, display)
    return [path for member in files for path in files[member]]


def run_selection(campaign: Campaign, display: Display) -> Selection:
    """Selects subsets of members as the campaign file says, and keeps them in the campaign's directory."""
    directory = Directory(campaign.directory or "")
    directory.check(campaign)
    with directory.locked():
        with display.phase("Pool"):
            opened = open_campaign(campaign, display)
        directory.claim(campaign)
        with connect() as cluster:
            with display.phase("Statistics"):
                prepare_selection(opened, _cache(opened), display)
            with evaluators(opened, {}, cluster, display) as executor:
                references = _references(opened, executor, Ledger(directory.ledger, campaign.name), display)
                return _selection(opened, references, directory, display)


@contextmanager
def evaluators(
    opened: Opened, statistics: dict[str, tuple[str, ...]], cluster: Cluster, display: Display
) -> Iterator[RayExecutor]:
    """Evaluators for the block, as many as fit, with threads and memory said."""
    resources = opened.campaign.resources
    gpus = (1.0 if cluster.gpus else 0.0) if resources.gpus is None else resources.gpus
    count = evaluators_for(cluster, resources.evaluators, resources.threads, gpus, opened.evaluator_bytes())
    pool = EvaluatorPool(opened.setup(statistics), count, resources.threads, gpus, resources.retries)
    try:
        pool.start()
        display.say(
            f"  {count} evaluators of {resources.threads} thread{'s' * (resources.threads > 1)}"
            f"{f' and {gpus:g} GPU' if gpus else ''}, about {opened.evaluator_bytes() / 1e9:.1f} GB each"
        )
        yield RayExecutor(pool, opened.campaign.search.examples)
    finally:
        pool.close()


def summary(directory: Directory) -> str:
    """The results table and the places of what a campaign left."""
    campaign = directory.campaign()
    rows = Ledger(directory.ledger, campaign.name).rows()
    text = StringIO()
    console = Console(file=text, width=max(Console().width, 140), force_terminal=Console().is_terminal)
    console.print(as_rich(results_table(rows, list(campaign.tasks))))
    places = {
        "ledger": f"{directory.ledger}  (pandas.read_parquet)",
        "winner": f"{directory.best}  (from_pretrained)",
        "report": directory.report,
        "campaign": directory / "campaign.yaml",
    }
    for name, place in places.items():
        console.print(f"{name:9} {place}", highlight=False, soft_wrap=True)
    return text.getvalue().rstrip()


def _work(opened: Opened, directory: Directory, cluster: Cluster, display: Display) -> None:
    """Everything that needs a cluster."""
    campaign = opened.campaign
    ledger = Ledger(directory.ledger, campaign.name)
    with display.phase("Statistics"):
        statistics = member_statistics(opened, opened.kinds, _cache(opened), display)
        statistics |= solutions(opened, _cache(opened), display)
        prepare_selection(opened, _cache(opened), display)
    with evaluators(opened, statistics, cluster, display) as executor:
        references = _references(opened, executor, ledger, display)
        selection = _selection(opened, references, directory, display)
        _search(opened, selection, directory, executor, ledger, display)
        _test(opened, executor, ledger, display)
    with display.phase("Export and report"):
        winner = best(ledger.rows())[0]
        table = as_markdown(results_table(ledger.rows(), list(opened.tasks)))
        export(opened, statistics, winner.recipe, directory.best, table=table, row=winner)
    directory.write_timings(display.timings)
    write_report(directory.path)


@dataclass
class _Watch:
    """Shows the search's progress."""

    bar: Bar

    def on_start(self, total: int) -> None:
        """Nothing to show yet."""

    def on_row(self, row: Row, best: Row | None, done: int, total: int) -> None:
        """Counts a row and shows the best so far."""
        note = f"best {best.objective:.4f} ({best.method}, {len(best.members)} members)" if best else ""
        self.bar.advance(1, note if row.status == "complete" else f"{note}; failed: {row.method}")


def _references(opened: Opened, executor: RayExecutor, ledger: Ledger, display: Display) -> list[Row]:
    """The base and every member as they are, on validation."""
    recipes = [base_recipe(), *(member_recipe(member) for member in opened.pool.members)]
    candidates = [Candidate(recipe, "validation", "reference") for recipe in recipes]
    with display.phase("References: base and members on validation"):
        return measure(candidates, executor, ledger, None, _provenance(opened), opened.campaign.resources.retries)


def _selection(opened: Opened, references: Sequence[Row], directory: Directory, display: Display) -> Selection:
    path = directory / "selection.json"
    if storage.exists(path):
        return Selection.from_dict(storage.read_json(path))
    with display.phase("Selection"):
        selection = select_subsets(opened, references, _cache(opened), display)
        storage.write_json(path, selection.as_dict())
        display.say(f"  {selection.mode}: {', '.join('+'.join(subset) for subset in selection.subsets)}")
    return selection


def _search(
    opened: Opened,
    selection: Selection,
    directory: Directory,
    executor: RayExecutor,
    ledger: Ledger,
    display: Display,
) -> None:
    campaign, settings = opened.campaign, opened.campaign.search
    space = Space(settings.methods, list(opened.pool.members), selection.subsets, settings.scaling)
    budget = Budget(settings.candidates, settings.seconds, settings.identical_errors, campaign.resources.retries)
    done = sum(row.origin in ("anchor", "search") for row in ledger.rows())
    with (
        display.phase(
            f"Search: {settings.candidates} candidates, {done} of them done"
            if done
            else f"Search: {settings.candidates} candidates"
        ),
        open_study(directory / "study", campaign.name, space, ledger, settings.storage) as study,
        display.bar("candidates", max(settings.candidates, done)) as bar,
    ):
        bar.advance(done)
        ending = search(
            study,
            space,
            lambda number: make_sampler(settings.sampler, campaign.seed, settings.sampler_arguments, number),
            ledger,
            executor,
            _objective(opened, ledger),
            _provenance(opened),
            budget,
            _Watch(bar),
        )
        if ending == "exhausted":
            display.note("the sampler has nothing new to propose: the search space is exhausted")
        if not best(ledger.rows()):
            raise SearchError("no candidate could be measured: see the `error` column of the ledger")


def _test(opened: Opened, executor: RayExecutor, ledger: Ledger, display: Display) -> None:
    """What the table shows, once, on test: references, the plain average, each method's best, the best of all."""
    if without := [name for name, task in opened.tasks.items() if not task.size("test")]:
        display.note(f"no test split of {', '.join(without)}: the table stays with validation")
        return
    ranked = best(ledger.rows(), len(ledger.rows()))
    chosen = [base_recipe(), *(member_recipe(member) for member in opened.pool.members)]
    average = plain_average(ledger.rows())
    chosen += [average.recipe] if average else []
    chosen += [row.recipe for row in {row.method: row for row in reversed(ranked)}.values()]
    chosen += [row.recipe for row in ranked[: opened.campaign.test.top]]
    candidates = [Candidate(recipe, "test", "final") for recipe in chosen]
    with display.phase(f"Test: {len({recipe.identity for recipe in chosen})} models, once"):
        measure(candidates, executor, ledger, None, _provenance(opened), opened.campaign.resources.retries)


def _objective(opened: Opened, ledger: Ledger) -> Objective:
    tasks_of = {member: task for member in opened.pool.members if (task := opened.campaign.task_of(member))}
    return make_objective(
        opened.campaign.search.objective,
        list(opened.tasks),
        own_scores(ledger.rows(), tasks_of, "validation"),
    )


def _provenance(opened: Opened) -> Provenance:
    return Provenance(opened.campaign.name, code_version(), storage.fingerprint(opened.fingerprints()))


def _cache(opened: Opened) -> str:
    """Where computed statistics are kept."""
    campaign = opened.campaign
    return campaign.statistics.cache or storage.join(campaign.directory or ".", "statistics")

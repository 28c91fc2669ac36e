"""What a campaign comes to, from what lies in its directory, finished or not: report, tables, summary."""

from collections.abc import Sequence
from datetime import UTC, datetime
from io import StringIO

import yaml
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from flows.campaign.export import versions
from flows.config.campaign_file import Campaign
from flows.config.recipe_file import RECIPE, load_recipe
from flows.directory.campaign_directory import Directory
from flows.report import significance, stages, table
from flows.report.cost import cost_in_words
from flows.report.page import Facts, render
from flows.report.scales import scales_of
from flows.report.significance import Compared
from flows.report.table import TableRow
from flows.report.test_answers import KeptPredictions
from merging.errors import MergequestError, SettingsError
from merging.io import addresses, atomic, documents, storage
from search.ledger.ledger import Ledger
from search.ledger.row import Row
from search.objective import best, make_objective, own_scores
from search.subsets.choose_subsets import Selection

NARROWEST = 100
"""Characters of a line of the summary, where the terminal has fewer or is none."""


def write_report(path: str) -> str:
    """Writes a campaign's report anew.

    Returns:
        The report's path.

    Raises:
        SettingsError: There is no campaign at `path`.
    """
    directory = Directory(path)
    campaign = directory.campaign()
    ledger = Ledger(directory.ledger, campaign.name)
    chosen = directory / "selection.json"
    page = render(
        ledger.rows(),
        tasks=list(campaign.tasks),
        selection=documents.read_as(chosen, Selection.from_dict) if storage.exists(chosen) else None,
        facts=facts(directory, campaign, ledger.rows()),
        predictions=KeptPredictions(directory.test_predictions).read,
    )
    atomic.write_text(directory.report, page)
    return directory.report


def tables_as_markdown(directory: Directory, campaign: Campaign) -> str:
    """The results and validation beside test, for the model card."""
    lines, compared = _tables(directory, campaign)
    worse = table.warning(lines)
    parts = [f"> **Warning.** {worse}\n"] if worse else []
    parts += [table.as_markdown(lines), *([significance.as_markdown(compared)] if compared else [])]
    if gained := _stages(directory, campaign):
        parts.append(stages.as_markdown(*gained))
    return "\n".join(parts)


def tables_as_rich(directory: Directory, campaign: Campaign, width: int) -> list[RichTable | Text]:
    """The results and validation beside test, for a terminal of so many characters a line; a warning where there is one."""
    lines, compared = _tables(directory, campaign)
    worse = table.warning(lines)
    return [
        table.as_rich(lines, width),
        *([significance.as_rich(compared)] if compared else []),
        *([stages.as_rich(*gained)] if (gained := _stages(directory, campaign)) else []),
        *([Text(f"WARNING: {worse}\n", style="bold red")] if worse else []),
    ]


def _tables(directory: Directory, campaign: Campaign) -> tuple[list[TableRow], list[Compared]]:
    rows = Ledger(directory.ledger, campaign.name).rows()
    lines = table.results_table(rows, list(campaign.tasks), scales_of(campaign.tasks))
    return lines, significance.compare(lines, KeptPredictions(directory.test_predictions).read)


def _stages(directory: Directory, campaign: Campaign) -> tuple[list[stages.Stage], int, float] | None:
    """What the stages gained, by what a score is shown times, and the smallest difference that validation can see.

    None where there is nothing to tell: of several objectives, or where a member's own score that the objective divides by
    is not there.
    """
    rows = Ledger(directory.ledger, campaign.name).rows()
    values = KeptPredictions(directory.validation_predictions).read
    tasks_of = {member: task for member in campaign.members if (task := campaign.task_of(member))}
    own, expected = (own_scores(rows, tasks_of, "validation", expected=expected) for expected in (False, True))
    settings = campaign.search
    try:
        objective = make_objective(
            settings.objectives, list(campaign.tasks), own, expected, settings.weights, None, campaign.unseen()
        )
    except SettingsError:
        return None
    listed = stages.stages(rows, objective, values, directory.read_timings())
    if len(listed) < 2:
        return None
    times = table.objective_scale(rows, scales_of(campaign.tasks))
    return listed, times, stages.smallest_visible(rows, objective, values)


def summary(directory: Directory) -> str:
    """The results table, validation beside test, and the places of what a campaign left."""
    text = StringIO()
    console = Console(file=text, width=max(Console().width, NARROWEST), force_terminal=Console().is_terminal)
    for shown in tables_as_rich(directory, directory.campaign(), console.width):
        console.print(shown)
    places = {
        "ledger": f"{directory.ledger}  (pandas.read_parquet)",
        "winner": f"{directory.best}  (from_pretrained)",
        "report": directory.report,
        "campaign": directory / "campaign.yaml",
    }
    for name, place in places.items():
        console.print(f"{name:9} {place}", highlight=False, soft_wrap=True)
    return text.getvalue().rstrip()


def exported_recipe(directory: Directory, rows: Sequence[Row]) -> str:
    """The exported winner's recipe with absolute paths, as a file; empty where nothing, or another candidate, is exported."""
    path = addresses.join(directory.best, RECIPE)
    winner = next(iter(best(rows)), None)
    if winner is None or not storage.exists(path):
        return ""
    try:
        exported = load_recipe(path)
        if exported.recipe().identity != winner.candidate:
            return ""
    except MergequestError:
        return ""
    return yaml.safe_dump(exported.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True)


def facts(directory: Directory, campaign: Campaign, rows: Sequence[Row] = ()) -> Facts:
    """What the ledger does not know of its campaign.

    Args:
        directory: The campaign's.
        campaign: The campaign.
        rows: Its ledger.
    """
    metrics = directory.metrics()
    return Facts(
        name=campaign.name,
        objective=", ".join(campaign.search.objectives),
        base=campaign.base,
        members={name: member.checkpoint for name, member in campaign.members.items()},
        tasks={
            name: f"{task.kind}, {metrics.get(name, task.judged_by)}".replace("_", " ")
            for name, task in campaign.tasks.items()
        },
        similarity=_similarity(campaign),
        scales=scales_of(campaign.tasks),
        phases=directory.read_timings(),
        commands=[
            f"mergequest run {directory / 'campaign.yaml'} --out NEW_DIRECTORY",
            f"mergequest merge {addresses.join(directory.best, 'recipe.yaml')} --out NEW_DIRECTORY",
        ],
        recipe=exported_recipe(directory, rows),
        notes=[note for note in (cost_in_words(rows), directory.precision()) if note],
        stages=stages.for_page(*gained) if (gained := _stages(directory, campaign)) else {},
        versions=versions(),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _similarity(campaign: Campaign) -> str:
    """What the S of a campaign's selection compares."""
    settings = campaign.selection
    if settings.similarity == "task-vector":
        return "the cosine between their task vectors"
    centred = " after the members' mean is taken away" if settings.centered else ""
    return f"the mean cosine between their representations of the same {settings.examples} examples{centred}"

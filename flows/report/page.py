"""The report: one HTML file that needs nothing but itself, from the ledger of a campaign, finished or not."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import plotly.io
import yaml
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from flows.report import figures, significance, table
from flows.report.figures.style import number
from flows.report.scales import Scales, percent
from flows.report.table import TableRow
from flows.report.templates import template
from flows.report.test_answers import Values
from search.candidate import ANCHORS, searched_split
from search.ledger.distinct import apart
from search.ledger.row import Row
from search.objective import best
from search.subsets.choose_subsets import Selection

TOP = 10
"""Candidates that are shown one by one."""
MANY = 10
"""With more tasks than this, a task's cell shows its standard error only under the pointer."""


@dataclass(frozen=True)
class Facts:
    """What the ledger does not know of its campaign; whatever is empty is left out of the report.

    Args:
        name: The campaign's name.
        objective: What was maximised, in words ("mean").
        base: Path of the base checkpoint.
        members: Member → path of its checkpoint.
        tasks: Task → a few words on it (kind, metric, numbers of examples).
        similarity: What the selection's S compares, in words.
        scales: How scores are shown.
        phases: Phase of the campaign → seconds of wall time.
        commands: Command lines that reproduce the campaign.
        recipe: The winner's recipe as it was exported, with all files that its merge reads.
        versions: Package or part → version.
        notes: What the user was told along the way.
        stages: What each stage gained: `caption`, `columns`, and `rows` of as many cells.
        written: When the report was written.
    """

    name: str = "Campaign"
    objective: str = ""
    base: str = ""
    members: Mapping[str, str] = field(default_factory=dict)
    tasks: Mapping[str, str] = field(default_factory=dict)
    similarity: str = ""
    scales: Scales = field(default_factory=Scales)
    phases: Mapping[str, float] = field(default_factory=dict)
    commands: Sequence[str] = ()
    recipe: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    stages: Mapping[str, Any] = field(default_factory=dict)
    written: str = ""


def render(
    rows: Sequence[Row],
    *,
    tasks: Sequence[str],
    selection: Selection | None = None,
    facts: Facts | None = None,
    predictions: Callable[[str], Values] = lambda _: {},
) -> str:
    """The report as one HTML page that needs no network.

    Args:
        rows: The ledger; may lack whatever a campaign has not come to yet.
        tasks: The campaign's tasks, in its order.
        selection: The subsets of members that the search chose among.
        facts: What else to tell.
        predictions: Candidate → what was kept of single test examples, for paired differences.
    """
    given = facts or Facts()
    looks = figures.Palette(rows, given.scales)
    lines = table.results_table(rows, tasks, given.scales)
    compared = significance.compare(lines, predictions)
    ranked = best(rows, len(rows))
    pool = given.members or {member for row in rows for member in row.members}
    estimated = {row.candidate: row for row in best(rows, len(rows), ANCHORS)}
    plots = {
        "beside": figures.beside(compared, looks),
        "history": figures.history(rows, looks),
        "front": figures.front(rows, looks),
        "scaling": figures.scaling(rows, looks),
        "importance": figures.importance(rows),
        "share": figures.share(rows),
        "similarity": figures.similarity(selection),
        "profile": figures.profile(rows, tasks, looks, TOP),
        "seconds": figures.seconds(rows, looks),
        "timeline": figures.timeline(rows, looks),
    }
    shown = {name: plot for name, plot in plots.items() if plot is not None}
    page: str = template("report.html.j2").render(
        facts=given,
        tasks=tasks,
        lines=_winner_first(lines),
        columns=table.columns(lines),
        keys=table.keys(lines),
        many=len(tasks) > MANY,
        subset=lambda members: table.subset(members, pool),
        behind={entry.line.row.candidate: significance.in_words(entry.behind) for entry in compared},
        caption=table.caption(lines),
        warning=table.warning(lines),
        objective_percent=percent(table.objective_scale([*ranked, *estimated.values()], looks.scales)),
        text=table.text,
        in_words=table.in_words,
        number=number,
        headline=_headline(lines),
        compared=significance.headline_rows(compared),
        comparison_columns=significance.COLUMNS,
        comparison_caption=significance.caption(compared),
        comparison_cells=significance.cells,
        lead=next((entry.behind for entry in compared if entry.line.kind == "average"), None),
        counts=_counts(rows),
        winner=ranked[0] if ranked else None,
        recipe=given.recipe or (_recipe(ranked[0], given) if ranked else ""),
        top=apart(ranked or estimated.values())[:TOP],
        estimated=estimated,
        objective_of=lambda row: table.objective_of(row, looks.scales),
        line_of={line.row.candidate: line for line in lines},
        selection=selection,
        failures=_failures(rows),
        plots=shown,
        figures=Markup(_as_script({name: json.loads(plotly.io.to_json(plot)) for name, plot in shown.items()})),
        plotly=Markup(get_plotlyjs()),
    )
    return page


def _as_script(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _winner_first(lines: Sequence[TableRow]) -> list[TableRow]:
    """The table's lines from the winner down to members and base."""
    merges = [line for line in lines if line.kind not in ("member", "base")]
    sources = {kind: [line for line in lines if line.kind == kind] for kind in ("member", "base")}
    return [*merges[::-1], *sources["member"], *sources["base"]]


def _headline(lines: Sequence[TableRow]) -> dict[str, TableRow]:
    """The lines that a reader looks for first, by what they are: winner, average, member."""
    by_kind: dict[str, TableRow] = {line.kind: line for line in lines if line.kind in ("winner", "average")}
    members = [line for line in lines if line.kind == "member" and line.validation is not None]
    if members:  # chosen as the winner was: by validation
        by_kind["member"] = max(members, key=lambda line: line.validation.value if line.validation else 0.0)
    return by_kind


def _counts(rows: Sequence[Row]) -> dict[str, float]:
    """Candidates by what became of them, and seconds from the first to the last evaluation."""
    split = searched_split(rows)
    tried = [row for row in rows if row.origin in ("anchor", "search") and row.split == split]
    counts: dict[str, float] = {
        status: sum(row.status == status for row in tried) for status in ("complete", "failed", "pruned")
    }
    counts["seconds"] = (
        (max(row.finished for row in rows) - min(row.started for row in rows)).total_seconds() if rows else 0.0
    )
    counts["confirmed"] = len(best(rows, len(rows)))
    return counts


def _failures(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Errors, the most frequent first, and the rows that failed by each."""
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        if row.status == "failed":
            grouped.setdefault(row.error or "no message", []).append(row)
    return sorted(grouped.items(), key=lambda item: -len(item[1]))


def _recipe(row: Row, facts: Facts) -> str:
    """The recipe file of a candidate, with the checkpoints' paths where they are known."""
    paths = facts.members
    value: dict[str, Any] = {"base": facts.base}
    value["members"] = {name: {"checkpoint": paths[name]} if name in paths else {} for name in row.members}
    recipe = row.recipe.as_dict()
    value |= {"method": recipe["method"], "scaling": recipe["scaling"]}
    if recipe["parameters"]:
        value["parameters"] = recipe["parameters"]
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)

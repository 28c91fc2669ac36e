"""The results table: what every reader asks first, for the terminal, the report and the model card alike."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isclose, isfinite, sqrt
from typing import Literal, TypeAlias

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from flows.report.scales import Scales, digits, percent
from merging.recipe import REFERENCE_BASE, REFERENCE_MEMBER, REFERENCES
from search.ledger.distinct import apart, distinct, weights_of
from search.ledger.row import Row
from search.objective import best

Kind: TypeAlias = Literal["base", "member", "baseline", "average", "method", "runner-up", "winner"]
BASELINES: Mapping[str, str] = {
    "ensemble": "ensemble of all members",
    "all_data": "trained on all data",
    "fine_tuned": "winner trained on the validation labels",
}
"""Baseline → what its line is called."""
MEAN = "mean"
UNSEEN = "unseen mean"
WORST = "worst task"
VALIDATION = "validation mean"
NOTHING = "–"


@dataclass(frozen=True)
class Cell:
    """A score.

    Args:
        value: The score.
        standard_error: NaN where it is unknown.
        times: What it is multiplied by to be read.
    """

    value: float
    standard_error: float
    times: int = 100


@dataclass(frozen=True)
class TableRow:
    """A line of the results table.

    Args:
        label: What it is, in words.
        kind: Why it is there.
        row: The ledger's row that it stands for: on validation where there is one, else on test.
        scores: Task → test score; None where it was not measured.
        mean: Mean over tasks of the test scores, unseen ones left out.
        unseen: Mean over the unseen tasks; None where there are none.
        unseen_tasks: Names of the unseen tasks.
        worst: The least of the test scores.
        worst_task: The task of the least.
        validation: Mean over tasks of the validation scores.
        best: Names of the columns in which no line is better: tasks, `MEAN`, `WORST`.
    """

    label: str
    kind: Kind
    row: Row
    scores: dict[str, Cell | None]
    mean: Cell | None = None
    unseen: Cell | None = None
    unseen_tasks: frozenset[str] = frozenset()
    worst: Cell | None = None
    worst_task: str | None = None
    validation: Cell | None = None
    best: frozenset[str] = frozenset()

    def cell(self, column: str) -> Cell | None:
        """The score in the column of a task, or in `MEAN`, `UNSEEN`, `WORST` or `VALIDATION`."""
        summary = {MEAN: self.mean, UNSEEN: self.unseen, WORST: self.worst, VALIDATION: self.validation}
        return summary[column] if column in summary else self.scores[column]


def plain_average(rows: Sequence[Row], split: str = "validation") -> Row | None:
    """The average of the most members with equal weights."""
    averages = [
        row for row in best(rows, len(rows), split) if row.method == "average" and len(set(row.scaling.values())) == 1
    ]
    return max(averages, key=lambda row: (len(row.members), row.origin == "anchor"), default=None)


def objective_of(row: Row, scales: Scales) -> Cell | None:
    """A row's objective; its standard error is known where it is the mean over tasks."""
    if row.objective is None:
        return None
    mean = _mean(_scores(row, list(row.scores), scales))
    is_mean = mean is not None and isclose(mean.value, row.objective, rel_tol=1e-9)
    error = mean.standard_error if mean is not None and is_mean else float("nan")
    return Cell(row.objective, error, objective_scale([row], scales))


def objective_scale(rows: Sequence[Row], scales: Scales) -> int:
    """What the objective of a campaign's rows is multiplied by to be read."""
    row = next((row for row in rows if row.objective is not None), None)
    return 100 if row is None else scales.of_objective(next(iter(row.objectives), ""), row.scores)


def in_words(method: str) -> str:
    """A method's name as a reader wants it."""
    return method.replace("_", " ")


def results_table(rows: Sequence[Row], tasks: Sequence[str], scales: Scales | None = None) -> list[TableRow]:
    """The table of base, members, plain average, best of each method, runners-up on test, and the winner.

    Runners-up differ from those before them by more than the scores' errors, see `search.ledger.distinct.apart`.

    A merge has one line, though it was found twice: the plain average that is the best of its method is only the plain
    average, and the best of the winner's method is the winner, which comes last.

    Args:
        rows: The ledger, in order; complete rows are used.
        tasks: The columns.
        scales: How they are shown; by default as shares.
    """
    scales = scales or Scales()
    complete = [row for row in rows if row.status == "complete"]
    lines: dict[object, tuple[str, Kind, Row]] = {}

    def add(label: str, kind: Kind, row: Row | None) -> None:
        if row is not None:
            lines.setdefault(weights_of(row), (label, kind, row))

    ranked = distinct(best(rows, len(rows)))
    best_of = {row.method: row for row in reversed(ranked)}
    measured = {row.candidate for row in complete if row.split == "test"}
    winner = weights_of(ranked[0]) if ranked else None
    references = _references(complete)
    for row in sorted(references, key=lambda row: len(row.members)):
        if row.method == REFERENCE_MEMBER:
            add("member " + ", ".join(row.members), "member", row)
        elif row.method == REFERENCE_BASE:
            add("base", "base", row)
    for row in references:
        if row.method not in REFERENCES:
            add(BASELINES.get(row.method, in_words(row.method)), "baseline", row)
    if (average := plain_average(rows)) is not None and weights_of(average) != winner:
        add("plain average", "average", average)
    for row in sorted(best_of.values(), key=lambda row: row.objective or 0.0):
        if weights_of(row) != winner:
            add(f"best {in_words(row.method)}", "method", row)
    for place, row in reversed(list(enumerate(apart(ranked)[1:], start=2))):
        if row.candidate in measured:
            add(f"runner-up {place}: {in_words(row.method)}", "runner-up", row)
    if ranked:
        is_average = average is not None and weights_of(average) == winner
        add(f"winner: {'plain average' if is_average else in_words(ranked[0].method)}", "winner", ranked[0])
    return _mark_best([_line(*line, complete, tasks, scales) for line in lines.values()], [*tasks, MEAN, UNSEEN, WORST])


def _references(complete: Sequence[Row]) -> list[Row]:
    """Base, members and baselines, each once: on validation where it was measured there, too."""
    kept: dict[str, Row] = {}
    for row in complete:
        if row.origin == "reference" and (row.candidate not in kept or row.split == "validation"):
            kept[row.candidate] = row
    return list(kept.values())


def _line(label: str, kind: Kind, row: Row, complete: Sequence[Row], tasks: Sequence[str], scales: Scales) -> TableRow:
    splits = {other.split: other for other in complete if other.candidate == row.candidate}
    scores = _scores(splits.get("test"), tasks, scales)
    seen = [task for task in tasks if task not in scales.unseen]
    known = {task: cell for task in seen if (cell := scores[task]) is not None}
    worst = min(known, key=lambda task: known[task].value) if len(known) == len(seen) and seen else None
    return TableRow(
        label=label,
        kind=kind,
        row=row,
        scores=scores,
        mean=_mean({task: scores[task] for task in seen}),
        unseen_tasks=scales.unseen,
        unseen=_mean({task: scores[task] for task in tasks if task in scales.unseen}),
        worst=known[worst] if worst is not None else None,
        worst_task=worst,
        validation=_mean(_scores(splits.get("validation"), seen, scales)),
    )


def _scores(row: Row | None, tasks: Sequence[str], scales: Scales) -> dict[str, Cell | None]:
    if row is None:
        return dict.fromkeys(tasks)
    return {
        task: Cell(row.scores[task], row.standard_errors.get(task, float("nan")), scales.of_task(task))
        if isfinite(row.scores.get(task, float("nan")))
        else None
        for task in tasks
    }


def _mean(scores: dict[str, Cell | None]) -> Cell | None:
    """Mean over tasks, whose examples are independent of each other; None unless all were measured."""
    cells = [cell for cell in scores.values() if cell is not None]
    if not cells or len(cells) < len(scores):
        return None
    error = sqrt(sum(cell.standard_error**2 for cell in cells)) / len(cells)
    scales = {cell.times for cell in cells}
    return Cell(sum(cell.value for cell in cells) / len(cells), error, scales.pop() if len(scales) == 1 else 1)


def _mark_best(table: list[TableRow], columns: Sequence[str]) -> list[TableRow]:
    tops = {
        column: max((cell.value for line in table if (cell := line.cell(column)) is not None), default=None)
        for column in columns
    }
    return [
        replace(
            line,
            best=frozenset(
                column for column in columns if (cell := line.cell(column)) is not None and cell.value == tops[column]
            ),
        )
        for line in table
    ]


def text(cell: Cell | None, *, exact: bool = True) -> str:
    """A score as it is read: `72.8 ± 0.6`, or without its standard error."""
    if cell is None:
        return NOTHING
    places = digits(cell.times)
    value = f"{cell.value * cell.times:.{places}f}"
    is_known = exact and isfinite(cell.standard_error)
    return f"{value} ± {cell.standard_error * cell.times:.{places}f}" if is_known else value


def shown(line: TableRow, column: str, *, exact: bool = True) -> str:
    """A line's cell as it is read; the worst task's with the task's name."""
    name = f" ({line.worst_task})" if column == WORST and line.worst_task is not None else ""
    return text(line.cell(column), exact=exact) + name


def keys(table: Sequence[TableRow]) -> list[str]:
    """The columns that are read first: means, worst task, validation mean."""
    unseen = [UNSEEN] if any(line.unseen is not None for line in table) else []
    return [MEAN, *unseen, WORST, VALIDATION]


def columns(table: Sequence[TableRow]) -> list[str]:
    """Names of the table's columns after the label: those of `keys`, then the tasks."""
    return [*keys(table), *(table[0].scores if table else ())]


def subset(members: Sequence[str], pool: Collection[str]) -> str:
    """A subset of members as it is read: `all 7` where it is the whole pool."""
    return f"all {len(members)}" if len(members) > 1 and set(members) == set(pool) else ", ".join(members)


def caption(table: Sequence[TableRow]) -> str:
    """What the numbers are, in one sentence."""
    if not any(cell for line in table for cell in line.scores.values()):
        means = {line.validation.times for line in table if line.validation is not None}
        return (
            f"Nothing has been measured on test yet; validation mean{percent(max(means, default=1))} ± standard error."
        )
    return f"Test scores{_percent(table)} ± standard error; the winner was chosen on validation, then measured once."


def _percent(table: Sequence[TableRow]) -> str:
    """What the caption says of the scales of a table's columns."""
    scales = {task: cell.times for line in table for task, cell in line.scores.items() if cell is not None}
    if len(set(scales.values())) == 1:
        return percent(next(iter(scales.values())))
    return f" (× 100 of {', '.join(task for task, times in scales.items() if times != 1)})"


def warning(table: Sequence[TableRow]) -> str | None:
    """What a reader must not overlook: that the winner is worse than what it was made from; None where it is not.

    By the mean over tasks on validation, which it was chosen on; an objective that is another may be served all the same.
    """
    winner = next((line.validation for line in table if line.kind == "winner"), None)
    known = [(line, line.validation) for line in table if line.validation is not None]
    if winner is None:
        return None
    better = [(line, cell) for line, cell in known if line.kind in ("base", "member") and cell.value > winner.value]
    if not better:
        return None
    line, cell = max(better, key=lambda entry: entry[1].value)
    sources = [other for other, _ in known if other.kind in ("base", "member")]
    whose = "the base and every member" if len(better) == len(sources) else line.label
    return (
        f"The winner is WORSE than {whose}: its mean over tasks on validation is {text(winner, exact=False)}, that of "
        f"{line.label} {text(cell, exact=False)}. No merge that was tried keeps what the models could before; use "
        f"{line.label} as it is, or search on."
    )


def as_rich(table: Sequence[TableRow], width: int | None = None) -> RichTable:
    """The table for the terminal; the best of each column is bold, the winner's line green.

    Args:
        table: The lines.
        width: Characters that there are; where they do not hold everything, tasks go without standard errors, then they
            are left out.
    """
    whole, brief = columns(table), keys(table)
    fullest = _as_rich(table, whole, exact=whole)
    if width is None or _width(fullest) <= width:
        return fullest
    shorter = _as_rich(table, whole, exact=[MEAN, VALIDATION])
    return shorter if _width(shorter) <= width else _as_rich(table, brief, exact=brief)


def _as_rich(table: Sequence[TableRow], names: Sequence[str], exact: Sequence[str]) -> RichTable:
    """These columns, those of `exact` with standard errors."""
    left_out = len(columns(table)) - len(names)
    more = f" The {left_out} tasks are in the report." if left_out else ""
    rich = RichTable(caption=caption(table) + more, caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    rich.add_column("model")
    for name in names:
        rich.add_column(Text(name), justify="right")
    for line in table:
        cells = [
            Text(shown(line, name, exact=name in exact), style="bold" if name in line.best else "") for name in names
        ]
        rich.add_row(Text(line.label), *cells, style="green" if line.kind == "winner" else None)
    return rich


def _width(table: RichTable) -> int:
    """Characters that a table takes without its caption, which wraps."""
    console = Console(width=10_000)
    return console.measure(table).maximum


def as_markdown(table: Sequence[TableRow]) -> str:
    """The table in GitHub's Markdown; the best of each column is bold."""
    names = columns(table)
    head = ["model", *names]
    lines = [markdown_line(head), markdown_line([":--", *("--:" for _ in names)])]
    for line in table:
        cells = [shown(line, name) for name in names]
        bold = [f"**{cell}**" if name in line.best else cell for name, cell in zip(names, cells, strict=True)]
        lines.append(markdown_line([line.label, *bold]))
    return "\n".join([*lines, "", caption(table), ""])


def markdown_line(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"

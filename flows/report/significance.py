"""Validation beside test, and how far the winner is from the others on the same test examples: is it any better, really?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import hypot, isfinite, sqrt

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from flows.report.scales import digits, percent
from flows.report.table import NOTHING, Cell, TableRow, markdown_line, text
from flows.report.test_answers import Values
from search.resolution import paired_variance

COLUMNS = ("validation", "test", "test − validation", "winner − this")


@dataclass(frozen=True)
class Difference:
    """How much the winner's mean over tasks is above another's on test.

    Args:
        value: The difference of the scores.
        standard_error: Over the choice of test examples.
        is_paired: Whether the examples were compared one by one, in every task. Where single answers were not kept, or
            what they contribute is not known (BLEU), the error is that of two independent samples, mostly too large.
        times: What it is multiplied by to be read.
    """

    value: float
    standard_error: float
    is_paired: bool
    times: int = 100


@dataclass(frozen=True)
class Compared:
    """A line of the comparison: mean scores over tasks.

    Args:
        line: The line of the results table.
        validation: What the search saw.
        test: What it did not see.
        change: Test − validation, whose examples are independent of each other.
        behind: Winner − this, on test; None for the winner itself.
    """

    line: TableRow
    validation: Cell
    test: Cell
    change: Cell
    behind: Difference | None


def compare(lines: Sequence[TableRow], predictions: Callable[[str], Values]) -> list[Compared]:
    """The lines that were measured on both splits, the winner first, then those that were best on validation.

    Args:
        lines: The results table.
        predictions: Candidate → what was kept of single test examples.
    """
    winner = next((line for line in lines if line.kind == "winner" and line.mean is not None), None)
    if winner is None:
        return []
    own, compared = predictions(winner.row.candidate), []
    for line in lines:
        validation, test = line.validation, line.mean
        if validation is None or test is None or line.kind == "base":
            continue
        error = hypot(validation.standard_error, test.standard_error)
        change = Cell(test.value - validation.value, error, test.times)
        behind = None if line is winner else difference(winner, line, own, predictions(line.row.candidate))
        compared.append(Compared(line, validation, test, change, behind))
    return sorted(compared, key=lambda entry: (entry.line is not winner, -entry.validation.value))


def headline_rows(compared: Sequence[Compared]) -> list[Compared]:
    """The few to look at first: winner, runners-up, the best of another method, the plain average, the best member.

    All are chosen by validation, as the winner was.
    """
    methods = [entry for entry in compared if entry.line.kind == "method"]
    members = [entry for entry in compared if entry.line.kind == "member"]
    best = [*sorted(methods, key=lambda entry: -(entry.line.row.objective or 0.0))[:1], *members[:1]]
    return [entry for entry in compared if entry.line.kind in ("winner", "runner-up", "average") or entry in best]


def difference(winner: TableRow, other: TableRow, own: Values, others: Values) -> Difference | None:
    """Winner − other of the mean over tasks on test; None where a task was not measured.

    The variance of a task's difference is `paired_variance`'s. Tasks are independent of each other.
    """
    values, variances, scales, is_paired = [], [], set[int](), True
    for task, cell in winner.scores.items():
        if task in winner.unseen_tasks:
            continue
        against = other.scores[task]
        if cell is None or against is None:
            return None
        values.append(cell.value - against.value)
        scales.add(cell.times)
        variance = paired_variance(task, own, others)
        if variance is None:
            is_paired = False
            variance = cell.standard_error**2 + against.standard_error**2
        variances.append(variance)
    times = scales.pop() if len(scales) == 1 else 1
    return Difference(sum(values) / len(values), sqrt(sum(variances)) / len(values), is_paired, times)


def scale(compared: Sequence[Compared]) -> int:
    """What the means are multiplied by to be read."""
    return compared[0].test.times if compared else 1


def cells(entry: Compared) -> list[str]:
    """A line's cells as they are read, in the order of `COLUMNS`."""
    change = signed(entry.change.value, entry.change.standard_error, entry.change.times)
    return [text(entry.validation), text(entry.test), change, in_words(entry.behind)]


def in_words(behind: Difference | None) -> str:
    """A difference as it is read: `+1.2 ± 0.6`."""
    if behind is None:
        return NOTHING
    return signed(behind.value, behind.standard_error, behind.times) + ("" if behind.is_paired else " (unpaired)")


def signed(value: float, error: float, times: int) -> str:
    """A difference and its standard error as they are read."""
    places = digits(times)
    shown = f"{value * times:+.{places}f}".replace("-", "−")
    return f"{shown} ± {error * times:.{places}f}" if isfinite(error) else shown


def caption(compared: Sequence[Compared]) -> str:
    """What the numbers are, and what they say."""
    is_paired = all(entry.behind.is_paired for entry in compared if entry.behind is not None)
    return (
        f"Means over tasks{percent(scale(compared))} ± standard error. The winner was chosen by validation: where it falls "
        "more from validation to test than models that nothing chose (members, plain average), that much of its lead was luck. "
        "Winner − this "
        "compares the answers to the same test examples."
        + ("" if is_paired else " Unpaired: what single answers contribute was not kept, or is not known.")
    )


def as_rich(compared: Sequence[Compared]) -> RichTable:
    """The most important rows for the terminal."""
    rich = RichTable(caption=caption(compared), caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    rich.add_column("validation beside test")
    for name in COLUMNS:
        rich.add_column(Text(name), justify="right", no_wrap=True)
    for entry in headline_rows(compared):
        style = "green" if entry.line.kind == "winner" else None
        rich.add_row(Text(entry.line.label), *map(Text, cells(entry)), style=style)
    return rich


def as_markdown(compared: Sequence[Compared]) -> str:
    """The most important rows in GitHub's Markdown."""
    lines = [markdown_line(["model", *COLUMNS]), markdown_line([":--", *("--:" for _ in COLUMNS)])]
    lines += [markdown_line([entry.line.label, *cells(entry)]) for entry in headline_rows(compared)]
    return "\n".join([*lines, "", caption(compared), ""])

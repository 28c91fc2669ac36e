"""What each stage of a campaign gained on validation, and what it cost."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from flows.report.cost import hours_in_words
from flows.report.scales import digits
from flows.report.significance import signed
from flows.report.table import NOTHING, in_words, markdown_line, plain_average
from flows.report.test_answers import Values
from search.ledger.row import Row
from search.objective import Objective, best
from search.resolution import RIVALS, Gap, gap, resolution

COLUMNS = ("best of it", "validation", "gain", "cost")
DISTILLED = "distilled"


@dataclass(frozen=True)
class Stage:
    """A stage of a campaign.

    Args:
        name: What it did, in words.
        row: The best candidate that came of it.
        gain: How much that is above the best of the stages before, of distillation above the merge that it started from, on
            the same validation examples; None for the first.
        cost: What it took, in words.
    """

    name: str
    row: Row
    gain: Gap | None
    cost: str

    @property
    def verdict(self) -> str:
        """What there is to say of the gain; empty where it is plain to see."""
        if self.gain is None or self.gain.value > self.gain.least:
            return ""
        return "nothing gained" if self.gain.value <= 0 else "within the error"


def stages(
    rows: Sequence[Row],
    objective: Objective,
    values: Callable[[str], Values],
    timings: Mapping[str, float] | None = None,
) -> list[Stage]:
    """The stages that a ledger tells of: plain average, methods at their defaults, search, distillation.

    Args:
        rows: The ledger.
        objective: What was maximised.
        values: Candidate → what was kept of single validation examples.
        timings: Phase → seconds.
    """
    ranked = best(rows, len(rows))
    merges = [row for row in ranked if row.method != DISTILLED]
    average = plain_average(rows)
    starts = [row for row in merges if row.origin == "anchor"]
    proposals = [row for row in rows if row.origin == "search" and row.method != DISTILLED and row.split != "test"]
    baselines = [row for row in rows if row.origin == "anchor" and row.split != "test"]
    listed: list[Stage] = []

    def add(name: str, row: Row | None, before: Row | None, cost: str) -> None:
        if row is None:
            return
        step = None if before is None else gap(row, before, values(row.candidate), values(before.candidate), objective)
        listed.append(Stage(name, row, step, cost))

    seconds = timings or {}
    add("plain average", average, None, "")
    prepared = _seconds(seconds, "Statistics")
    top = starts[0] if starts else None
    add("methods at their defaults", top, average, _joined(prepared, _measured(baselines)))
    if proposals:
        add("search", merges[0] if merges else None, top, _measured(proposals))
    if distilled := [row for row in ranked if row.method == DISTILLED]:
        start = next((row for row in merges if row.candidate == distilled[0].parameters.get("start")), None)
        add("distillation", distilled[0], start, _distillation(distilled[0], seconds))
    return listed


def smallest_visible(rows: Sequence[Row], objective: Objective, values: Callable[[str], Values]) -> float:
    """The smallest difference of two good baselines that validation can see; 0 where nothing is known of it."""
    ranked = [row for row in best(rows, len(rows)) if row.origin == "anchor"][: RIVALS + 1]
    return resolution(ranked, {row.candidate: values(row.candidate) for row in ranked}, objective)


def cells(stage: Stage, times: int) -> list[str]:
    """A stage's cells as they are read, in the order of `COLUMNS`."""
    shown = f"{(stage.row.objective or 0.0) * times:.{digits(times)}f}"
    return [
        in_words(stage.row.method),
        shown,
        ": ".join(filter(None, [_gained(stage, times), stage.verdict])),
        stage.cost,
    ]


def _gained(stage: Stage, times: int) -> str:
    """A stage's gain and its error as they are read."""
    if stage.gain is None:
        return NOTHING
    text = signed(stage.gain.value, stage.gain.standard_error, times)
    return text if stage.gain.is_paired else f"{text} (unpaired)"


def caption(times: int, least: float) -> str:
    """What the gains are, and how small a difference validation can see."""
    seen = (
        f" Validation can see differences of {least * times:.2g} between good merges, and none below it."
        if least
        else ""
    )
    return (
        "Gains on validation over the best of the stages before, of distillation over the merge that it started from, "
        f"example by example, ± standard error. The best of many proposals is partly luck.{seen}"
    )


def as_rich(stages: Sequence[Stage], times: int, least: float) -> RichTable:
    """The stages for the terminal."""
    rich = RichTable(caption=caption(times, least), caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    rich.add_column("stage")
    for name in COLUMNS:
        rich.add_column(Text(name), justify="left" if name in ("best of it", "cost") else "right")
    for stage in stages:
        rich.add_row(Text(stage.name), *map(Text, cells(stage, times)))
    return rich


def as_markdown(stages: Sequence[Stage], times: int, least: float) -> str:
    """The stages in GitHub's Markdown."""
    lines = [markdown_line(["stage", *COLUMNS]), markdown_line([":--", ":--", "--:", "--:", ":--"])]
    lines += [markdown_line([stage.name, *cells(stage, times)]) for stage in stages]
    return "\n".join([*lines, "", caption(times, least), ""])


def for_page(stages: Sequence[Stage], times: int, least: float) -> dict[str, Any]:
    """The stages for the report: see `Facts`."""
    rows = [[stage.name, *cells(stage, times)] for stage in stages]
    return {"caption": caption(times, least), "columns": ["stage", *COLUMNS], "rows": rows}


def in_a_line(stage: Stage, times: int) -> str:
    """A stage as it is told when it ends."""
    method, shown, _, cost = cells(stage, times)
    before = "its start" if stage.row.method == DISTILLED else "the best before it"
    step = "" if stage.gain is None else f", {_gained(stage, times)} over {before}"
    verdict = f" ({stage.verdict})" if stage.verdict else ""
    return f"{stage.name}: {method} {shown} on validation{step}{verdict}{f'; {cost}' if cost else ''}"


def _measured(rows: Sequence[Row]) -> str:
    """`9 candidates, 7,200 examples, 0.05 CPU hours`."""
    if not rows:
        return ""
    examples = sum(sum(row.examples.values()) for row in rows)
    hours = hours_in_words(sum(row.cpu_hours or 0.0 for row in rows), sum(row.gpu_hours or 0.0 for row in rows))
    count = f"{len(rows)} candidate{'s' * (len(rows) > 1)}"
    return _joined(count, f"{examples:,} examples", hours)


def _distillation(row: Row, timings: Mapping[str, float]) -> str:
    """`400 steps, 12,800 examples, 240 s`."""
    known = [
        f"{int(row.proxies[f'distil:{name}']):,} {name}"
        for name in ("steps", "examples")
        if f"distil:{name}" in row.proxies
    ]
    return _joined(*known, _seconds(timings, "Distillation"))


def _seconds(timings: Mapping[str, float], phase: str) -> str:
    """A phase's wall time."""
    return f"{timings[phase]:.0f} s of {phase.lower()}" if phase in timings else ""


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)

"""What an experiment found: figures, and what became of the paper's claims; kept as Parquet."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pandas as pd

from benchmarks.papers.bench import Measured, paired
from flows.report.experiments import COLUMNS, MEAN, SCORE
from merging.io import atomic

SETTINGS = "settings"
Verdict: TypeAlias = Literal["agrees", "no difference", "contradicts"]


@dataclass(frozen=True)
class Claim:
    """Something that a paper says, beside what was found.

    Args:
        claim: The paper's order or claim.
        ours: What was found, with its error.
        verdict: Whether it agrees.
    """

    claim: str
    ours: str
    verdict: Verdict


@dataclass
class Result:
    """An experiment's outcome on one pool and seed.

    Args:
        rows: Figures: `series`, `x` (a number or a name), `task` (`mean` for the mean over tasks), `quantity` (`score` or
            another), `value`, `error`.
        claims: What became of the paper's claims.
        plot: How rows of the mean are drawn: lines over x, points, or not at all.
        labels: Of the two axes.
        note: What differs from the paper.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    plot: Literal["lines", "points", "none"] = "none"
    labels: tuple[str, str] = ("", "")
    note: str = ""

    def add(self, series: str, x: float | str, measured: Measured) -> None:
        """A model's scores: one row a task, and their mean."""
        for task, value in measured.scores.items():
            error = float(measured.values[task].std() / len(measured.values[task]) ** 0.5)
            self.row(series, x, value, error, task)
        self.row(series, x, measured.mean, measured.error)

    def row(
        self,
        series: str,
        x: float | str,
        value: float,
        error: float = float("nan"),
        task: str = MEAN,
        quantity: str = SCORE,
    ) -> None:
        """One figure."""
        numbers = {"value": value, "error": error}
        self.rows.append({"series": series, "x": str(x), "task": task, "quantity": quantity, **numbers})

    def compare(self, claim: str, one: Measured, other: Measured, names: tuple[str, str]) -> None:
        """A claim that one model is above the other, told by the paired difference: twice its error decides."""
        gap, error = paired(one, other)
        ours = (
            f"{names[0]} {100 * one.mean:.1f}, {names[1]} {100 * other.mean:.1f}: {100 * gap:+.1f} ± {100 * error:.1f}"
        )
        self.claims.append(Claim(claim, ours, verdict(gap, error)))


def verdict(gap: float, error: float) -> Verdict:
    """Whether a difference is one: beyond twice its standard error. A score that is no number differs from none."""
    if abs(gap) > 2 * error:
        return "agrees" if gap > 0 else "contradicts"
    return "no difference"


def save(result: Result, path: Path, settings: str, **about: Any) -> None:
    """Writes a result as one Parquet file: figures and claims, told apart by `kind`.

    Args:
        result: The result.
        path: The file.
        settings: Hash of what it was made by, see `is_of`.
        about: Columns that every row has: experiment, what it is about, pool, seed, examples, seconds.
    """
    rows = [{"kind": "figure", **row} for row in result.rows]
    rows += [{"kind": "claim", **asdict(claim)} for claim in result.claims]
    frame = pd.DataFrame(rows).assign(
        plot=result.plot, xlabel=result.labels[0], ylabel=result.labels[1], note=result.note, **about
    )
    frame = frame.reindex(columns=list(COLUMNS))
    frame.attrs[SETTINGS] = settings  # in the file's metadata
    atomic.write_bytes(str(path), frame.to_parquet(index=False))


def is_of(path: Path, settings: str) -> bool:
    """Whether there is a result that these settings made; one of an earlier version, which does not say, is taken for it."""
    return path.exists() and pd.read_parquet(path).attrs.get(SETTINGS, settings) == settings

"""The page *The papers, reproduced*, its tables as CSV and LaTeX and its figures, all from the results alone."""

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.papers.figures import draw
from benchmarks.papers.result import load
from flows.report.table import markdown_line
from merging.io import atomic

PAPERS = {
    "gradient_matching": "Gradient matching (Daheim et al. 2024)",
    "regmean": "RegMean (Jin et al. 2023)",
    "quality_diversity": "Quality and diversity",
    "mats": "MaTS (Tam et al. 2024)",
}
HEAD = """# The papers, reproduced

Written by `python -m benchmarks.papers` from its results, never by hand. Every experiment runs on models and data that come
through package registries (`make papers`): *sentiment*, MiniLM on four domains, each with a head of its own; *continued*, the
same from a base that learnt movie reviews first, whose head all share; *tagging*, parts of speech in four genres; *images*, a
ViT-S on digits, clothes, things and signs. They are far smaller than the papers' pools: a claim that fails here may hold there.

Scores are of test, × 100. Differences are paired over the same examples, ± one standard error. Beyond twice of it they *agree*
with the paper or *contradict* it; within it there is *no difference* that so many examples show. One comparison in twenty is
beyond it by chance.
"""


def write_page(results: Path, docs: Path) -> None:
    """Writes docs/papers.md, docs/papers/*.svg, *.csv and *.tex from all results of a directory."""
    frame = load(sorted(results.glob("*.parquet")))
    atomic.write_text(str(docs / "papers.md"), page(frame, docs / "papers"))


def page(frame: pd.DataFrame, place: Path | None = None) -> str:
    """The page.

    Args:
        frame: All results.
        place: Where tables and figures are written; None for the page alone.
    """
    claims = frame[frame.kind == "claim"] if len(frame) else frame
    lines = [HEAD]
    if len(claims):
        counts = claims.verdict.value_counts()
        told = ", ".join(f"{int(counts.get(word, 0))} {word}" for word in ("agrees", "no difference", "contradicts"))
        lines += [f"## All claims\n\n{len(claims)} comparisons: {told}.\n", _claims(claims), ""]
        _written(place, "claims", claims[["experiment", "pool", "seed", "claim", "ours", "verdict"]])
    for paper, title in PAPERS.items():
        own = frame[frame.experiment.str.startswith(f"{paper}.")] if len(frame) else frame
        if len(own):
            lines += [f"## {title}", ""]
        for name in dict.fromkeys(own.experiment) if len(own) else ():
            lines += _experiment(name, own[own.experiment == name], place)
    return "\n".join(lines).rstrip() + "\n"


def _claims(claims: pd.DataFrame) -> str:
    rows = [["seed", "experiment", "pool", "the paper's claim", "ours", ""]]
    for row in claims.itertuples():
        verdict = f"**{row.verdict}**" if row.verdict == "contradicts" else str(row.verdict)
        rows.append([str(row.seed), str(row.experiment), str(row.pool), str(row.claim), str(row.ours), verdict])
    return _table(rows)


def _experiment(name: str, frame: pd.DataFrame, place: Path | None) -> list[str]:
    about = (import_module(f"benchmarks.papers.{name}").__doc__ or "").strip()
    lines = [f"### `{name}`", "", about, ""]
    for (pool, seed), own in frame.groupby(["pool", "seed"]):
        figures = own[own.kind == "figure"]
        key = f"{name}.{pool}.{seed}"
        limit, seconds = int(own.examples.iloc[0]), own.seconds.iloc[0]
        lines += [
            f"*{pool}*, seed {seed}, {f'up to {limit}' if limit else 'all'} test examples a task "
            f"({seconds:.0f} s, measurements that other experiments had made not counted).",
            "",
        ]
        if note := str(own.note.iloc[0] or ""):
            lines += [note, ""]
        _written(place, key, figures[["series", "x", "task", "value", "error"]])
        means = figures[figures.task == "mean"]
        if (plot := own["plot"].iloc[0]) != "none":
            picture = _picture(means, plot, (own.xlabel.iloc[0], own.ylabel.iloc[0]))
            if place is not None:
                atomic.write_text(str(place / f"{key}.svg"), picture)
            lines += [f"![{name} on {pool}](papers/{key}.svg)", ""]
        if plot != "points" or len(means) < 20:
            lines += [_figures(figures), ""]
    return lines


def _figures(figures: pd.DataFrame) -> str:
    """Series down; tasks across, or what x is where that varies."""
    rest = figures[~figures.task.isin(("mean",))]
    tasks = [task for task in dict.fromkeys(rest.task) if " " not in task]
    if figures.x.nunique() == 1 and tasks:
        rows = [["", *tasks, "mean"]]
        for series in dict.fromkeys(figures.series):
            own = figures[figures.series == series].set_index("task")
            rows.append([series, *(_number(own, task) for task in (*tasks, "mean"))])
        return _table(rows)
    means = figures[figures.task == "mean"] if (figures.task == "mean").any() else figures
    xs = list(dict.fromkeys(means.x))
    rows = [["mean over tasks", *xs]]
    for series in dict.fromkeys(means.series):
        own = means[means.series == series].drop_duplicates("x").set_index("x")
        rows.append([series, *(_number(own, x) for x in xs)])
    return _table(rows)


def _number(rows: Any, key: str) -> str:
    if key not in rows.index:
        return "–"
    value, error = rows.loc[key, "value"], rows.loc[key, "error"]
    return f"{100 * value:.1f}" + (f" ± {100 * error:.1f}" if error == error else "")


def _picture(means: pd.DataFrame, plot: str, labels: tuple[str, str]) -> str:
    series: dict[str, list[tuple[float, float, float]]] = {}
    for row in means.itertuples():
        series.setdefault(str(row.series), []).append((float(row.x), float(row.value), float(row.error)))
    return draw(series, labels, lines=plot == "lines")


def _table(rows: Iterable[Iterable[str]]) -> str:
    head, *rest = [list(row) for row in rows]
    rule = [":--", *("--:" for _ in head[1:])]
    return "\n".join(markdown_line(row) for row in (head, rule, *rest))


def _written(place: Path | None, name: str, frame: pd.DataFrame) -> None:
    """A table as CSV and LaTeX."""
    if place is not None:
        atomic.write_text(str(place / f"{name}.csv"), frame.to_csv(index=False))
        atomic.write_text(str(place / f"{name}.tex"), _latex(frame))


def _latex(frame: pd.DataFrame) -> str:
    """A `tabular` without packages."""
    special = {
        "&": r"\&",
        "%": r"\%",
        "_": r"\_",
        "#": r"\#",
        "±": r"$\pm$",
        "α": r"$\alpha$",
        "ρ": r"$\rho$",
        "β": r"$\beta$",
    }
    special |= {"₀": "$_0$", "‖": r"$\|$", "…": r"\dots{}", "×": r"$\times$", "−": "$-$", "′": "'", "≥": r"$\geq$"}

    def cell(value: Any) -> str:
        text = f"{value:.4f}" if isinstance(value, float) else str(value)
        return "".join(special.get(character, character) for character in text)

    lines = [r"\begin{tabular}{" + "l" * len(frame.columns) + "}", r"\hline"]
    lines += [" & ".join(cell(name) for name in frame.columns) + r" \\", r"\hline"]
    lines += [" & ".join(cell(value) for value in row) + r" \\" for row in frame.itertuples(index=False)]
    return "\n".join([*lines, r"\hline", r"\end{tabular}", ""])

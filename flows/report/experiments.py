"""Results of experiments as a page of claims, figures and tables, and as SVG, CSV and LaTeX; from Parquet files alone."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from typing import Any

import pandas as pd
from markupsafe import Markup

from flows.report.figures.series import draw
from flows.report.table import markdown_line
from flows.report.templates import template
from merging.errors import SettingsError
from merging.io import addresses, atomic, storage

SUFFIX = ".parquet"
PAGE = "experiments.html"
SCORE = "score"
"""The quantity that is shown × 100; all others are shown as they are."""
MEAN = "mean"
"""The task of a row that is of all tasks."""
VERDICTS = ("agrees", "no difference", "contradicts")
COLUMNS = (
    "kind",
    "experiment",
    "pool",
    "seed",
    "about",
    "note",
    "examples",
    "seconds",
    "plot",
    "xlabel",
    "ylabel",
    "series",
    "x",
    "task",
    "quantity",
    "value",
    "error",
    "claim",
    "ours",
    "verdict",
)
"""Of a result's Parquet file. `kind`: a row is a `figure` (`series` to `error`) or a `claim` (`claim` to `verdict`)."""
FEW = 20
"""Points of a figure that a table shows, too."""


def load(paths: Sequence[str]) -> pd.DataFrame:
    """All results, one below the other.

    Args:
        paths: Parquet files, and directories of them.

    Raises:
        SettingsError: A file holds no result, or there is none.
        StorageError: A file cannot be read.
    """
    files = [file for path in paths for file in _files(path)]
    return pd.concat([_read(file) for file in files], ignore_index=True)


def _files(path: str) -> list[str]:
    if not storage.is_dir(path):
        return [path]
    if names := [name for name in storage.list_dir(path) if name.endswith(SUFFIX)]:
        return [addresses.join(path, name) for name in names]
    raise SettingsError(
        f"{path} holds no results of experiments (*{SUFFIX}), which `python -m benchmarks.papers` writes"
    )


def _read(path: str) -> pd.DataFrame:
    content = storage.read_bytes(path)
    try:
        frame = pd.read_parquet(BytesIO(content))
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path} is no Parquet file: {addresses.in_words(error)}") from error
    if missing := [name for name in COLUMNS if name not in frame]:
        raise SettingsError(f"{path} is no result of an experiment: it lacks the columns {', '.join(missing)}")
    if frame.empty:
        raise SettingsError(f"{path} is a result without rows")
    drawn = frame[(frame.kind == "figure") & (frame["plot"] != "none") & (frame.quantity == SCORE)]
    if not pd.api.types.is_numeric_dtype(frame.value) or not _numeric(drawn.x):
        raise SettingsError(f"{path} is no result of an experiment: its `value`, or `x` of what is drawn, is no number")
    return frame


@dataclass(frozen=True)
class Table:
    """A table of text.

    Args:
        rows: Its lines, the first of which is its head.
        caption: What its numbers are, where they are no scores.
        words: Whether cells are words, not numbers.
    """

    rows: Sequence[Sequence[str]]
    caption: str = ""
    words: bool = False

    def as_markdown(self) -> str:
        """A Markdown table, its caption before it."""
        head, *rest = self.rows
        rule = [":--", *(":--" if self.words else "--:" for _ in head[1:])]
        lines = [markdown_line(row) for row in (head, rule, *rest)]
        return "\n".join([f"*{self.caption}*\n", *lines] if self.caption else lines)

    def as_latex(self) -> str:
        """A `tabular` that needs no packages."""
        head, *rest = [" & ".join(map(_escaped, row)) + r" \\" for row in self.rows]
        columns = ("l" if self.words else "r") * (len(self.rows[0]) - 1)
        before = [f"% {self.caption}"] if self.caption else []
        begin = [r"\begin{tabular}{l" + columns + "}", r"\hline", head, r"\hline"]
        return "\n".join([*before, *begin, *rest, r"\hline", r"\end{tabular}", ""])


class Experiment:
    """An experiment's result on one pool and seed.

    Args:
        rows: Its rows of `COLUMNS`.
    """

    def __init__(self, rows: pd.DataFrame) -> None:
        first = rows.iloc[0]
        self.name, self.pool, self.seed = str(first.experiment), str(first.pool), int(first.seed)
        self.about, self.note = _text(first.about), _text(first.note)
        self.limit, self.seconds = int(first.examples), float(first.seconds)
        self.plot, self.labels = str(first["plot"]), (str(first.xlabel), str(first.ylabel))
        self.figures = rows[rows.kind == "figure"]

    @property
    def key(self) -> str:
        """Names its files."""
        return f"{self.name}.{self.pool}.{self.seed}"

    @property
    def extent(self) -> str:
        """On how much it was measured, and how long that took."""
        most = f"up to {self.limit}" if self.limit else "all"
        time = f"{self.seconds:.0f} s, measurements that other experiments had made not counted"
        return f"seed {self.seed}, {most} test examples a task ({time})"

    @cached_property
    def _means(self) -> pd.DataFrame:
        return self.figures[(self.figures.task == MEAN) & (self.figures.quantity == SCORE)]

    def picture(self) -> str | None:
        """The figure as SVG; None for an experiment that has none."""
        if self.plot == "none" or self._means.empty:
            return None
        series: dict[str, list[tuple[float, float, float]]] = {}
        for row in self._means.itertuples():
            series.setdefault(str(row.series), []).append((float(str(row.x)), float(row.value), float(row.error)))  # type: ignore[arg-type]
        return draw(series, self.labels, lines=self.plot == "lines")

    def tables(self) -> list[Table]:
        """Scores, unless the figure has too many points to list or one a series, then every other quantity."""
        scores = self.figures[self.figures.quantity == SCORE]
        drawn = self.plot == "points" and (len(self._means) >= FEW or self._means.series.is_unique)
        listed = [_scores(scores)] if len(scores) and not drawn else []
        others = [name for name in dict.fromkeys(self.figures.quantity) if name != SCORE]
        return listed + [_across(self.figures[self.figures.quantity == name], name, name) for name in others]


def experiments(frame: pd.DataFrame) -> list[Experiment]:
    """What is in a frame, by name in the order of its rows, then by pool and seed."""
    names = dict.fromkeys(frame.experiment)
    return [Experiment(own) for name in names for _, own in frame[frame.experiment == name].groupby(["pool", "seed"])]


def claims(frame: pd.DataFrame) -> Table | None:
    """Every claim beside what was measured, the seeds of one claim side by side; None where there is none."""
    seeds = sorted({int(seed) for seed in frame[frame.kind == "claim"].seed})
    rows = [["experiment", "pool", "the paper's claim"]]
    for seed in seeds:
        rows[0] += [f"seed {seed}", ""]
    for name, pool, claim, own in _by_claim(frame):
        rows.append([name, pool, claim, *(word for seed in seeds for word in own.get(seed, ("–", "")))])
    return Table(rows, words=True) if len(rows) > 1 else None


def counted(frame: pd.DataFrame) -> str:
    """How many claims came out how, and how seeds agree on those that were measured with several."""
    counts = frame[frame.kind == "claim"].verdict.value_counts()
    words = f"{int(counts.sum())} comparisons: " + ", ".join(f"{int(counts.get(word, 0))} {word}" for word in VERDICTS)
    verdicts = [{verdict for _, verdict in own.values()} for *_, own in _by_claim(frame) if len(own) > 1]
    if not verdicts:
        return words
    same = sum(len(kinds) == 1 for kinds in verdicts)
    opposite = sum({VERDICTS[0], VERDICTS[2]} <= kinds for kinds in verdicts)
    return (
        f"{words}. {len(verdicts)} of more than one seed: {same} with the same verdict, {opposite} with opposite ones, "
        f"{len(verdicts) - same - opposite} where one seed shows no difference"
    )


def seeds_apart(frame: pd.DataFrame) -> list[str]:
    """Each claim that does not come out alike with every seed that it was measured with, and how it does."""
    return [
        f"{name} on {pool}: {claim}: " + ", ".join(f"{verdict} with seed {seed}" for seed, (_, verdict) in own.items())
        for name, pool, claim, own in _by_claim(frame)
        if len({verdict for _, verdict in own.values()}) > 1
    ]


def _by_claim(frame: pd.DataFrame) -> list[tuple[str, str, str, dict[int, tuple[str, str]]]]:
    """Experiment, pool, claim, and seed → what was measured and the verdict; claims that say the same in their order."""
    by_claim: dict[tuple[str, str, str, int], dict[int, tuple[str, str]]] = {}
    counts: dict[tuple[str, str, str, int], int] = {}
    for row in frame[frame.kind == "claim"].itertuples():
        key = (str(row.experiment), str(row.pool), str(row.claim))
        seed = int(row.seed)  # type: ignore[arg-type]
        counts[*key, seed] = counts.get((*key, seed), 0) + 1
        by_claim.setdefault((*key, counts[*key, seed]), {})[seed] = (str(row.ours), str(row.verdict))
    order = list(dict.fromkeys(key[:2] for key in by_claim))
    listed = sorted(by_claim.items(), key=lambda item: order.index(item[0][:2]))
    return [(name, pool, claim, own) for (name, pool, claim, _), own in listed]


def as_html(frame: pd.DataFrame, written: str = "") -> str:
    """One page that needs nothing but itself, in the look of a campaign's report.

    Args:
        frame: Results, as `load` gives them.
        written: When.
    """
    listed = experiments(frame)
    pictures = {one.key: Markup(picture) for one in listed if (picture := one.picture())}
    page: str = template("experiments.html.j2").render(
        claims=claims(frame), counted=counted(frame), experiments=listed, pictures=pictures, written=written
    )
    return page


def write_files(frame: pd.DataFrame, directory: str) -> list[str]:
    """Writes every result's figure as SVG, its numbers as CSV and its tables as LaTeX, and the same of all claims.

    Args:
        frame: Results, as `load` gives them.
        directory: Gets `<experiment>.<pool>.<seed>.svg`, `.csv` and `.tex`, `claims.csv` and `claims.tex`.

    Returns:
        The files.

    Raises:
        StorageError: There is no right or no space to write.
    """
    files: dict[str, str] = {}
    for one in experiments(frame):
        if picture := one.picture():
            files[f"{one.key}.svg"] = picture
        columns = ["series", "x", "task", "quantity", "value", "error"]
        files[f"{one.key}.csv"] = one.figures[columns].to_csv(index=False)
        files[f"{one.key}.tex"] = "\n".join(table.as_latex() for table in one.tables())
    if table := claims(frame):
        columns = ["experiment", "pool", "seed", "claim", "ours", "verdict"]
        files["claims.csv"] = frame[frame.kind == "claim"][columns].to_csv(index=False)
        files["claims.tex"] = table.as_latex()
    for name, content in files.items():
        atomic.write_text(addresses.join(directory, name), content)
    return [addresses.join(directory, name) for name in files]


def _scores(figures: pd.DataFrame) -> Table:
    """Series down; tasks across where x is the same everywhere, else what x is."""
    tasks = [task for task in dict.fromkeys(figures.task) if task != MEAN]
    if figures.x.nunique() > 1 or not tasks:
        return _across(figures, "mean over tasks")
    rows = [["", *tasks, MEAN]]
    for series, own in _by_series(figures):
        cells = own.set_index("task")
        rows.append([series, *(_number(cells, task) for task in (*tasks, MEAN))])
    return Table(rows)


def _across(figures: pd.DataFrame, corner: str, caption: str = "") -> Table:
    """Series down, what x is across; means over tasks where there are any."""
    means = figures[figures.task == MEAN] if (figures.task == MEAN).any() else figures
    xs = sorted(dict.fromkeys(means.x), key=lambda x: float(x)) if _numeric(means.x) else list(dict.fromkeys(means.x))
    rows = [[corner, *xs]]
    for series, own in _by_series(means):
        cells = own.drop_duplicates("x").set_index("x")
        rows.append([series, *(_number(cells, x) for x in xs)])
    return Table(rows, caption)


def _by_series(figures: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    for series in dict.fromkeys(figures.series):
        yield str(series), figures[figures.series == series]


def _numeric(values: Iterable[str]) -> bool:
    return not pd.to_numeric(pd.Series(list(values)), errors="coerce").isna().any()


def _number(cells: pd.DataFrame, key: str) -> str:
    """A cell: of a score × 100 and with its standard error."""
    if key not in cells.index:
        return "–"
    row: Any = cells.loc[key]
    if row["quantity"] != SCORE:
        return f"{row['value']:.3g}"
    return f"{100 * row['value']:.1f}" + (f" ± {100 * row['error']:.1f}" if row["error"] == row["error"] else "")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


SPECIAL = {character: f"\\{character}" for character in "&%_#${}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "−": "$-$",
    "–": "--",
    "≥": r"$\geq$",
    "‖": r"$\|$",
    "₀": "$_0$",
    "⁻": "$^-$",
    "¹": "$^1$",
    "…": r"\dots{}",
    "′": "'",
    "α": r"$\alpha$",
    "β": r"$\beta$",
    "λ": r"$\lambda$",
    "ρ": r"$\rho$",
    "Λ": r"$\Lambda$",
}
"""What LaTeX without packages reads otherwise."""


def _escaped(text: str) -> str:
    return "".join(SPECIAL.get(character, character) for character in text)

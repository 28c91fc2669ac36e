"""`mergequest report --experiment`: results as Parquet become a page, figures, CSV and LaTeX."""

import re
from html.parser import HTMLParser

import pandas as pd
import pytest
from typer.testing import CliRunner

from flows.cli.app import app
from flows.report.experiments import COLUMNS, claims, counted, load, seeds_apart

ABOUT = {"about": "Is A <b>better</b> & B?", "note": "", "examples": 0, "seconds": 3.0, "xlabel": "α", "ylabel": "y"}


def result(name, rows, **about):
    frame = pd.DataFrame(rows).assign(experiment=name, pool="tiny", seed=0, **ABOUT | about)
    return frame.reindex(columns=list(COLUMNS))


def row(series, x, task, value, error=float("nan"), quantity="score"):
    return {
        "kind": "figure",
        "series": series,
        "x": x,
        "task": task,
        "quantity": quantity,
        "value": value,
        "error": error,
    }


@pytest.fixture
def results(tmp_path):
    """A curve with a second quantity and two claims, and a table of tasks."""
    claims = [("A is above B", "A 80.0, B 70.0: +10.0 ± 2.0", "agrees"), ("B_1 is", "-3.0 ± 1.0", "contradicts")]
    curve = [row("A", x, "mean", value, 0.01) for x, value in (("10.0", 0.5), ("2.0", 0.61234))]
    curve += [row("A", "2.0", "one", 0.7, 0.02), row("A", "2.0", "mean", 1234.5, quantity="residual_norm")]
    curve += [{"kind": "claim", **dict(zip(("claim", "ours", "verdict"), claim, strict=True))} for claim in claims]
    table = [row("m & n", "", task, value, 0.015) for task, value in (("one", 0.25), ("two", 0.75), ("mean", 0.5))]
    directory = tmp_path / "results"
    directory.mkdir()
    result("paper.curve", curve, plot="lines").to_parquet(directory / "curve.parquet")
    result("paper.table", table, plot="none", examples=7).to_parquet(directory / "table.parquet")
    return directory


def report(*words):
    return CliRunner().invoke(app, ["report", *map(str, words)])


class Cells(HTMLParser):
    """The rows of all tables."""

    def __init__(self, html):
        super().__init__()
        self.rows, self._open = [], False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self._open = self._open or tag in ("td", "th")

    def handle_endtag(self, tag):
        self._open = self._open and tag not in ("td", "th")

    def handle_data(self, data):
        if self._open:
            self.rows[-1][-1] += data


def test_results_become_a_page_and_files(results):
    outcome = report(results, "--experiment")
    assert outcome.exit_code == 0, outcome.output
    place = results / "report"
    assert outcome.stdout.strip() == str(place / "experiments.html")
    assert {path.name for path in place.iterdir()} == {
        "experiments.html",
        "claims.csv",
        "claims.tex",
        "paper.curve.tiny.0.svg",
        *(f"paper.{name}.tiny.0.{kind}" for name in ("curve", "table") for kind in ("csv", "tex")),
    }
    html = (place / "experiments.html").read_text()
    rows = Cells(html).rows
    assert ["paper.curve", "tiny", "A is above B", "A 80.0, B 70.0: +10.0 ± 2.0", "agrees"] in rows
    assert rows[3:5] == [["mean over tasks", "2.0", "10.0"], ["A", "61.2 ± 1.0", "50.0 ± 1.0"]]
    assert rows[5:7] == [["residual_norm", "2.0"], ["A", "1.23e+03"]]
    assert rows[7:9] == [["", "one", "two", "mean"], ["m & n", "25.0 ± 1.5", "75.0 ± 1.5", "50.0 ± 1.5"]]
    assert "Is A &lt;b&gt;better&lt;/b&gt; &amp; B?" in html
    assert "2 comparisons: 1 agrees, 0 no difference, 1 contradicts" in html
    assert "up to 7 test examples" in html
    assert html.count("<svg") == 1
    assert not re.findall(r"(?:src|href)=\"(?!#)", html)  # nothing but itself
    assert "<script" not in html
    figures = pd.read_csv(place / "paper.curve.tiny.0.csv")
    assert figures[figures.quantity == "score"].value.tolist() == [0.5, 0.61234, 0.7]
    assert pd.read_csv(place / "claims.csv").verdict.tolist() == ["agrees", "contradicts"]


def test_seeds_of_a_claim_stand_side_by_side(results):
    """Also where one says it twice, or only one has it; the words count where they agree."""
    said = [("A is above B", "+1", "agrees"), ("A is above B", "+2", "no difference"), ("C", "-3", "contradicts")]
    second = [{"kind": "claim", **dict(zip(("claim", "ours", "verdict"), claim, strict=True))} for claim in said]
    frame = pd.concat([load([str(results)]), result("paper.curve", second, plot="none").assign(seed=1)])
    table = claims(frame)
    assert table is not None
    assert table.rows[0] == ["experiment", "pool", "the paper's claim", "seed 0", "", "seed 1", ""]
    start = ["paper.curve", "tiny"]
    assert table.rows[1:] == [
        [*start, "A is above B", "A 80.0, B 70.0: +10.0 ± 2.0", "agrees", "+1", "agrees"],
        [*start, "B_1 is", "-3.0 ± 1.0", "contradicts", "–", ""],
        [*start, "A is above B", "–", "", "+2", "no difference"],
        [*start, "C", "–", "", "-3", "contradicts"],
    ]
    assert counted(frame) == (
        "5 comparisons: 2 agrees, 1 no difference, 2 contradicts. 1 of more than one seed: 1 with the same verdict, "
        "0 with opposite ones, 0 where one seed shows no difference"
    )
    assert seeds_apart(frame) == []
    other = frame.assign(verdict=frame.verdict.where(frame.seed == 0, "no difference"))
    assert seeds_apart(other) == [
        "paper.curve on tiny: A is above B: agrees with seed 0, no difference with seed 1",
    ]


def test_latex_reads_what_is_special(results):
    report(results, "--experiment", "--out", results / "there")
    table = (results / "there" / "paper.table.tiny.0.tex").read_text().splitlines()
    assert table[0] == r"\begin{tabular}{lrrr}"
    assert table[4] == r"m \& n & 25.0 $\pm$ 1.5 & 75.0 $\pm$ 1.5 & 50.0 $\pm$ 1.5 \\"
    curve = (results / "there" / "paper.curve.tiny.0.tex").read_text()
    assert curve.count(r"\begin{tabular}") == curve.count(r"\end{tabular}") == 2
    assert r"residual\_norm & 2.0 \\" in curve
    assert r"B\_1 is & -3.0 $\pm$ 1.0 & contradicts \\" in (results / "there" / "claims.tex").read_text()


def test_one_file_is_enough(results):
    outcome = report("--experiment", results / "curve.parquet")
    assert outcome.exit_code == 0, outcome.output
    assert not (results / "report" / "paper.table.tiny.0.csv").exists()
    assert load([str(results / "curve.parquet")]).experiment.unique().tolist() == ["paper.curve"]


def test_what_is_no_result_is_refused(results, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.parquet").write_text("no")
    pd.DataFrame({"candidate": ["x"], "value": [1.0]}).to_parquet(tmp_path / "ledger.parquet")
    bad = pd.read_parquet(results / "curve.parquet")
    bad.assign(x="a").to_parquet(tmp_path / "words.parquet")
    bad[:0].to_parquet(tmp_path / "none.parquet")
    for name, message in (
        ("empty", "holds no results"),
        ("text.parquet", "is no Parquet file"),
        ("ledger.parquet", "lacks the columns kind, experiment"),
        ("words.parquet", "is no number"),
        ("none.parquet", "without rows"),
        ("missing.parquet", "missing.parquet"),
    ):
        outcome = report("--experiment", tmp_path / name)
        assert (outcome.exit_code, message in outcome.output) == (2, True), outcome.output
        assert not (tmp_path / "report").exists()
    outcome = report(results, "--out", tmp_path / "x")
    assert outcome.exit_code == 2
    assert "--experiment" in outcome.output

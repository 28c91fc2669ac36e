import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from flows.report.figures import Palette, history
from flows.report.page import Facts, render
from flows.report.table import subset
from search.ledger.distinct import apart
from search.subsets.choose_subsets import select

SECTIONS = (
    "results",
    "beside",
    "candidates",
    "history",
    "scaling",
    "importance",
    "share",
    "similarity",
    "profile",
    "seconds",
    "timeline",
    "failures",
    "reproduce",
    "versions",
)
FIGURES = ("beside", "history", "scaling", "importance", "share", "similarity", "profile", "seconds", "timeline")
REMOTE = ("src", "href", "action", "data", "poster", "srcset", "formaction")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """The page's elements, its text by section, and the rows of its first table."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tags, self.sections, self.figures, self.results = [], {}, {}, []
        self._open, self._section, self._cell = [], None, None
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag == "section":
            self._section = attributes["id"]
            self.sections[self._section] = ""
        if tag == "tr" and self._section == "results":
            self.results.append([])
        if tag in ("td", "th") and self._section == "results":
            self.results[-1].append("")
            self._cell = True
        if attributes.get("id") == "figures":
            self._section = "figures"
            self.sections["figures"] = ""

    def handle_endtag(self, tag):
        if tag in ("section", "script"):
            self._section = None
        if tag in ("td", "th"):
            self._cell = None

    def handle_data(self, data):
        if self._section is not None:
            self.sections[self._section] += data
        if self._cell and self._section == "results":
            self.results[-1][-1] += data

    @property
    def drawn(self):
        return json.loads(self.sections["figures"])


def of_a_ledger(make, which):
    return {
        "full": lambda: make.full(48),
        "empty": list,
        "failed": lambda: [make.failed("MethodError: no"), make.failed("MethodError: no", at=51)],
        "one method": lambda: make.candidates(5, methods=("ties",)),
        "references": make.references,
        "untested": lambda: [*make.references(), *make.candidates(30)],
    }[which]()


@pytest.mark.parametrize("which", ["full", "empty", "failed", "one method", "references", "untested"])
def test_every_section_is_there_whatever_the_ledger_holds(make, which):
    html = render(of_a_ledger(make, which), tasks=make.tasks)
    page = Page(html)
    assert set(SECTIONS) <= set(page.sections)
    titles = [tag for tag, _ in page.tags if tag in ("h1", "h2")]
    assert titles[0] == "h1"
    assert titles.count("h2") == len(SECTIONS)
    places = {attributes["data-figure"] for _, attributes in page.tags if "data-figure" in attributes}
    assert places == set(page.drawn)
    links = {attributes["href"][1:] for tag, attributes in page.tags if tag == "a"}
    assert links <= set(page.sections)


def test_a_full_ledger_draws_every_figure(make):
    page = Page(render(make.full(48), tasks=make.tasks, selection=make.selection()))
    assert set(page.drawn) == set(FIGURES)
    captions = [tag for tag, _ in page.tags if tag == "figcaption"]
    assert len(captions) == len(FIGURES)


@pytest.mark.parametrize("which", ["full", "empty"])
def test_nothing_is_remote(make, which):
    html = render(of_a_ledger(make, which), tasks=make.tasks, selection=make.selection())
    page = Page(html)
    outside = [
        (tag, name, value)
        for tag, attributes in page.tags
        for name, value in attributes.items()
        if name in REMOTE and not (value or "").startswith(("#", "data:"))
    ]
    assert outside == []
    assert not {"link", "iframe", "object", "embed", "img"} & {tag for tag, _ in page.tags}
    styles = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    assert all("url(" not in style and "@import" not in style for style in styles)
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert html.count("plotly.js v") == 1


def test_the_table_shows_the_numbers_of_the_ledger(make):
    rows = make.full(48)
    page = Page(render(rows, tasks=make.tasks))
    head, *lines = page.results
    assert head == ["model", "mean", "worst task", "validation mean", "winner − this", *make.tasks]
    best = max((row for row in rows if row.objective is not None), key=lambda row: row.objective)
    test = next(row for row in rows if row.split == "test" and row.candidate == best.candidate)
    label, *cells = lines[0]
    assert label.startswith("winner: ")
    assert cells[0].startswith(f"{100 * sum(test.scores.values()) / 4:.1f} ± 0.6")
    worst = min(test.scores, key=test.scores.__getitem__)
    assert cells[1].startswith(f"{100 * test.scores[worst]:.1f} ± 1.2{worst}")
    assert cells[2].startswith(f"{100 * sum(best.scores.values()) / 4:.1f} ± 0.6")
    assert cells[3].strip() == "–"
    for task, cell in zip(make.tasks, cells[4:], strict=True):
        assert cell.startswith(f"{100 * test.scores[task]:.1f} ± 1.2")
    base = next(row for row in rows if row.method == "base" and row.split == "test")
    assert [line[0] for line in lines[-5:]] == [*(f"member {task}" for task in make.tasks), "base"]
    assert lines[-1][5].startswith(f"{100 * base.scores['movie']:.1f}")
    for column in (1, 2, 5, 6, 7, 8):
        values = [float(line[column].split()[0]) for line in lines]
        marked = [value for value, line in zip(values, lines, strict=True) if "(best)" in line[column]]
        assert marked
        assert set(marked) == {max(values)}


def test_what_each_stage_gained_comes_before_everything_else(make):
    reported = {"caption": "On validation.", "columns": ["stage", "best of it", "validation", "gain", "cost"]}
    reported |= {"rows": [["search", "ties", "70.1", "+0.4 ± 0.3: within the error", "40 candidates, 3 min"]]}
    page = Page(render(make.full(24), tasks=make.tasks, facts=Facts(stages=reported)))
    assert list(page.sections)[:2] == ["stages", "results"]
    assert "+0.4 ± 0.3: within the error" in page.sections["stages"]
    assert "#stages" in [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert "stages" not in Page(render(make.full(24), tasks=make.tasks)).sections


def test_a_subset_that_is_the_whole_pool_is_said_so(make_of):
    make = make_of(7)
    page = Page(render(make.full(48), tasks=make.tasks))
    text = page.sections["results"]
    assert "all 7" in text
    assert ", ".join(make.tasks) not in text + page.sections["candidates"]
    assert subset(["a"], ["a"]) == "a"
    assert subset(["b", "a"], ["a", "b"]) == "all 2"
    assert subset(["a", "b"], ["a", "b", "c"]) == "a, b"


def test_runners_up_are_no_twins_of_the_winner(make):
    """Steps of a sampler about one merge, each within its error, are one merge to the reader."""
    everyone, few = dict.fromkeys(make.tasks, 1.0), dict.fromkeys(make.tasks[:2], 1.0)
    scores = {"winner": 0.7, "twin": 0.695, "other members": 0.69, "apart": 0.67, "twin of that": 0.665}
    rows = [
        make.row(
            "ties",
            {name: factor + 0.01 * at for name, factor in (few if label == "other members" else everyone).items()},
            0.5,
            at=at,
            trial=at,
            scores=dict.fromkeys(make.tasks, score),
            objective=score,
        )
        for at, (label, score) in enumerate(scores.items())
    ]
    assert apart(rows) == [rows[0], rows[2], rows[3]]
    tested = [replace(row, split="test", origin="final", objective=None) for row in rows]
    labels = [line[0] for line in Page(render([*rows, *tested], tasks=make.tasks)).results[1:]]
    assert [label.partition(":")[0] for label in labels] == ["winner", "runner-up 2", "runner-up 3"]
    blank = [replace(row, standard_errors={}) for row in rows]
    assert apart(blank) == blank


def test_the_winner_is_shown_beside_what_nothing_chose(make):
    rows = make.full(48)
    kept = {row.candidate: {task: np.tile([1.0, 0.0], 50) for task in make.tasks} for row in rows}
    page = Page(render(rows, tasks=make.tasks, predictions=lambda candidate: kept[candidate]))
    text = page.sections["beside"]
    winner = max((row for row in rows if row.objective is not None), key=lambda row: row.objective)
    tested = next(row for row in rows if row.split == "test" and row.candidate == winner.candidate)
    change = 100 * (np.mean(list(tested.scores.values())) - winner.objective)
    assert f"{change:+.1f}".replace("-", "−") in text
    assert "plain average" in text
    assert "unpaired" not in text.lower()
    assert "on the same examples" in render(rows, tasks=make.tasks, predictions=lambda candidate: kept[candidate])
    points = {trace["name"]: trace for trace in page.drawn["beside"]["data"]}
    assert len(points["members"]["x"]) == 4
    (drawn,) = (trace for name, trace in points.items() if name.startswith("winner"))
    assert drawn["x"] == pytest.approx([100 * winner.objective])
    assert "Unpaired" in Page(render(rows, tasks=make.tasks)).sections["beside"]


def test_estimates_are_told_from_what_was_confirmed(make):
    estimated = [replace(row, split="anchors") for row in make.candidates(30)]
    confirmed = [
        replace(row, split="validation", objective=row.objective - 0.02)
        for row in sorted(estimated, key=lambda row: -row.objective)[:3]
    ]
    page = Page(render([*estimated, *confirmed], tasks=make.tasks))
    traces = {trace["name"]: trace for trace in page.drawn["history"]["data"]}
    assert sorted(traces["confirmed on all examples"]["y"]) == pytest.approx(
        sorted(100 * row.objective for row in confirmed)
    )
    assert traces["best estimate so far"]["y"][-1] == pytest.approx(100 * max(row.objective for row in estimated))
    assert "estimated validation objective" in page.drawn["history"]["layout"]["yaxis"]["title"]["text"]
    assert len(page.drawn["share"]["data"]) == 2
    assert "(30)" in page.drawn["share"]["data"][0]["name"]
    best = page.sections["candidates"]
    assert best.count(f"{100 * confirmed[0].objective:.2f}") == 1
    assert f"{100 * (confirmed[0].objective + 0.02):.1f} ± 0.6" in best
    running = Page(render(estimated, tasks=make.tasks))
    assert running.sections["candidates"].count("not yet") == 10
    assert "winner" not in running.sections["results"]


def test_errors_and_names_cannot_break_out_of_the_page(make):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    rows = [
        make.failed(f"ValueError: {evil}"),
        make.row("ties", {evil: 0.5, "nyt": 1.0}, 0.5, worker=evil, parameters={evil: evil}),
        make.row("ties", {evil: 0.7, "nyt": 1.0}, 0.6, at=1, parameters={evil: "<b>"}),
    ]
    chosen = select([evil, "nyt"], "all", notes=[evil])
    html = render(rows, tasks=[evil, *make.tasks], selection=chosen, facts=Facts(name=evil, notes=[evil]))
    page = Page(html)
    assert not any(tag == "img" for tag, _ in page.tags)
    assert sum(tag == "script" for tag, _ in page.tags) == 3
    assert f"ValueError: {evil}" in page.sections["failures"]
    names = [trace["name"] for trace in page.drawn["history"]["data"]]
    assert "ties" in names
    under_pointer = page.drawn["history"]["data"][1]["text"][0]
    assert "<script>" not in under_pointer
    assert "&lt;script&gt;" in under_pointer


def test_equal_errors_are_counted_together(make):
    rows = [make.failed("MethodError: α cancel", at=at) for at in range(3)]
    text = Page(render([*rows, make.failed("OSError: gone", at=9)], tasks=make.tasks)).sections["failures"]
    assert text.count("α cancel") == 1
    assert re.search(r"3\s*ties\s*MethodError", text)
    assert text.index("α cancel") < text.index("OSError")


def test_facts_are_told(make):
    facts = Facts(
        name="sentiment",
        objective="worst",
        base="checkpoints/base",
        members={name: f"checkpoints/{name}" for name in make.tasks},
        tasks={"movie": "accuracy on 500 examples"},
        phases={"statistics": 75.0, "search": 4000.0},
        commands=["mergequest run mine.yaml"],
        versions={"torch": "2.13.0"},
        notes=["one note"],
        written="2026-01-05",
    )
    html = render(make.full(24), tasks=make.tasks, facts=facts)
    page = Page(html)
    assert "1 min 15 s" in page.sections["phases"]
    assert "1 h 06 min" in page.sections["phases"]
    assert "mergequest run mine.yaml" in page.sections["reproduce"]
    assert "checkpoint: checkpoints/amazon" in page.sections["reproduce"]
    assert "2.13.0" in page.sections["versions"]
    assert "one note" in page.sections["versions"]
    assert "(worst)" in page.sections["candidates"]
    assert "accuracy on 500 examples" in page.sections["results"]


def test_a_method_has_one_colour_in_every_figure(make):
    drawn = Page(render(make.full(48), tasks=make.tasks)).drawn
    for method in ("ties", "regmean", "task arithmetic"):
        colors = {
            trace["marker"]["color"]
            for name in ("history", "scaling", "seconds", "timeline")
            for trace in drawn[name]["data"]
            if trace.get("name") == method
        }
        assert len(colors) == 1


def test_history_holds_every_candidate_and_its_record_never_falls(make):
    rows = make.candidates(30)
    record, *methods = Page(render(rows, tasks=make.tasks)).drawn["history"]["data"]
    assert record["y"] == sorted(record["y"])
    assert record["y"][-1] == pytest.approx(100 * max(row.objective for row in rows))
    assert sum(len(trace["y"]) for trace in methods if trace["name"] != "baseline (a method's default)") == 30


def test_thousands_of_candidates_stay_drawable(make):
    rows = make.candidates(2600)
    record, *methods = history(rows, Palette(rows)).data
    heights = [y for trace in methods if "anchor" not in trace.name for y in trace.y]
    assert len(record.y) == 2600
    assert len(heights) <= 2000
    assert max(heights) == pytest.approx(100 * max(row.objective for row in rows))


def test_importance_of_a_ledger_names_parameters_as_the_search_does(make):
    drawn = Page(render(make.candidates(120), tasks=make.tasks)).drawn["importance"]["data"][0]
    known = re.compile(r"method|members|\w+\.scaling\.\w+|\w+\.(density|rho|delta|floor)")
    assert drawn["y"]
    assert all(known.fullmatch(name) for name in drawn["y"])


def test_shared_factors_have_one_column_of_panels(make):
    rows = [make.row("ties", dict.fromkeys(make.tasks, 0.1 * at), 0.5, at=at) for at in range(1, 9)]
    layout = Page(render(rows, tasks=make.tasks)).drawn["scaling"]["layout"]
    titles = [note["text"] for note in layout["annotations"]]
    assert "all members" in titles
    assert "movie" not in titles


def test_groups_of_weights_have_panels_of_their_own(make):
    scaling = {f"amazon@layers:{layer}": 0.1 for layer in ("0-2", "3-")} | {"nyt": 0.3}
    members = ("amazon", "nyt")
    rows = [make.row("ties", scaling | {"nyt": 0.1 * at}, 0.5, at=at, members=members) for at in range(1, 6)]
    rows.append(make.row("ties", {"amazon": 0.7, "nyt": 0.3}, 0.5, at=6))
    page = Page(render(rows, tasks=make.tasks))
    layout = page.drawn["scaling"]["layout"]
    titles = [note["text"] for note in layout["annotations"]]
    assert {"amazon<br>layers:0-2", "amazon<br>layers:3-", "nyt"} <= set(titles)
    assert "amazon" not in titles
    assert [0.1] * 5 + [0.7] in [sorted(trace["x"]) for trace in page.drawn["scaling"]["data"]]
    assert "amazon@layers:0-2 0.10" in page.sections["candidates"]


def test_similarity_shows_every_pair_and_quality(make):
    selection = make.selection()
    heat, bars = Page(render([], tasks=make.tasks, selection=selection)).drawn["similarity"]["data"]
    assert heat["z"][0][1] == pytest.approx(selection.similarity[0, 1])
    assert heat["z"][0][0] is None
    assert bars["x"] == [selection.quality[name] for name in selection.names]


def browse(page, place, *options):
    """Opens a page in a real browser; returns what Chromium wrote."""
    (place / "report.html").write_text(page)
    quiet = ("quic", "background-networking", "component-update", "sync", "gpu", "extensions")
    return subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--no-first-run",
            *(f"--disable-{what}" for what in quiet),
            f"--user-data-dir={place / 'profile'}",
            "--virtual-time-budget=10000",
            "--enable-logging=stderr",
            *options,
            f"file://{place / 'report.html'}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


MEASURE = """<script>
const scroll = document.querySelector(".results"), box = scroll.getBoundingClientRect(), keys = [];
scroll.scrollLeft = scroll.scrollWidth;
for (const cell of scroll.querySelectorAll("thead th")) {
  const own = cell.getBoundingClientRect();
  keys.push({text: cell.textContent, left: own.left - box.left, right: own.right - box.left});
}
const overflow = [...scroll.querySelectorAll("td.key, th.key")].filter((cell) => cell.scrollWidth > cell.clientWidth + 1);
const said = scroll.querySelector("caption > span").getBoundingClientRect();
document.title = JSON.stringify({width: box.width, caption: [said.left - box.left, said.right - box.left],
  page: document.documentElement.scrollWidth, keys: keys,
  overflow: overflow.map((cell) => cell.textContent), scrolled: scroll.scrollLeft});
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("count", [3, pytest.param(7, marks=pytest.mark.slow), 30])
def test_what_matters_of_the_results_stays_in_sight(make_of, tmp_path, count):
    """Scrolled to the last task, the columns that are read first are where they were, and nothing lies over another."""
    make = make_of(count)
    html = render(make.full(24), tasks=make.tasks, selection=make.selection())
    shot = tmp_path / "report.png"
    done = browse(
        html.replace("</body>", MEASURE), tmp_path, "--window-size=1200,1600", "--dump-dom", f"--screenshot={shot}"
    )
    seen = json.loads(unescape(re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)[1]))
    keys = {cell["text"]: cell for cell in seen["keys"]}
    first = ["model", "mean", "worst task", "validation mean", "winner − this"]
    assert [cell["text"] for cell in seen["keys"]][:5] == first
    assert seen["page"] <= 1200, "the page itself does not scroll sideways"
    assert seen["overflow"] == []
    assert 0 <= seen["caption"][0] < seen["caption"][1] <= seen["width"], "the caption is whole"
    edges = [edge for name in first for edge in (keys[name]["left"], keys[name]["right"])]
    assert edges == pytest.approx(sorted(edges))
    assert 0 <= edges[0] <= 2
    assert edges[-1] < seen["width"] * 0.65, "tasks have their share of the width"
    last = keys[make.tasks[-1]]
    assert last["right"] <= seen["width"] + 2
    assert last["left"] >= edges[-1] - 1
    assert (seen["scrolled"] > 0) == (count > 5)
    assert shot.exists()
    picture = np.asarray(Image.open(shot).convert("L"))
    assert picture.shape == (1600, 1200)
    assert picture[:, 300:900].std(axis=1).max() > 10, "there is something to see"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("which", ["full", "one method", "empty"])
def test_a_browser_draws_it_without_network_or_complaint(make, tmp_path, which):
    html = render(of_a_ledger(make, which), tasks=make.tasks, selection=make.selection())
    done = browse(html, tmp_path, "--dump-dom")
    # The page's own policy forbids every request: an attempt would be a complaint on the console.
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    body = re.sub(r"<script.*?</script>", "", done.stdout, flags=re.DOTALL)
    drawn = re.findall(r'data-figure="(\w+)"[^>]*>\s*<div class="plot-container', body)
    assert set(drawn) == set(Page(html).drawn)
    assert body.count("main-svg") >= len(drawn)
    assert body.count("modebar-btn") >= len(drawn)
    assert "Share chart" not in body

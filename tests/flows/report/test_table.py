from dataclasses import replace
from io import StringIO
from math import sqrt

import pytest
from rich.console import Console

from flows.report import table
from flows.report.scales import Scales
from flows.report.table import as_markdown, as_rich, plain_average, results_table


@pytest.fixture
def rows(make):
    return make.full(48)


def test_lines_are_references_average_methods_and_the_winner(make, rows):
    lines = results_table(rows, make.tasks)
    kinds = [line.kind for line in lines]
    assert kinds[:6] == ["base", "member", "member", "member", "member", "average"]
    assert kinds[-1] == "winner"
    assert kinds.count("winner") == 1
    best = max((row for row in rows if row.objective is not None), key=lambda row: row.objective)
    assert lines[-1].row.candidate == best.candidate
    assert {line.row.method for line in lines[5:]} == {row.method for row in rows if row.origin == "anchor"}
    assert len({line.row.candidate for line in lines}) == len(lines)


def test_runners_up_measured_on_test_are_shown(make, rows):
    ranked = sorted((row for row in rows if row.objective is not None), key=lambda row: -row.objective)
    lines = {line.row.candidate: line for line in results_table(rows, make.tasks)}
    assert all(lines[row.candidate].mean is not None for row in ranked[:3])
    assert ranked[-1].candidate not in lines or lines[ranked[-1].candidate].kind in ("average", "method")


def test_numbers_are_those_of_the_test_rows(make, rows):
    tested = {row.candidate: row for row in rows if row.split == "test"}
    for line in results_table(rows, make.tasks):
        row = tested[line.row.candidate]
        assert {task: cell.value for task, cell in line.scores.items()} == row.scores
        assert line.mean.value == pytest.approx(sum(row.scores.values()) / 4)
        assert line.mean.standard_error == pytest.approx(sqrt(4 * 0.012**2) / 4)
        assert line.worst.value == min(row.scores.values())
        assert row.scores[line.worst_task] == line.worst.value
        assert line.worst.standard_error == 0.012


def test_validation_stands_beside_test(make, rows):
    validated = {row.candidate: row for row in rows if row.split == "validation"}
    for line in results_table(rows, make.tasks):
        scores = validated[line.row.candidate].scores
        assert line.validation.value == pytest.approx(sum(scores.values()) / 4)


def test_the_best_of_each_column_is_marked(make, rows):
    lines = results_table(rows, make.tasks)
    for column in (*make.tasks, table.MEAN, table.WORST):
        top = max(line.cell(column).value for line in lines)
        assert [line.cell(column).value == top for line in lines] == [column in line.best for line in lines]


def test_a_baseline_that_was_measured_on_both_splits_has_one_line(make, rows):
    members = dict.fromkeys(make.tasks, 1.0)
    rows = [
        *rows,
        *(
            make.row(name, members, score, origin="reference", split=split, losses={"amazon": score})
            for name in ("ensemble", "all_data")
            for split, score in (("test", 0.6), ("validation", 0.5))  # in either order
        ),
    ]
    lines = [line for line in results_table(rows, make.tasks) if line.kind == "baseline"]
    assert [line.label for line in lines] == ["ensemble of all members", "trained on all data"]
    assert all(line.row.split == "validation" and line.mean is not None and line.validation for line in lines)


def test_a_running_campaign_has_no_test_scores_yet(make):
    lines = results_table([*make.references(), *make.candidates(12)], make.tasks)
    assert lines[-1].kind == "winner"
    assert all(cell is None for line in lines for cell in line.scores.values())
    assert lines[-1].mean is None
    assert lines[-1].validation is not None
    assert "–" in as_markdown(lines)
    assert "Nothing has been measured on test yet" in as_markdown(lines)


def test_an_empty_or_failed_ledger_has_no_lines(make):
    assert results_table([], make.tasks) == []
    assert results_table([make.failed("boom")], make.tasks) == []
    assert "model" in as_markdown([])


def test_a_winner_that_is_worse_than_what_it_was_made_from_is_said_loudly(make):
    rows = make.full(24)
    assert table.warning(results_table(rows, make.tasks)) is None
    assert table.warning([]) is None

    def lifted(row, by):
        scores = {task: score + by for task, score in row.scores.items()}
        return replace(row, scores=scores) if row.split == "validation" else row

    better = [lifted(row, 0.4) if row.method == "member" and row.members == ("nyt",) else row for row in rows]
    words = table.warning(results_table(better, make.tasks))
    assert "WORSE than member nyt: its mean over tasks on validation is" in words
    best = [lifted(row, 0.5) if row.origin == "reference" else row for row in rows]
    assert "WORSE than the base and every member" in table.warning(results_table(best, make.tasks))


def test_a_merge_that_was_found_twice_has_one_line(make):
    everyone, same = dict.fromkeys(make.tasks, 1.0), {"losses": dict.fromkeys(make.tasks, 0.71234567)}
    scores = dict.fromkeys(make.tasks, 0.6)
    average = make.row("average", everyone, 0.6, origin="anchor", trial=0, scores=scores, objective=0.6, **same)
    halves = make.row(
        "average", dict.fromkeys(make.tasks, 0.5), 0.6, at=1, trial=1, scores=scores, objective=0.6, **same
    )
    other = make.row("ties", everyone, 0.7, at=2, trial=2, **same)
    third = make.row("ties", dict.fromkeys(make.tasks, 0.9), 0.5, at=3, trial=3, losses=dict.fromkeys(make.tasks, 0.8))
    rows = [average, halves, other, third]
    tested = [replace(row, split="test", origin="final") for row in rows]
    labels = [line.label for line in results_table([*rows, *tested], make.tasks)]
    assert labels == ["plain average", "runner-up 3: ties", "winner: ties"]


def test_a_narrow_terminal_is_told_less(make, rows):
    lines = results_table(rows, make.tasks)
    for width, shown, hidden in (
        (140, "± 1.2", "are in"),
        (100, "movie", "± 1.2"),
        (80, "tasks are in the report", "movie "),
    ):
        console = Console(width=width, file=StringIO())
        console.print(as_rich(lines, width))
        text = console.file.getvalue()
        assert shown in " ".join(text.split())
        assert hidden not in text.replace("member movie", "")
        assert "winner: regmean" in text
        assert max(map(len, text.splitlines())) <= width
        assert text.count("± 0.6") >= 2 * len(lines) - 2


def test_the_average_may_win(make):
    average = make.row("average", dict.fromkeys(make.tasks, 0.25), 0.7, origin="anchor")
    other = make.row("ties", dict.fromkeys(make.tasks, 1.0), 0.4, at=1)
    lines = results_table([other, average], make.tasks)
    assert [line.label for line in lines] == ["best ties", "winner: plain average"]
    assert plain_average([other, average]) == average


def test_the_plain_average_has_all_members_and_equal_weights(make):
    everyone = make.row("average", dict.fromkeys(make.tasks, 0.25), 0.5, origin="anchor")
    pair = make.row("average", {"nyt": 0.5, "movie": 0.5}, 0.7, origin="anchor", at=1)
    weighted = make.row("average", {"nyt": 0.4, "movie": 0.6, "amazon": 0.2, "tweets": 0.1}, 0.7, at=2)
    assert plain_average([pair, weighted, everyone]) == everyone
    assert plain_average([weighted]) is None


def test_scores_beyond_one_are_shown_as_they_are(make):
    row = make.row("ties", {"nyt": 1.0}, 0.5, scores={"nyt": 23.456}, standard_errors={"nyt": float("nan")})
    final = make.row(
        "ties", {"nyt": 1.0}, 0.5, split="test", origin="final", scores={"nyt": 23.456}, standard_errors={}
    )
    text = as_markdown(results_table([row, final], ["nyt"], Scales({"nyt": 1})))
    assert "**23.456**" in text
    assert "× 100" not in text


def test_every_column_has_the_scale_of_its_metric(make):
    """A share near 1 beside a loss of the same size: what they are says their metrics, not their values."""
    scores, errors = {"nyt": 0.5, "movie": -0.25}, {"nyt": 0.01, "movie": 0.02}
    rows = [
        make.row("ties", {"nyt": 1.0}, 0.125, split=split, origin=origin, scores=scores, standard_errors=errors)
        for split, origin in (("validation", "search"), ("test", "final"))
    ]
    text = as_markdown(results_table(rows, ["nyt", "movie"], Scales({"nyt": 100, "movie": 1})))
    assert "50.0 ± 1.0" in text
    assert "-0.250 ± 0.020" in text
    assert "0.125 ± 0.011" in text  # the mean of unlike things
    assert "(× 100 of nyt)" in text
    scales = Scales({"nyt": 100, "movie": 1})
    assert [scales.of_objective(name, ["nyt", "movie"]) for name in ("mean", "nyt", "movie")] == [1, 100, 1]
    assert [scales.of_objective(name, ["nyt", "movie"]) for name in ("normalized", "expected_mean")] == [100, 100]
    assert Scales({"nyt": 1}).of_objective("mean", ["nyt"]) == 1


def test_a_score_that_is_missing_leaves_the_mean_open(make):
    final = make.row(
        "ties", {"nyt": 1.0}, 0.5, split="test", origin="final", scores={"nyt": 0.5, "movie": float("nan")}
    )
    line = results_table([make.row("ties", {"nyt": 1.0}, 0.5), final], ["nyt", "movie"])[0]
    assert line.scores["nyt"].value == 0.5
    assert line.scores["movie"] is None
    assert line.mean is None
    assert line.worst is None


def test_markdown_is_a_table_with_the_best_in_bold(make, rows):
    lines = results_table(rows, make.tasks)
    text = as_markdown(lines).splitlines()
    assert text[0] == "| model | mean | worst task | validation mean | movie | amazon | nyt | tweets |"
    assert text[1].count("--:") == 7
    assert text[1 + len(lines)].startswith("| winner: ")
    mean = next(line for line in lines if table.MEAN in line.best).mean
    assert (
        f"**{mean.value * 100:.1f} ± {mean.standard_error * 100:.1f}**"
        in text[2 + lines.index(next(line for line in lines if table.MEAN in line.best))]
    )
    assert "× 100" in text[-1]


def test_markdown_escapes_bars(make):
    text = as_markdown(results_table([make.row("ties", {"nyt": 1.0}, 0.5, scores={"a|b": 0.5})], ["a|b"]))
    assert "a\\|b" in text


def test_the_terminal_shows_every_line_and_takes_no_markup_from_names(make):
    rows = [make.row("member", {"[red]x": 1.0}, 0.5, origin="reference"), *make.candidates(6)]
    console = Console(width=200, file=StringIO())
    console.print(as_rich(results_table(rows, make.tasks)))
    text = console.file.getvalue()
    assert "member [red]x" in text
    assert "winner:" in text
    assert "worst task" in text


def test_unseen_tasks_have_a_mean_of_their_own(make, rows):
    unseen, seen = make.tasks[0], make.tasks[1:]
    lines = results_table(rows, make.tasks, Scales(unseen=frozenset([unseen])))
    assert table.columns(lines) == ["mean", "unseen mean", "worst task", "validation mean", *make.tasks]
    for line in lines:
        if line.mean is not None:
            assert line.mean.value == pytest.approx(sum(line.scores[task].value for task in seen) / len(seen))
            assert line.unseen == line.scores[unseen]
            assert line.worst_task in seen
    assert "unseen mean" in as_markdown(lines)
    assert "unseen mean" not in table.columns(results_table(rows, make.tasks))

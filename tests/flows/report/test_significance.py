from io import StringIO
from math import hypot, sqrt

import numpy as np
import pytest
from rich.console import Console

from flows.report.significance import COLUMNS, as_markdown, as_rich, compare, headline_rows
from flows.report.table import results_table


@pytest.fixture
def rows(make):
    return make.full(48)


@pytest.fixture
def lines(make, rows):
    return results_table(rows, make.tasks)


def answers(seed):
    """Right and wrong answers that agree on most examples, whoever gives them."""
    shared, own = np.random.default_rng(0), np.random.default_rng(seed)
    return np.where(own.random(400) < 0.1, own.random(400) < 0.5, shared.random(400) < 0.7).astype(np.float32)


def test_what_both_get_right_adds_nothing_to_the_error(make, lines):
    kept = {line.row.candidate: {task: answers(i) for task in make.tasks} for i, line in enumerate(lines)}
    winner, *others = compare(lines, kept.__getitem__)
    assert winner.line.kind == "winner"
    assert winner.behind is None
    for entry in others:
        gaps = kept[winner.line.row.candidate]["nyt"].astype(float) - kept[entry.line.row.candidate]["nyt"]
        assert entry.behind.value == pytest.approx(winner.test.value - entry.test.value)
        assert entry.behind.standard_error == pytest.approx(gaps.std(ddof=1) / sqrt(400) / sqrt(len(make.tasks)))
        assert entry.behind.is_paired


def test_without_single_answers_the_samples_count_as_independent(make, lines):
    whole = {task: answers(1) for task in make.tasks}
    for outcomes in (lambda _: {}, lambda candidate: whole if candidate == lines[-1].row.candidate else {}):
        for entry in compare(lines, outcomes)[1:]:
            assert entry.behind.standard_error == pytest.approx(sqrt(2 * 4 * 0.012**2) / 4)
            assert not entry.behind.is_paired
    some = {"nyt": answers(1)}
    assert not any(entry.behind.is_paired for entry in compare(lines, lambda _: some)[1:])


def test_the_change_is_from_validation_to_test(lines):
    compared = compare(lines, lambda _: {})
    assert {entry.line.label for entry in compared} == {line.label for line in lines if line.kind != "base"}
    for entry in compared:
        assert entry.change.value == pytest.approx(entry.test.value - entry.validation.value)
        errors = entry.test.standard_error, entry.validation.standard_error
        assert entry.change.standard_error == pytest.approx(hypot(*errors))
    validation = [entry.validation.value for entry in compared[1:]]
    assert validation == sorted(validation, reverse=True)


def test_the_headline_rows_are_chosen_by_validation(lines):
    compared = headline_rows(compare(lines, lambda _: {}))
    kinds = [entry.line.kind for entry in compared]
    assert kinds[0] == "winner"
    assert (kinds.count("method"), kinds.count("member"), kinds.count("average")) == (1, 1, 1)
    assert kinds.count("runner-up") == sum(line.kind == "runner-up" for line in lines)
    members = [line for line in lines if line.kind == "member"]
    (member,) = (entry.line for entry in compared if entry.line.kind == "member")
    assert member.validation.value == max(line.validation.value for line in members)


def test_before_the_test_there_is_nothing_to_compare(make):
    assert compare(results_table([*make.references(), *make.candidates(12)], make.tasks), lambda _: {}) == []
    assert compare([], lambda _: {}) == []


def test_terminal_and_markdown_show_the_same(make, lines):
    kept = {line.row.candidate: {task: answers(i) for task in make.tasks} for i, line in enumerate(lines)}
    compared = compare(lines, kept.__getitem__)
    console = Console(width=100, file=StringIO())
    console.print(as_rich(compared))
    shown, markdown = console.file.getvalue(), as_markdown(compared)
    assert max(map(len, shown.splitlines())) <= 100
    average = next(entry for entry in compared if entry.line.kind == "average")
    behind = f"{100 * average.behind.value:+.1f} ± {100 * average.behind.standard_error:.1f}"
    assert behind.replace("-", "−") in shown
    assert f"| plain average | {100 * average.validation.value:.1f} ± 0.6 |" in markdown
    assert markdown.splitlines()[0] == "| model | " + " | ".join(COLUMNS) + " |"
    assert "Unpaired" not in markdown
    assert "(unpaired)" in as_markdown(compare(lines, lambda _: {}))

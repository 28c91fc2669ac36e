from dataclasses import replace

import numpy as np
import pytest

from merging.errors import SelectionError
from search.ledger.row import Row
from search.subsets.candidate_portfolio import nearest, portfolio, similarity


def row(name, members, *scores, origin="search", split="validation"):
    return Row(
        "demo", name, split, origin, "complete", "average", tuple(members),
        trial=None, objective=float(np.mean(scores)), scores=dict(zip("xyz", scores, strict=True)),
    )  # fmt: skip


ROWS = [
    row("best", "ab", 0.90, 0.80, 0.70),
    row("twin", "ab", 0.90, 0.80, 0.697),
    row("cousin", "ab", 0.88, 0.80, 0.70),
    row("other", "cd", 0.70, 0.79, 0.88),
    row("poor", "ef", 0.30, 0.20, 0.10),
    row("tested", "gh", 0.99, 0.99, 0.99, split="test"),
    row("alone", "g", 0.99, 0.99, 0.99, origin="reference"),
]


def test_the_winner_comes_first_and_then_what_is_good_and_different():
    chosen = [entry.candidate for entry in portfolio(ROWS, 3)]
    assert chosen == ["best", "other", "cousin"]
    assert chosen[:2] == [entry.candidate for entry in portfolio(ROWS, 2)]


def test_tolerance_is_what_diversity_is_worth():
    assert [entry.candidate for entry in portfolio(ROWS, 2, tolerance=100.0)] == ["best", "poor"]
    assert [entry.candidate for entry in portfolio(ROWS, 2, tolerance=1e-3)] == ["best", "twin"]


def test_likeness():
    S = similarity(ROWS[:5])
    np.testing.assert_allclose(S.diagonal(), 1.0)
    np.testing.assert_array_equal(S, S.T)
    assert np.linalg.eigvalsh(S)[0] > -1e-12
    assert S[0, 1] > S[0, 2] > S[0, 3] > S[0, 4]
    assert nearest([ROWS[0], ROWS[3], ROWS[1]]) == pytest.approx([0.0, similarity(ROWS[:4])[0, 3], 1.0], abs=0.25)


def test_the_same_merge_is_chosen_once():
    twins = [
        replace(row(name, "ab", 0.9, 0.8, 0.7), losses={"x": 0.5 + e, "y": 0.6, "z": 0.7})
        for name, e in (("a", 0), ("b", 1e-9))
    ]
    other = replace(row("other", "cd", 0.7, 0.8, 0.88), losses={"x": 0.7, "y": 0.6, "z": 0.5})
    assert [entry.candidate for entry in portfolio([*twins, other], 3)] == ["a", "other"]


def test_there_are_no_more_than_differ():
    same = [row(f"c{i}", "ab", 0.5, 0.5, 0.5) for i in range(4)]
    assert len(portfolio(same, 3)) == 1
    assert len(portfolio(ROWS, 50)) == 5


@pytest.mark.parametrize(
    ("rows", "k", "tolerance", "words"),
    [
        (ROWS, 0, 0.1, "at least 1"),
        (ROWS, 2, 0.0, "above 0"),
        (ROWS[5:], 2, 0.1, "no candidate has been measured"),
        ([*ROWS, Row("demo", "odd", "validation", "search", "complete", "ties", ("a",), objective=0.1)], 2, 0.1, "odd"),
    ],
)
def test_what_cannot_be_is_refused(rows, k, tolerance, words):
    with pytest.raises(SelectionError, match=words):
        portfolio(rows, k, tolerance)

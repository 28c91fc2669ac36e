"""A few candidates that are good and differ: by a DPP over what they score on each task and whom they merge."""

from collections.abc import Sequence

import numpy as np

from merging.errors import SelectionError
from search.ledger.distinct import distinct
from search.ledger.row import Row
from search.objective import best, violation
from search.subsets import dpp
from search.subsets.dpp_kernel import Matrix

MOST = 500
"""Candidates that a portfolio is chosen from, the best first: enough for a kernel that is made in a second."""


def portfolio(rows: Sequence[Row], k: int, tolerance: float = 0.02) -> list[Row]:
    """The winner, and k − 1 others that are nearly as good and least like those before them.

    Greedy MAP of a DPP on L = diag(q) S diag(q) (Chen et al. 2018), so that a portfolio of k begins with the one of
    k − 1. q = exp(−(best − objective) / tolerance): a candidate that is `tolerance` below the best counts for e⁻¹ of
    it. S is the mean of two kernels with unit diagonal: of the scores by task, Gaussian, with each task's scores in
    standard deviations over the candidates and the candidates' median distance as the width; and of the members
    that take part, those that two candidates share as a part of all that they have (Jaccard).

    Args:
        rows: A ledger's; complete baselines and proposals on validation are looked at.
        k: How many.
        tolerance: How much of the objective diversity is worth.

    Returns:
        At most k rows in the order of choice, no merge twice; fewer where no more differ.

    Raises:
        SelectionError: k is below 1, the tolerance not above 0, or nothing was measured yet.
    """
    if k < 1 or not tolerance > 0:
        raise SelectionError(f"a portfolio has at least 1 candidate and a tolerance above 0, not {k} and {tolerance}")
    ranked = distinct(best(rows, len(rows)))[:MOST]
    ranked = [
        row for row in ranked if violation(row) <= violation(ranked[0])
    ]  # the best keep every constraint, if any do
    if not ranked:
        raise SelectionError("no candidate has been measured yet: a portfolio is chosen from those that were")
    S = similarity(ranked)
    heights = np.array([row.objective for row in ranked], dtype=np.float64)
    order = dpp.greedy_order(S, min(k, dpp.rank(S)), (heights - heights[0]) / tolerance)
    return [ranked[i] for i in order]


def similarity(rows: Sequence[Row]) -> Matrix:
    """S [rows, rows] of candidates, by their scores on each task and by their members; unit diagonal.

    Raises:
        SelectionError: Rows have scores of different tasks.
    """
    tasks = sorted(rows[0].scores)
    if odd := next((row for row in rows if sorted(row.scores) != tasks), None):
        raise SelectionError(f"candidate {odd.candidate} has scores of {sorted(odd.scores)}, others of {tasks}")
    return (_alike_in_scores(rows, tasks) + _alike_in_members(rows)) / 2


def nearest(rows: Sequence[Row]) -> list[float]:
    """Of each row of a portfolio, how like it is to the one before it that is most so; 0 for the first."""
    S = similarity(rows)
    return [float(S[i, :i].max()) if i else 0.0 for i in range(len(rows))]


def _alike_in_scores(rows: Sequence[Row], tasks: Sequence[str]) -> Matrix:
    """Gaussian kernel of the score profiles; 1 everywhere where all have the same."""
    scores = np.array([[row.scores[task] for task in tasks] for row in rows])
    spread = scores.std(axis=0)
    scores = scores / np.where(spread > 0, spread, 1.0)
    squares = ((scores[:, None] - scores[None]) ** 2).sum(axis=2)
    width = float(np.median(squares[squares > 0])) if (squares > 0).any() else 1.0
    return np.asarray(np.exp(-squares / width))


def _alike_in_members(rows: Sequence[Row]) -> Matrix:
    """Members that two candidates share, as a part of those that either has: the Jaccard kernel."""
    names = sorted({name for row in rows for name in row.members})
    part = np.array([[name in row.members for name in names] for row in rows], dtype=np.float64)
    shared = part @ part.T
    sizes = part.sum(axis=1)
    return np.asarray(shared / (sizes[:, None] + sizes[None] - shared))

"""Subsets of members chosen by what their merges score on validation, one member after another."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

from merging.errors import SelectionError

Subset: TypeAlias = tuple[str, ...]
Scores: TypeAlias = Callable[[Sequence[Subset]], Sequence[float | None]]
"""Measures the merges of subsets, several at once; None for one that failed."""


def greedy_forward(members: Sequence[str], scores: Scores, most: int | None = None) -> list[Subset]:
    """The best member, then, time and again, the member whose joining scores most.

    At most N (N + 1) / 2 measurements: as the RegMean paper chooses members for a domain that none was trained on
    (Jin et al. 2023, section 5.2), but by trying every member at every step, not by rank alone.

    Args:
        members: The pool's.
        scores: Measures subsets.
        most: Go on to this many members, whatever that does; by default until no member that joins does good.

    Returns:
        The subset after each step, each sorted by name.

    Raises:
        SelectionError: No member could be measured.
    """
    path: list[Subset] = []
    height = float("-inf")
    while len(path) < min(most or len(members), len(members)):
        so_far = path[-1] if path else ()
        steps = [tuple(sorted((*so_far, name))) for name in members if name not in so_far]
        measured = dict(_measured(steps, scores))
        if not measured:
            if path:
                break
            raise SelectionError("no member could be merged and measured alone: see the `error` column of the ledger")
        best = max(measured, key=measured.__getitem__)
        if most is None and measured[best] <= height:
            break
        path.append(best)
        height = measured[best]
    return path


def ranked_prefixes(members: Sequence[str], scores: Scores) -> list[Subset]:
    """The best member, the best two, …, all, in the order of what each scores alone (Jin et al. 2023, figure 6).

    N measurements, one of each member; those that fail are left out.

    Args:
        members: The pool's.
        scores: Measures subsets.

    Returns:
        The subset of each size, each sorted by name.

    Raises:
        SelectionError: No member could be measured.
    """
    order = list(_ranked(members, scores))
    return [tuple(sorted(order[:size])) for size in range(1, len(order) + 1)]


def greedy_soup(members: Sequence[str], scores: Scores) -> Subset:
    """From the best member down, every member whose joining does no harm (Wortsman et al. 2022, recipe 1).

    2 N − 1 measurements: members are ranked by what they score alone.

    Args:
        members: The pool's.
        scores: Measures subsets.

    Raises:
        SelectionError: No member could be measured.
    """
    ranked = _ranked(members, scores)
    best, *others = ranked
    soup: Subset = (best,)
    height = ranked[best]
    for joining in others:
        for tried, score in _measured([tuple(sorted((*soup, joining)))], scores):
            if score >= height:
                soup, height = tried, score
    return soup


def _ranked(members: Sequence[str], scores: Scores) -> dict[str, float]:
    """Members and what each scores alone, the best first; of equal ones the first of the pool."""
    alone = {subset[0]: score for subset, score in _measured([(name,) for name in members], scores)}
    if not alone:
        raise SelectionError("no member could be merged and measured alone: see the `error` column of the ledger")
    return dict(sorted(alone.items(), key=lambda item: -item[1]))


def _measured(subsets: Sequence[Subset], scores: Scores) -> list[tuple[Subset, float]]:
    """Subsets that could be measured, and what they scored."""
    return [(subset, score) for subset, score in zip(subsets, scores(subsets), strict=True) if score is not None]

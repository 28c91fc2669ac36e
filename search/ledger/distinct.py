"""One line for a merge that was found twice: other factors or parameters, and yet the same weights."""

import math
from collections.abc import Iterable, Mapping

from search.ledger.row import Row

DIGITS = 6
"""Significant digits of the losses that two roundings of the same weights have in common."""


def distinct(rows: Iterable[Row]) -> list[Row]:
    """Rows without those whose merge is that of an earlier one.

    Equal recipes have one row as it is; but a normalised average with factors ½ and ½ is the one with 1 and 1, and a
    parameter may change nothing. Such merges have the same method, members and scores, and losses that agree in
    `DIGITS` digits; different weights do not. Rows with a loss that is not known are taken to differ.

    Args:
        rows: Of one split, the one to keep before those to drop.
    """
    kept: dict[object, Row] = {}
    for row in rows:
        kept.setdefault(weights_of(row), row)
    return list(kept.values())


def apart(rows: Iterable[Row]) -> list[Row]:
    """Rows without those that the data cannot tell from an earlier one, as `distinct`, and nearly the same besides.

    Such twins have the same method and members, and on every task a score within the larger of the two standard errors: a
    sampler's next step, not another merge to look at. Scores without a standard error are apart unless they are equal.

    Args:
        rows: Of one split, the one to keep before those to drop.
    """
    kept: list[Row] = []
    alike: dict[object, list[Row]] = {}
    for row in distinct(rows):
        earlier = alike.setdefault((row.method, row.members), [])
        if not any(_within_error(row, other) for other in earlier):
            earlier.append(row)
            kept.append(row)
    return kept


def _within_error(one: Row, other: Row) -> bool:
    if not one.scores or one.scores.keys() != other.scores.keys():
        return False
    errors = {task: [row.standard_errors.get(task, 0.0) for row in (one, other)] for task in one.scores}
    return all(
        abs(one.scores[task] - other.scores[task]) <= max((error for error in own if math.isfinite(error)), default=0.0)
        for task, own in errors.items()
    )


def weights_of(row: Row) -> object:
    """A key that is equal for rows whose merged weights are the same, see `distinct`."""
    losses = rounded(row.losses)
    if not losses or any(loss is None for loss in losses.values()):
        return row.candidate
    return row.method, row.members, tuple(sorted(row.scores.items())), tuple(sorted(losses.items()))


def rounded(losses: Mapping[str, float]) -> dict[str, str | None]:
    """Losses to `DIGITS` significant digits; None where one is not known."""
    return {task: f"{loss:.{DIGITS - 1}e}" if math.isfinite(loss) else None for task, loss in losses.items()}

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


def weights_of(row: Row) -> object:
    """A key that is equal for rows whose merged weights are the same, see `distinct`."""
    losses = rounded(row.losses)
    if not losses or any(loss is None for loss in losses.values()):
        return row.candidate
    return row.method, row.members, tuple(sorted(row.scores.items())), tuple(sorted(losses.items()))


def rounded(losses: Mapping[str, float]) -> dict[str, str | None]:
    """Losses to `DIGITS` significant digits; None where one is not known."""
    return {task: f"{loss:.{DIGITS - 1}e}" if math.isfinite(loss) else None for task, loss in losses.items()}

"""`mergequest portfolio`: a few good and different candidates of a campaign, from its directory alone."""

import json
from collections.abc import Mapping, Sequence

from flows.directory.campaign_directory import Directory
from search.ledger.ledger import Ledger
from search.ledger.row import Row
from search.subsets.candidate_portfolio import nearest, portfolio


def read_portfolio(path: str, k: int, tolerance: float) -> list[Row]:
    """The portfolio of the campaign in a directory, in the order of choice.

    Raises:
        SettingsError: There is no campaign there.
        SelectionError: Nothing was measured yet.
    """
    directory = Directory(path)
    return portfolio(Ledger(directory.ledger, directory.campaign().name).rows(), k, tolerance)


def as_json(rows: Sequence[Row], places: Mapping[str, str] | None = None) -> str:
    """A JSON array with an object per candidate, with its directory where it was exported."""
    fields = [
        {
            "candidate": row.candidate,
            "objective": row.objective,
            "scores": dict(row.scores),
            "similarity": alike,
            "recipe": row.recipe.as_dict(),
            **({"path": places[row.candidate]} if places else {}),
        }
        for row, alike in zip(rows, nearest(rows), strict=True)
    ]
    return json.dumps(fields, indent=1)


def as_text(rows: Sequence[Row]) -> str:
    """A table, the winner first."""
    tasks = sorted(rows[0].scores)
    width = max(len("method"), *(len(row.method) for row in rows))
    head = [
        "candidate       ",
        f"{'method':{width}}",
        "objective",
        *(f"{task:>8}" for task in tasks),
        "likeness",
        "members",
    ]
    lines = ["  ".join(head)]
    for row, alike in zip(rows, nearest(rows), strict=True):
        scores = [f"{row.scores[task]:{max(8, len(task))}.4f}" for task in tasks]
        cells = [f"{row.candidate:16}", f"{row.method:{width}}", f"{row.objective:9.4f}", *scores, f"{alike:8.2f}"]
        lines.append("  ".join([*cells, "+".join(row.members)]))
    return "\n".join(lines)

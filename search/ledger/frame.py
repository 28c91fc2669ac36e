"""What came of a search, as a tidy pandas frame: one row per candidate and split, one column per fact."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import pandas as pd

from merging.errors import LedgerError
from merging.io import addresses, storage
from search.candidate import ANCHORS
from search.ledger.ledger import Ledger
from search.ledger.row import Row

MEMBERS_JOINT = "+"
_PLAIN = (
    "campaign",
    "candidate",
    "split",
    "origin",
    "trial",
    "status",
    "error",
    "method",
    "objective",
    "merge_seconds",
    "evaluate_seconds",
    "cpu_hours",
    "gpu_hours",
    "started",
    "finished",
    "worker",
    "code",
    "data",
)
_SPREAD = {
    "parameter": "parameters",
    "scaling": "scaling",
    "score": "scores",
    "standard_error": "standard_errors",
    "loss": "losses",
    "expected_error": "expected_errors",
    "examples": "examples",
    "objective": "objectives",
    "violation": "violations",
    "proxy": "proxies",
    "report": "report",
}
"""Prefix of the columns (`score.<task>`) that each mapping of a row is spread over."""


def load(path: str) -> pd.DataFrame:
    """A ledger as a tidy frame, in the order of `frame`.

    Args:
        path: The ledger's directory, or the campaign's that holds it; local or at any fsspec address.

    Raises:
        LedgerError: There is nothing at a path, or a file is unreadable or of another schema version.
    """
    within = addresses.join(path, "ledger")
    if not storage.exists(path):
        raise LedgerError(f"{path} is not there: give a campaign's directory, or the ledger in it")
    return frame(Ledger(within if storage.is_dir(within) else path).rows())


def frame(rows: Sequence[Row]) -> pd.DataFrame:
    """Rows as a tidy frame: by split, then in the order in which candidates finished.

    Columns: those of the ledger that hold one value; `members`, joined by `+`; `size`, how many there are;
    `mean` and `worst` of the scores; and `parameter.<name>`, `scaling.<member>`, `score.<task>`,
    `standard_error.<task>`, `loss.<task>`, `expected_error.<task>`, `examples.<task>`, `objective.<name>`,
    `violation.<constraint>`, `proxy.<name>`, `report.<name>`. What a row lacks is NaN.
    """
    records = [_record(row) for row in sorted(rows, key=lambda row: (row.split, row.finished))]
    table = pd.DataFrame.from_records(records)
    for name in (*_PLAIN, "members", "size", "mean", "worst"):
        if name not in table:
            table[name] = None
    first = [*_PLAIN[:8], "members", "size", "objective", "mean", "worst", *_PLAIN[9:]]
    others = sorted((str(name) for name in table if name not in first), key=_place)
    table = table[[*first, *others]]
    return table.astype({"trial": "Int64", "objective": "float64", "mean": "float64", "worst": "float64"})


def candidates(table: pd.DataFrame, split: str = "validation") -> pd.DataFrame:
    """Complete baselines and proposals on a split, best first: those that break no constraint, then by objective.

    Of equal ones the earliest is first. The column `violation` says by how much constraints are broken in all.
    """
    chosen = table[
        (table["split"] == split) & (table["status"] == "complete") & table["origin"].isin(["anchor", "search"])
    ]
    violation = chosen[list(columns(chosen, "violation").values())].clip(lower=0).sum(axis=1)
    chosen = chosen.assign(violation=violation)
    order = chosen.assign(trial=chosen["trial"].fillna(-1))
    index = order.sort_values(["violation", "objective", "trial"], ascending=[True, False, True], kind="stable").index
    return chosen.loc[index]


def searched_split(table: pd.DataFrame) -> str:
    """The split that the search measured its candidates on: `anchors`, estimates from few examples, or validation."""
    return ANCHORS if (table["split"] == ANCHORS).any() else "validation"


def best_by_method(table: pd.DataFrame, split: str = "validation") -> pd.DataFrame:
    """The best complete candidate of each method, the best method first."""
    return candidates(table, split).drop_duplicates("method").reset_index(drop=True)


def history(table: pd.DataFrame) -> pd.DataFrame:
    """Candidates as the search measured them, in the order in which they finished, with what was reached and spent.

    Where the search measured few examples (`split` is `anchors`), objectives are estimates: the best of them is likely
    to be an overestimate, and only what was measured again on `validation` is confirmed.

    Columns besides the frame's: `best`, the best objective; `spent`, examples evaluated; `seconds`, since the first of
    them began.
    """
    chosen = table[(table["split"] == searched_split(table)) & table["origin"].isin(["anchor", "search"])]
    chosen = chosen.sort_values("finished", kind="stable").reset_index(drop=True)
    examples = chosen[list(columns(chosen, "examples").values())].sum(axis=1)
    since = pd.to_datetime(chosen["finished"]) - pd.to_datetime(chosen["started"]).min()
    return chosen.assign(
        best=chosen["objective"].cummax().ffill(), spent=examples.cumsum(), seconds=since.dt.total_seconds()
    )


def columns(table: pd.DataFrame, prefix: str) -> dict[str, str]:
    """The columns of a prefix (`score`, `scaling`, `parameter`, …): what follows it → the column's name."""
    return {name.removeprefix(f"{prefix}."): name for name in map(str, table.columns) if name.startswith(f"{prefix}.")}


def _record(row: Row) -> dict[str, Any]:
    record: dict[str, Any] = {name: getattr(row, name) for name in _PLAIN}
    record["members"] = MEMBERS_JOINT.join(row.members)
    record["size"] = len(row.members)
    if row.scores:
        record["mean"] = sum(row.scores.values()) / len(row.scores)
        record["worst"] = min(row.scores.values())
    for prefix, name in _SPREAD.items():
        record |= {f"{prefix}.{key}": value for key, value in cast(Mapping[str, Any], getattr(row, name)).items()}
    return record


def _place(column: str) -> tuple[int, str]:
    return list(_SPREAD).index(column.partition(".")[0]), column

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pandas as pd
import pytest

from merging.errors import LedgerError
from search.ledger.frame import (
    best_by_method,
    candidates,
    columns,
    frame,
    history,
    load,
    searched_split,
)
from search.ledger.ledger import Ledger
from search.ledger.row import Row

START = datetime(2031, 1, 1, tzinfo=UTC)


def row(number, method, objective, members="ab", split="validation", origin="search", **more):
    return Row(
        "demo",
        f"c{number}",
        split,
        origin,
        "failed" if objective is None else "complete",
        method,
        tuple(members),
        dict.fromkeys(members, number / 10),
        {"rho": 0.5, "mode": "plain"} if method == "regmean" else {},
        trial=number,
        objective=objective,
        scores={} if objective is None else {"x": objective + 0.1, "y": objective - 0.1},
        losses={} if objective is None else {"x": 1.0, "y": 2.0},
        finished=START + timedelta(seconds=number),
        **more,
    )


ROWS = [
    row(3, "ties", 0.5, "abc"),
    row(0, "average", 0.4, origin="anchor"),
    row(1, "regmean", 0.7),
    row(2, "ties", None),
    row(4, "regmean", 0.7, "a"),
    row(5, "base", 0.9, "", origin="reference"),
    row(1, "regmean", 0.6, split="test", origin="final"),
]


def test_the_frame_is_tidy(tmp_path):
    ledger = Ledger(str(tmp_path))
    for entry in ROWS:
        ledger.append(entry)
    result = load(str(tmp_path))
    assert list(result["candidate"]) == ["c1", "c0", "c1", "c2", "c3", "c4", "c5"]
    first = result[(result["candidate"] == "c1") & (result["split"] == "validation")].iloc[0]
    assert (first["parameter.rho"], first["parameter.mode"], first["scaling.b"]) == (0.5, "plain", 0.1)
    assert (first["score.x"], first["mean"], first["worst"]) == pytest.approx((0.8, 0.7, 0.6))
    assert (first["members"], first["size"], first["loss.y"], first["trial"]) == ("a+b", 2, 2.0, 1)
    failed = result[result["status"] == "failed"].iloc[0]
    assert failed[["objective", "mean", "score.x", "loss.x", "parameter.rho"]].isna().all()
    assert columns(result, "score") == {"x": "score.x", "y": "score.y"}
    assert columns(result, "scaling") == {"a": "scaling.a", "b": "scaling.b", "c": "scaling.c"}
    assert str(result["finished"].dtype).endswith("UTC]")


def test_an_empty_ledger_has_the_same_first_columns(tmp_path):
    empty = load(str(tmp_path))
    assert empty.empty
    assert list(empty.columns) == [name for name in frame(ROWS).columns if "." not in name]
    assert best_by_method(empty).empty
    assert history(empty).empty


def test_a_campaigns_directory_will_do(tmp_path):
    Ledger(str(tmp_path / "ledger")).extend(ROWS)
    pd.testing.assert_frame_equal(load(str(tmp_path)), load(str(tmp_path / "ledger")))
    with pytest.raises(LedgerError, match="nothing is not there"):
        load(str(tmp_path / "nothing"))


def test_the_search_is_where_it_measured():
    few = [
        replace(entry, split="anchors") for entry in ROWS if entry.split == "validation" and entry.origin != "reference"
    ]
    result = frame([*ROWS[:3], ROWS[5], ROWS[6], *few])
    assert searched_split(result) == "anchors"
    assert searched_split(frame(ROWS)) == "validation"
    assert list(history(result)["candidate"]) == ["c0", "c1", "c2", "c3", "c4"]
    assert set(history(result)["split"]) == {"anchors"}
    assert list(candidates(result)["candidate"]) == ["c1", "c3", "c0"]


def test_the_best_of_each_method():
    result = best_by_method(frame(ROWS))
    assert list(zip(result["method"], result["candidate"], strict=True)) == [
        ("regmean", "c1"),
        ("ties", "c3"),
        ("average", "c0"),
    ]
    assert list(candidates(frame(ROWS))["candidate"]) == ["c1", "c4", "c3", "c0"]


def test_the_history_never_falls():
    result = history(frame(ROWS))
    assert list(result["candidate"]) == ["c0", "c1", "c2", "c3", "c4"]
    assert list(result["best"]) == [0.4, 0.7, 0.7, 0.7, 0.7]

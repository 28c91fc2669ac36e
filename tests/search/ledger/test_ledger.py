import math
import threading
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from merging.errors import LedgerError
from merging.recipe import Recipe
from search.ledger.ledger import Ledger, to_table
from search.ledger.row import SCHEMA, Row

PARAMETERS = {"density": 0.2, "steps": 3, "trim": "global", "normalize": True}
FULL = Row(
    campaign="demo",
    candidate=Recipe("ties", {"a": 0.1, "b": 1 / 3}, PARAMETERS).identity,
    split="validation",
    origin="search",
    status="failed",
    method="ties",
    members=("a", "b"),
    scaling={"a": 0.1, "b": 1 / 3},
    parameters=PARAMETERS,
    trial=12,
    error="MethodError: ρ ≤ 0\nsecond line",
    objective=0.1 + 0.2,
    scores={"x": 0.5, "y/z": 0.25},
    standard_errors={"x": 0.01},
    losses={"x": 1.5},
    expected_errors={"x": 0.4},
    examples={"x": 100, "y/z": 7},
    merge_seconds=0.25,
    evaluate_seconds=2.5,
    started=datetime(2031, 5, 6, 7, 8, 9, 123456, tzinfo=UTC),
    finished=datetime(2031, 5, 6, 7, 8, 11, 654321, tzinfo=UTC),
    worker="host/1/cpu",
    code="0.1.0+abc",
    data="0123456789abcdef",
)
BARE = Row("demo", "c0", "test", "reference", "complete", "base", started=FULL.started, finished=FULL.started)


def test_every_field_survives(tmp_path):
    path = str(tmp_path / "ledger")
    ledger = Ledger(path, "demo")
    assert ledger.append(FULL)
    assert ledger.append(BARE)
    result = {row.candidate: row for row in Ledger(path, "demo").rows()}
    for row in (FULL, BARE):
        for field in fields(Row):
            assert getattr(result[row.candidate], field.name) == getattr(row, field.name), field.name
    assert result[FULL.candidate].recipe.identity == FULL.candidate
    assert {field.name for field in fields(Row)} == set(SCHEMA.names)


def test_scores_that_are_not_there_stay_nan(tmp_path):
    ledger = Ledger(str(tmp_path))
    ledger.append(replace(BARE, losses={"x": math.nan}))
    assert math.isnan(Ledger(str(tmp_path)).rows()[0].losses["x"])


def test_pandas_reads_the_directory_at_any_moment(tmp_path, monkeypatch):
    monkeypatch.setattr("search.ledger.ledger.ROWS_PER_FILE", 7)
    path = tmp_path / "ledger"
    ledger = Ledger(str(path), "demo")
    ledger.append(BARE)
    stop, lengths = threading.Event(), [1]

    def read():
        while not stop.is_set():
            frame = pd.read_parquet(path)
            assert not frame.duplicated(["candidate", "split"]).any()
            lengths.append(len(frame))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(0, 60, 2):
        ledger.extend(replace(FULL, candidate=f"c{place}", trial=place) for place in (number, number + 1))
    stop.set()
    reader.join()
    assert lengths == sorted(lengths)
    assert len(lengths) > 5
    assert len(pd.read_parquet(path)) == 61
    assert len(list(path.iterdir())) == 8
    assert Ledger(str(path)).rows() == ledger.rows()
    assert list(pd.read_parquet(path).columns) == SCHEMA.names


def test_a_repeated_append_changes_nothing(tmp_path):
    ledger = Ledger(str(tmp_path))
    assert ledger.append(FULL)
    assert not ledger.append(replace(FULL, trial=99, objective=0.9))
    assert ledger.append(replace(FULL, split="test", origin="final", trial=None))
    assert Ledger(str(tmp_path)).get(FULL.candidate, "validation") == FULL
    assert ledger.has(FULL.candidate, "test")
    assert not ledger.has("c0", "test")
    assert len(ledger.rows()) == len(pd.read_parquet(tmp_path)) == 2


def test_rows_that_arrive_together_are_written_together(tmp_path):
    ledger = Ledger(str(tmp_path), "demo")
    second = replace(FULL, candidate="c1")
    assert ledger.extend([FULL, second, replace(FULL, error="again")]) == [FULL, second]
    assert ledger.extend([second]) == []
    with pytest.raises(LedgerError, match="'other'"):
        ledger.extend([BARE, replace(BARE, campaign="other")])
    assert Ledger(str(tmp_path)).rows() == ledger.rows() == [FULL, second]


def test_no_writer_touches_what_another_wrote(tmp_path):
    Ledger(str(tmp_path)).append(FULL)
    (first,) = tmp_path.iterdir()
    before = first.read_bytes()
    one, other = Ledger(str(tmp_path)), Ledger(str(tmp_path))
    one.append(BARE)
    other.append(replace(BARE, candidate="c1"))
    assert first.read_bytes() == before
    assert len(pd.read_parquet(tmp_path)) == len(Ledger(str(tmp_path)).rows()) == 3


def test_the_table_holds_each_candidate_once_even_if_two_files_do(tmp_path):
    Ledger(str(tmp_path)).append(FULL)
    (copy,) = tmp_path.iterdir()
    (tmp_path / "validation-000099-copy.parquet").write_bytes(copy.read_bytes())
    table = Ledger(str(tmp_path)).table()
    assert table.num_rows == 1
    assert table.schema.equals(SCHEMA, check_metadata=True)


def test_leftovers_of_a_killed_writer_are_ignored(tmp_path):
    Ledger(str(tmp_path)).append(FULL)
    (whole,) = tmp_path.iterdir()
    (tmp_path / f".{whole.name}.1234.tmp").write_bytes(whole.read_bytes()[:100])
    (tmp_path / "_half.parquet").write_bytes(b"PAR1")
    assert len(Ledger(str(tmp_path)).rows()) == 1
    assert len(pd.read_parquet(tmp_path)) == 1


def test_object_stores_hold_a_ledger():
    path = "memory://ledger-test/ledger"
    assert Ledger(path).rows() == []
    Ledger(path, "demo").append(FULL)
    assert Ledger(path, "demo").rows() == [FULL]


def test_another_campaigns_ledger_is_refused(tmp_path):
    Ledger(str(tmp_path), "demo").append(FULL)
    with pytest.raises(LedgerError, match="campaign 'demo', not of 'other'"):
        Ledger(str(tmp_path), "other")
    with pytest.raises(LedgerError, match="'other'"):
        Ledger(str(tmp_path)).append(replace(FULL, campaign="other", candidate="c1"))


@pytest.mark.parametrize(
    ("metadata", "message"), [({"mergequest.ledger": "99"}, "version 99"), (None, "not a ledger's file")]
)
def test_another_schema_version_is_refused(tmp_path, metadata, message):
    pq.write_table(pa.table({"campaign": ["demo"]}).replace_schema_metadata(metadata), tmp_path / "a.parquet")
    with pytest.raises(LedgerError, match=message):
        Ledger(str(tmp_path))


def test_a_ledger_without_costs_is_read_and_gone_on_with(tmp_path):
    """Version 1 lacks the columns `cpu_hours` and `gpu_hours`."""
    table = to_table([replace(FULL, cpu_hours=None, gpu_hours=None)]).drop_columns(["cpu_hours", "gpu_hours"])
    pq.write_table(table.replace_schema_metadata({"mergequest.ledger": "1"}), tmp_path / "a.parquet")
    ledger = Ledger(str(tmp_path))
    assert ledger.rows() == [replace(FULL, cpu_hours=None, gpu_hours=None)]
    ledger.append(later := replace(FULL, candidate="later", cpu_hours=1.5, gpu_hours=0.5))
    assert {row.candidate: row for row in Ledger(str(tmp_path)).rows()}["later"] == later


def test_a_damaged_file_is_named(tmp_path):
    Ledger(str(tmp_path)).append(FULL)
    (tmp_path / "validation-000001-x.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(LedgerError, match=r"validation-000001-x\.parquet is not a readable"):
        Ledger(str(tmp_path))


def test_a_failed_row_may_be_followed_by_another_and_the_latest_counts(tmp_path):
    first = Ledger(str(tmp_path))
    first.extend([FULL, replace(FULL, candidate="other")])
    assert not first.append(replace(FULL, status="complete", error=None))
    again = Ledger(str(tmp_path), retry_failed=True)
    assert again.rows() == []
    assert [row.candidate for row in again.retried] == [FULL.candidate, "other"]
    later = replace(FULL, status="complete", error=None, finished=FULL.finished + timedelta(seconds=1))
    assert again.append(later)
    assert [row.candidate for row in again.retried] == ["other"]
    assert not again.append(replace(later, objective=0.1))
    assert {row.candidate: row.status for row in Ledger(str(tmp_path)).rows()} == {
        "other": "failed",
        FULL.candidate: "complete",
    }
    assert len(pd.read_parquet(tmp_path)) == 3

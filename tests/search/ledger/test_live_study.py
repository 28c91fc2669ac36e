import json
from wsgiref.util import setup_testing_defaults

import pytest

from merging.errors import LedgerError
from search.ledger.ledger import Ledger
from search.ledger.live_study import LedgerStorage
from search.ledger.row import Row


def row(number, **more):
    changes = {"objective": number / 10, "scores": {"x": number / 10}, "status": "complete"} | more
    merged = {"method": "ties", "members": ("a", "b"), "scaling": {"a": number / 10, "b": 1.0}}
    return Row("demo", f"c{number}", "validation", "search", trial=number, **merged, **changes)


def ask(storage, path):
    from optuna_dashboard import wsgi

    environ, answered = {"PATH_INFO": path, "QUERY_STRING": "after=0"}, []
    setup_testing_defaults(environ)
    body = wsgi(storage)(environ, lambda status, headers, *_: answered.append(status))
    assert answered == ["200 OK"]
    return json.loads(b"".join(body))


def test_the_dashboard_shows_a_ledger_and_what_it_gets_meanwhile(tmp_path):
    ledger = Ledger(str(tmp_path), "demo")
    ledger.extend([row(1), row(2), row(3, status="failed", objective=None, scores={}, error="ValueError: no")])
    storage = LedgerStorage(str(tmp_path), "demo", every=0.0)
    (study,) = ask(storage, "/api/studies")["study_summaries"]
    shown = ask(storage, f"/api/studies/{study['study_id']}")
    assert study["study_name"] == "demo"
    assert [trial["state"] for trial in shown["trials"]] == ["Complete", "Complete", "Fail"]
    assert {entry["name"] for entry in shown["trials"][0]["params"]} == {"ties.scaling.a"}
    assert shown["best_trials"][0]["values"] == [0.2]
    ledger.append(row(9))
    shown = ask(storage, f"/api/studies/{study['study_id']}")
    assert [trial["values"] for trial in shown["trials"] if trial["state"] == "Complete"] == [[0.1], [0.2], [0.9]]


def test_a_ledger_that_begins_later_and_one_that_breaks(tmp_path):
    place = tmp_path / "ledger"
    storage = LedgerStorage(str(place), "demo", every=0.0)
    assert [study.study_name for study in storage.get_all_studies()] == ["demo"]
    assert storage.get_all_trials(0) == []
    Ledger(str(place), "demo").append(row(1))
    assert len(storage.get_all_trials(0)) == 1
    (place / "broken.parquet").write_bytes(b"no")
    assert len(storage.get_all_trials(0)) == 1, "what was there stays in sight"
    with pytest.raises(LedgerError):
        LedgerStorage(str(place), "demo")


def test_looks_are_no_more_frequent_than_asked_for(tmp_path):
    ledger = Ledger(str(tmp_path), "demo")
    ledger.append(row(1))
    storage = LedgerStorage(str(tmp_path), "demo", every=3600)
    ledger.append(row(2))
    assert len(storage.get_all_trials(0)) == 1

"""How far a campaign is, from what its driver left in its directory."""

import json
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from flows.cli.status import SILENCE, read_status
from flows.config.campaign_file import load_campaign
from flows.directory.campaign_directory import Directory
from flows.directory.heartbeat import FILE, Pulse, heartbeat
from merging.errors import PoolError, StorageError
from search.budget import Progress
from search.ledger.ledger import Ledger
from search.ledger.row import Row

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def row(number, status="complete", **changes):
    score = {"objective": 0.5 + number / 100, "objectives": {"mean": 0.5 + number / 100}}
    settings = {
        "campaign": "tiny",
        "candidate": f"c{number}",
        "split": "validation",
        "origin": "search",
        "status": status,
        "method": "ties",
        "members": ("one", "two"),
        "scaling": {"one": 0.3, "two": 0.3},
        "finished": NOW - timedelta(minutes=10 - number),
        **(score if status == "complete" else {}),
    }
    return Row(**settings | changes)


@pytest.fixture
def directory(campaign_file, tmp_path):
    """A campaign's directory with seven candidates, one of them failed and one pruned, and a reference."""
    campaign = load_campaign(str(campaign_file(directory="out", search={"candidates": 20})))
    result = Directory(str(tmp_path / "out"))
    result.claim(campaign, {})
    rows = [row(number) for number in range(5)] + [row(5, "failed", error="TaskError: x"), row(6, "pruned")]
    Ledger(result.ledger, "tiny").extend([*rows, row(9, origin="reference")])
    return result


def pulse(**changes):
    progress = Progress(done=7, total=20, examples=0, best=None, per_minute=12.0, seconds_left=65.0)
    return Pulse(**{"phase": "Search", "evaluators": lambda: (4, 3), "progress": progress} | changes)


def test_a_running_campaign(directory):
    with heartbeat(directory.path, pulse(), every=0.05):
        time.sleep(0.2)
        status = read_status(directory.path)
    assert (status.state, status.done, status.running, status.failed, status.pruned) == ("running", 7, 3, 1, 1)
    assert (status.evaluators, status.busy, status.total, status.per_minute) == (4, 3, 20, 12.0)
    assert status.best == pytest.approx(0.54)
    assert datetime.fromisoformat(status.ends) - datetime.fromisoformat(status.heard) == timedelta(seconds=65)
    text = status.as_text()
    assert "tiny: running, 7 of 20 candidates, 3 running, 1 failed, 1 pruned" in text
    assert "Search; 3 of 4 evaluators at work" in text
    assert f":{os.getpid()}: last sign of life" in text
    assert "12.0 candidates a minute (0.2 a second); until about" in text
    assert json.loads(status.as_json())["busy"] == 3


def test_what_takes_long_is_told_beside_what_is_usual(directory):
    entry = {"candidate": "c9", "split": "validation", "method": "ties", "members": ["one", "two"], "seconds": 100.0}
    entry["share"] = 0.625
    Ledger(directory.ledger, "tiny").extend([row(20 + n, merge_seconds=1.0, evaluate_seconds=n) for n in range(3)])
    with heartbeat(directory.path, pulse(under_way=lambda: [entry] * 99), every=0.05):
        time.sleep(0.2)
        status = read_status(directory.path)
    assert (status.under_way[0], len(status.under_way), status.typical_seconds) == (entry, 32, 2.0)
    assert "longest under way: ties of one, two (c9), 100 s, 62% done, of 2.0 s as a rule" in status.as_text()
    assert "ties of one, two\n" in read_status(directory.path).as_text()
    Ledger(directory.ledger, "tiny").append(row(30, members=("one", "three", "two")))
    assert "best 0.8000: ties of all 3\n" in read_status(directory.path).as_text()
    assert read_status(directory.path).under_way == []
    for damaged in ([3], [{}], 7, [{**entry, "seconds": "x"}], [{**entry, "share": []}]):
        text = json.loads(Path(directory.path, FILE).read_text()) | {"under_way": damaged}
        Path(directory.path, FILE).write_text(json.dumps(text))
        assert read_status(directory.path).under_way == []


def test_before_any_sign_of_life(directory):
    status = read_status(directory.path)
    assert (status.state, status.done, status.running, status.driver) == ("unfinished", 7, 0, None)
    assert status.per_minute == pytest.approx(1.0)
    assert status.minutes_left == pytest.approx(13.0)


def test_estimates_are_called_so(campaign_file, tmp_path):
    campaign = load_campaign(str(campaign_file(directory="out", search={"candidates": 20, "anchor_examples": 5})))
    result = Directory(str(tmp_path / "out"))
    result.claim(campaign, {})
    scores = {"scores": {"one": 0.5, "two": 0.54}, "standard_errors": {"one": 0.03, "two": 0.04}}
    ledger = Ledger(result.ledger, "tiny")
    ledger.extend([row(2, split="anchors", **scores), row(1, split="anchors")])
    status = read_status(result.path)
    assert (status.done, status.best, status.is_estimate, status.estimated, status.confirmed) == (2, 0.52, True, 2, 0)
    assert status.best_error == pytest.approx(0.025)
    assert "best 0.5200 ± 0.0250: ties" in status.as_text()
    assert (
        "2 candidates are estimates from anchor examples, 0 of them confirmed on all; the best is an"
        in status.as_text()
    )
    ledger.append(row(2, objective=0.49, objectives={"mean": 0.49}))
    status = read_status(result.path)
    assert (status.done, status.best, status.best_error, status.is_estimate) == (2, 0.49, None, False)
    assert "1 of them confirmed on all; the best is confirmed" in status.as_text()


def test_a_driver_that_is_not_heard_of_is_silent(directory):
    with heartbeat(directory.path, pulse(), every=0.05):
        time.sleep(0.1)
        alive = Path(directory / FILE).read_text()
    Path(directory / FILE).write_text(alive)  # as a driver leaves it that is killed in the block
    heard = datetime.fromisoformat(json.loads(alive)["heard"])
    assert read_status(directory.path, heard + timedelta(seconds=SILENCE - 1)).state == "running"
    status = read_status(directory.path, heard + timedelta(hours=5))
    assert (status.state, status.running, status.ends) == ("silent", 0, None)
    assert "last sign of life 5 h ago, in 'Search': killed or cut off?" in status.as_text()
    assert status.may_change


@pytest.mark.parametrize(
    ("error", "ended"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (StorageError("disk is full"), "StorageError: disk is full"),
        (RuntimeError("password=hunter2"), "RuntimeError"),
    ],
)
def test_how_a_run_ended_is_said(directory, error, ended):
    with pytest.raises(type(error)), heartbeat(directory.path, pulse()):
        raise error
    status = read_status(directory.path)
    assert (status.state, status.ended, status.may_change) == ("unfinished", ended, False)
    assert f"when it ended: {ended}" in status.as_text()


def test_a_store_that_is_away_stops_nothing(directory):
    path = Path(directory.path)
    path.rename(path.with_name("away"))
    path.touch()  # a file in the directory's place: nothing can be written below it
    with heartbeat(directory.path, pulse(), every=0.01):
        time.sleep(0.05)
    assert path.is_file()


def test_a_campaign_whose_pool_is_being_looked_at(tmp_path, campaign_file):
    directory, seen = Directory(str(tmp_path / "new")), []

    def look():
        while not Path(directory / FILE).exists():
            time.sleep(0.01)
        seen.append(read_status(directory.path))
        raise PoolError("'one' has another shape")

    with pytest.raises(PoolError), heartbeat(directory.path, Pulse("Pool"), "tiny", every=0.05):
        look()
    assert (seen[0].name, seen[0].state, seen[0].phase, seen[0].done) == ("tiny", "running", "Pool", 0)
    assert "Pool; 0 of 0 evaluators at work" in seen[0].as_text()
    status = read_status(directory.path)
    assert status.state == "unfinished"
    assert "when it ended: PoolError: 'one' has another shape" in status.as_text()
    directory.check(load_campaign(str(campaign_file())))  # what is left of it hinders no corrected file

"""What trackers are told, by their own packages and read back by them."""

import json
import threading
import time
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from flows.campaign import tracking
from flows.campaign.tracking import require_trackers, tracked
from flows.config.campaign_file import load_campaign
from flows.config.sections import TrackingSettings
from flows.directory.campaign_directory import Directory
from merging.errors import SettingsError
from search.ledger.row import Row

START = datetime(2026, 1, 2, tzinfo=UTC)


def row(number, **changes):
    settings = {
        "campaign": "tiny",
        "candidate": f"c{number}",
        "split": "validation",
        "origin": "search",
        "status": "complete",
        "method": "ties",
        "members": ("one", "two"),
        "scaling": {"one": 0.3, "two@layers:0-2": 0.5},
        "parameters": {"density": 0.2},
        "objective": 0.5 + number / 100,
        "objectives": {"mean": 0.5 + number / 100},
        "scores": {"one": 0.25, "two": float("nan")},
        "cpu_hours": 0.125,
        "started": START + timedelta(minutes=number),
        "finished": START + timedelta(minutes=number + 1),
    }
    return Row(**settings | changes)


FAILED = row(1, status="failed", error="TaskError: no", objective=None, objectives={}, scores={})


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "LOOK", 0.05)
    monkeypatch.setattr(tracking, "AGAIN", 0.1)
    result = Directory(str(tmp_path / "out"))
    Path(result.best).mkdir(parents=True)
    Path(result.report).write_text("<html>the report</html>")
    (Path(result.best) / "recipe.yaml").write_text("method: ties\n")
    return result


def run(directory, settings, steps, ending=None):
    """A campaign whose ledger grows step by step; returns the notes that it led to."""
    rows, notes = [], []
    try:
        with tracked(TrackingSettings(**settings), "tiny", directory, lambda: list(rows), notes.append):
            for step in steps:
                rows += step
                time.sleep(0.2)
            if ending:
                raise ending
    except KeyboardInterrupt:
        pass
    return notes


def test_mlflow_has_a_run_of_every_row_as_it_comes(directory, tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed: pip install 'mergequest[mlflow]'")
    settings = {"mlflow": str(tmp_path / "mlruns")}
    first = [row(0), FAILED]
    assert run(directory, settings, [first], KeyboardInterrupt()) == []
    client = mlflow.MlflowClient(tracking_uri=settings["mlflow"])
    experiment = client.get_experiment_by_name("tiny").experiment_id
    (parent,) = client.search_runs([experiment], "tags.`mergequest.campaign` = 'tiny'")
    assert parent.info.status == "KILLED"
    assert not client.list_artifacts(parent.info.run_id)
    Path(directory / ".mlflow-tracking.json").write_text(json.dumps({"run": parent.info.run_id, "sent": 1}))  # killed
    assert run(directory, settings, [[*first, row(2)], [row(3)]]) == []
    parents = client.search_runs([experiment], "tags.`mergequest.campaign` = 'tiny'")
    assert [result.info.run_id for result in parents] == [parent.info.run_id]
    assert parents[0].info.status == "FINISHED"
    assert {result.path for result in client.list_artifacts(parent.info.run_id)} == {"report.html", "recipe.yaml"}
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    by_candidate = {child.data.params["candidate"]: child for child in children}
    assert sorted(child.data.params["candidate"] for child in children) == ["c0", "c1", "c2", "c3"]
    one = by_candidate["c0"].data
    assert one.metrics == {"objective": 0.5, "objectives/mean": 0.5, "score/one": 0.25, "cpu_hours": 0.125}
    assert json.loads(one.params["scaling"]) == {"one": 0.3, "two@layers:0-2": 0.5}
    assert by_candidate["c1"].info.status == "FAILED"
    assert by_candidate["c1"].data.tags["error"] == "TaskError: no"
    assert [point.value for point in client.get_metric_history(parent.info.run_id, "objective")] == [0.5, 0.52, 0.53]


def test_tensorboard_has_every_row(directory, tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: pip install 'mergequest[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run(directory, {"tensorboard": str(tmp_path / "tb")}, [[row(0)], [FAILED, row(2)]]) == []
    events = EventAccumulator(str(tmp_path / "tb" / "tiny"))
    events.Reload()
    points = [(point.step, point.value) for point in events.Scalars("validation/objective")]
    assert points == [(0, pytest.approx(0.5)), (2, pytest.approx(0.52))]
    assert "method: ties" in events.Tensors("winner/text_summary")[0].tensor_proto.string_val[0].decode()


def test_another_directory_of_tensorboard_s_is_told_every_row(directory, tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: pip install 'mergequest[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for place in ("one", "two"):
        assert run(directory, {"tensorboard": str(tmp_path / place)}, [[row(0), row(1)]]) == []
        events = EventAccumulator(str(tmp_path / place / "tiny"))
        events.Reload()
        assert [point.step for point in events.Scalars("validation/objective")] == [0, 1]


@pytest.mark.slow
def test_wandb_offline_keeps_every_row(directory, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'mergequest[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert run(directory, {"wandb": "team/merges"}, [[row(0)], [FAILED, row(2)]]) == []
    (file,) = Path(directory.path).glob("wandb/offline-run-*/*.wandb")
    words = (b'"c0"', b'"c1"', b'"c2"', b"merges", b"objective")
    deadline = time.monotonic() + 30  # its own process writes the file, some moments after the run has ended
    while (missing := [word for word in words if word not in file.read_bytes()]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert missing == []


def test_without_a_key_wandb_is_warned_of_once_and_the_campaign_goes_on(directory, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install 'mergequest[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(type(wandb.api), "api_key", None)
    notes = run(directory, {"wandb": "merges"}, [[row(0)], [row(1)]])
    assert ["no key: set WANDB_API_KEY" in notes[0], "2 rows are not there" in notes[1], len(notes)] == [True, True, 2]


class Refusing(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503)
        self.end_headers()

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("server", ["nobody", "503"])
def test_a_tracker_that_is_down_costs_a_note(directory, server):
    pytest.importorskip("mlflow", reason="MLflow is not installed: pip install 'mergequest[mlflow]'")
    uri = "http://127.0.0.1:9"
    if server == "503":
        refusing = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
        threading.Thread(target=refusing.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{refusing.server_port}"
    notes = run(directory, {"mlflow": uri}, [[row(0)], [row(1)]])
    assert "tracking.mlflow fails, and the campaign goes on without" in notes[0]
    assert "2 rows are not there; the ledger has them all" in notes[1]
    assert len(notes) == 2


def test_a_tracker_that_comes_back_has_all(directory, tmp_path, monkeypatch):
    class Flaky:
        reported, calls = [], 0

        def __init__(self, directory):
            pass

        def begin(self, run, name):
            return run or "run"

        def row(self, number, row):
            Flaky.calls += 1
            if Flaky.calls in (2, 3):
                raise ConnectionError("away https://u:secret@host")
            Flaky.reported.append((number, row.candidate))

        def artifact(self, name, data):
            Flaky.reported.append((name, data[:6]))

        def end(self, ended):
            Flaky.reported.append(ended)

    monkeypatch.setattr(tracking, "TensorBoard", Flaky)
    notes = run(directory, {"tensorboard": "tb"}, [[row(0), row(1)], [row(2)], []])
    assert Flaky.reported == [
        (0, "c0"),
        (1, "c1"),
        (2, "c2"),
        ("report.html", b"<html>"),
        ("recipe.yaml", b"method"),
        True,
    ]
    assert len(notes) == 1
    assert "secret" not in notes[0]


class Tracker:
    """Keeps what it is told; `hold(number)` may keep it busy."""

    def __init__(self, directory):
        pass

    def begin(self, run, name):
        return run or "run"

    def row(self, number, row):
        self.hold(number)
        self.reported.append(row.candidate)

    def artifact(self, name, data):
        self.reported.append(name)

    def end(self, ended):
        self.reported.append(ended)


def test_an_interrupted_campaign_does_not_wait_for_a_tracker_that_does_not_answer(directory, monkeypatch):
    stuck = threading.Event()

    class Stuck(Tracker):
        reported: ClassVar[list] = []

        def hold(self, number):
            stuck.wait()

    monkeypatch.setattr(tracking, "TensorBoard", Stuck)
    monkeypatch.setattr(tracking, "LAST", 10_000.0)  # longer than a test may take
    monkeypatch.setattr(tracking, "INTERRUPTED", 0.2)
    try:
        notes = run(directory, {"tensorboard": "tb"}, [[row(0), row(1)]], KeyboardInterrupt())
    finally:
        stuck.set()
    assert notes == ["tracking.tensorboard: 2 rows are not there; the ledger has them all, and a resume sends them"]


def test_what_a_slow_tracker_was_not_told_at_an_interruption_it_is_told_by_the_next_run(directory, monkeypatch):
    moment = 0.0

    class Slow(Tracker):
        reported: ClassVar[list] = []

        def hold(self, number):
            nonlocal moment
            moment += 1.5  # seconds a row

    clock = type("Clock", (), {"monotonic": lambda: moment, "sleep": time.sleep})
    monkeypatch.setattr(tracking, "time", clock)
    monkeypatch.setattr(tracking, "TensorBoard", Slow)
    monkeypatch.setattr(tracking, "LOOK", 10_000.0)  # all of them at the end
    rows = [row(number) for number in range(9)]
    ledger, notes = [], []

    def interrupted():
        with tracked(TrackingSettings(tensorboard="tb"), "tiny", directory, lambda: list(ledger), notes.append):
            time.sleep(0.2)  # its first look
            ledger.extend(rows)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    first = list(Slow.reported)
    assert first == ["c0", "c1", "c2", False]  # 3 seconds of the 4, then the run is closed
    assert "6 rows are not there" in notes[0]
    monkeypatch.setattr(tracking, "LOOK", 0.05)
    assert run(directory, {"tensorboard": "tb"}, [rows]) == []
    assert Slow.reported[len(first) :] == [
        *(f"c{number}" for number in range(3, 9)),
        "report.html",
        "recipe.yaml",
        True,
    ]


def test_what_is_not_installed_is_said_before_work(monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"tracking.wandb: .*pip install 'mergequest\[wandb\]'"):
        require_trackers(TrackingSettings(wandb="x"))
    require_trackers(TrackingSettings())
    monkeypatch.undo()
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: pip install 'mergequest[tensorboard]'")
    with pytest.raises(SettingsError, match="experiment is MLflow's"):
        require_trackers(TrackingSettings(tensorboard="tb", experiment="x"))
    with pytest.raises(SettingsError, match="is remote"):
        require_trackers(TrackingSettings(tensorboard="s3://bucket/tb"))


@pytest.mark.parametrize("project", ["a/b/c", "/merges", "team/", "", " ", "merges?", "team/a:b", "a b/c", "x" * 129])
def test_what_is_no_project_is_said_before_work(project):
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'mergequest[wandb]'")
    for good in ("merges", "team/merges of 7", "a-b_c/x.y", "t/" + "x" * 128):
        require_trackers(TrackingSettings(wandb=good))
    with pytest.raises(SettingsError, match="is no project: expected PROJECT or ENTITY/PROJECT"):
        require_trackers(TrackingSettings(wandb=project))


def test_tracking_is_no_part_of_what_a_campaign_is(campaign_file, tmp_path):
    plain = load_campaign(str(campaign_file()))
    other = load_campaign(str(campaign_file()), ["tracking.tensorboard=tb", "tracking.mlflow=http://host:5000"])
    assert other.identity() == plain.identity()
    assert (other.tracking.tensorboard, other.tracking.mlflow) == (str(tmp_path / "tb"), "http://host:5000")
    with pytest.raises(SettingsError, match="password"):
        load_campaign(str(campaign_file()), ["tracking={mlflow: 'http://user:secret@host'}"])

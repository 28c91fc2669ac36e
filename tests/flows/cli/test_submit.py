"""Campaigns as jobs of a running Ray head that asks for a token."""

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from flows.cli.status import read_status
from flows.cli.submit import prepare
from merging.errors import SettingsError
from search.ledger.ledger import Ledger
from search.objective import best
from tests.s3_server import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
RAY = str(Path(sys.executable).parent / "ray")
ROOT = Path(__file__).parents[3]


def answers(url, token):
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    with contextlib.suppress(OSError):
        return urllib.request.urlopen(request, timeout=2).status == 200
    return False


@dataclass
class Head:
    """A running Ray head: its process, its pages, and the environment that knows its token."""

    process: subprocess.Popen
    url: str
    metrics_url: str
    environment: dict[str, str]
    scratch: str

    def takes_jobs(self):
        if not answers(f"{self.url}/api/version", self.environment["RAY_AUTH_TOKEN"]):
            return False
        return run([RAY, "job", "submit", "--address", self.url, "--", "true"], self.environment, ROOT).returncode == 0

    def stop(self):
        for own in workers_of(self.environment):
            with contextlib.suppress(ProcessLookupError):
                os.kill(own, signal.SIGKILL)
        self.process.wait(60)
        shutil.rmtree(self.scratch, ignore_errors=True)


def start_head():
    """Starts a head; it may have ended already, where another process took one of its ports."""
    token, dashboard, metrics = secrets.token_hex(32), free_port(), free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_USAGE_STATS_ENABLED": "0"}
    environment["RAY_metrics_report_interval_ms"] = "500"  # by default ten seconds, more than a tiny campaign takes
    # jobs run the `python` that the head's shell finds, as in an activated environment
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    options = ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    # ports that are fixed by default, and taken where another Ray runs on this machine
    options += [f"--{port}={free_port()}" for port in ("port", "dashboard-agent-listen-port", "ray-client-server-port")]
    options += ["--num-cpus=2", "--disable-usage-stats", f"--metrics-export-port={metrics}"]
    # a job joins the head that was last started with its temporary directory, which must be this one; sockets need a short path
    scratch = tempfile.mkdtemp(prefix="mq", dir="/tmp")
    with open(f"{scratch}/start.log", "w") as log:
        process = subprocess.Popen(
            [RAY, "start", "--head", "--block", *options, f"--temp-dir={scratch}/ray"],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    metrics_url = f"http://127.0.0.1:{metrics}/metrics"
    return Head(process, f"http://127.0.0.1:{dashboard}", metrics_url, environment, scratch)


@pytest.fixture(scope="module")
def head():
    """A head of its own on this machine."""
    for _ in range(3):
        head = start_head()
        deadline = time.monotonic() + 120
        while not (ready := head.takes_jobs()) and head.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.5)
        if ready:
            break
        log = Path(head.scratch, "start.log").read_text()
        head.stop()
    else:
        pytest.fail(f"the head did not start:\n{log}")
    yield head
    head.stop()


def start(command, environment, cwd):
    """Begins a command; `ended` waits for it."""
    return subprocess.Popen(
        command,
        env=environment | {"PYTHONPATH": str(ROOT)},
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process):
    """What a command printed, and its exit code."""
    output, errors = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def run(command, environment, cwd):
    return ended(start(command, environment, cwd))


def submission(file, url, *arguments):
    return [sys.executable, "-m", "mergequest", "submit", str(file), "--address", url, *arguments]


def submit(file, url, environment, cwd, *arguments):
    return run(submission(file, url, *arguments), environment, cwd)


def counters(metrics_url):
    """Campaign and status → candidates, as Prometheus would read them now."""
    with contextlib.suppress(OSError):
        text = urllib.request.urlopen(metrics_url, timeout=5).read().decode()
        lines = re.findall(r"^ray_mergequest_candidates_total\{(.*)\} (\S+)$", text, re.MULTILINE)
        labels = [(dict(re.findall(r'(\w+)="([^"]*)"', result)), float(value)) for result, value in lines]
        return {(result["campaign"], result["status"]): value for result, value in labels}
    return {}


@pytest.fixture
def checkout(tmp_path):
    """A working directory with the program's sources, as `ray job submit` sends it."""
    working = tmp_path / "working"
    working.mkdir()
    for name in ("flows", "merging", "ray_tasks", "search"):
        (working / name).symlink_to(ROOT / name)
    return working


def plain_submission(url):
    """Ray's own command, from a checkout."""
    command = [RAY, "job", "submit", "--address", url, "--working-dir", ".", "--"]
    return [*command, "python", "-m", "mergequest", "run", "my.yaml"]


def rows_of(directory):
    return Ledger(str(directory / "ledger")).rows()


def test_a_stopped_job_ends_within_seconds_and_goes_on_where_it_was_beside_another(
    head, campaign_file, checkout, tmp_path
):
    """Two campaigns: one stopped, then sent again; the other by Ray's own command while the first goes on."""
    url, environment = head.url, head.environment
    changes = {"selection": {"mode": "all"}, "resources": {"evaluators": 1}}
    search = {"candidates": 5000, "sampler": "random", "methods": {"task_arithmetic": {}}}
    first = campaign_file(name="first", directory="out", search=search, **changes)
    first = first.rename(tmp_path / "first.yaml")
    out = tmp_path / "out"
    sent = submit(first, url, environment, tmp_path, "--no-follow")
    job = re.search(r"job (\S+):", sent.stderr)[1]
    deadline = time.monotonic() + 400
    while len(rows := rows_of(out)) < 12 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert 12 <= len(rows) < 5000
    working = workers_of(environment)
    assert any("Evaluator" in name for name in working.values())

    started = time.monotonic()
    stopped = run([RAY, "job", "stop", "--address", url, job], environment, tmp_path)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    while "Evaluator" in str(workers_of(environment)) and time.monotonic() < started + 60:
        time.sleep(0.2)
    assert time.monotonic() - started < 30  # a second or two of it the command's own start
    assert not [pid for pid, name in workers_of(environment).items() if pid in working and "Evaluator" in name]
    assert not [path for path in out.rglob("*") if ".tmp" in path.name or ".old" in path.name]
    before = {(row.candidate, row.split): row.finished for row in rows_of(out)}
    assert read_status(str(out)).ended in ("interrupted", None)

    second = campaign_file(name="second", search=search | {"candidates": 10}, seed=2, **changes)
    second.rename(checkout / "my.yaml")
    measured, seen = len(before) - 4, {}  # but for references: the base and three members
    jobs = [
        start(submission(first, url, "--candidates", str(measured + 10)), environment, tmp_path),
        start([*plain_submission(url), "--out", str(tmp_path / "second")], environment, checkout),
    ]
    deadline = time.monotonic() + 600
    while any(job.poll() is None for job in jobs) and time.monotonic() < deadline:
        seen |= counters(head.metrics_url)
        time.sleep(0.5)
    done, plain = map(ended, jobs)
    assert done.returncode == 0, done.stdout + done.stderr
    assert plain.returncode == 0, plain.stdout + plain.stderr
    assert "winner" in done.stdout
    assert re.search(r"Ray \S+:\d+: 1 node, 2 CPUs", done.stdout), f"the job joins no cluster: {done.stdout}"
    # what was counted in the last seconds is not read any more
    assert {campaign for campaign, _ in seen} == {"first", "second"}
    assert all(value > 0 for (_, status), value in seen.items() if status == "complete")
    for name, directory, tried in (("first", out, measured + 10), ("second", tmp_path / "second", 10)):
        rows = rows_of(directory)
        assert {row.campaign for row in rows} == {name}
        assert len({(row.candidate, row.split) for row in rows}) == len(rows)
        assert sum(row.origin in ("anchor", "search") for row in rows) == tried
        assert best(rows)
        assert (directory / "report.html").exists()
        status = read_status(str(directory))
        assert (status.state, status.done, status.ended) == ("finished", tried, "finished")
    assert before.items() <= {(row.candidate, row.split): row.finished for row in rows_of(out)}.items()


def test_a_merge_and_statistics_as_jobs(head, campaign_file, tiny_campaign, tmp_path):
    url, environment = head.url, head.environment
    recipe = {key: tiny_campaign[key] for key in ("base", "members")} | {"method": "task_arithmetic", "scaling": 0.3}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    merged, statistics = tmp_path / "merged", tmp_path / "statistics"
    file = campaign_file(search={"methods": {"regmean": {}}})
    commands = [
        submission(tmp_path / "recipe.yaml", url, "--what", "merge", "--out", str(merged)),
        submission(file, url, "--what", "statistics", "--out", str(statistics)),
    ]
    for job in [start(command, environment, tmp_path) for command in commands]:
        done = ended(job)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (merged / "config.json").exists()
    assert len(list(statistics.rglob("*.safetensors"))) >= 3


def test_a_failing_job_is_an_exit_code(head, campaign_file, checkout, tmp_path):
    url, environment = head.url, head.environment
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("x")
    file = campaign_file()
    (checkout / "my.yaml").write_text(file.read_text())
    jobs = [
        start(submission(file, url, "--out", str(tmp_path / "thesis")), environment, tmp_path),
        start(plain_submission(url), environment, checkout),
    ]
    for job, message in zip(jobs, ("is not empty and holds no campaign", "temporary working directory"), strict=True):
        done = ended(job)
        assert done.returncode == 1, done.stdout + done.stderr
        assert message in done.stdout


def workers_of(environment):
    """The head's processes → what Ray calls them."""
    result = {}
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error):
            if process.environ().get("RAY_AUTH_TOKEN") == environment["RAY_AUTH_TOKEN"]:
                result[process.pid] = " ".join(process.info["cmdline"] or ())[:80]
    return result


def test_without_the_token_nothing_is_submitted(head, campaign_file, tmp_path):
    url, environment = head.url, head.environment
    wrong = ({"RAY_AUTH_TOKEN": secrets.token_hex(32)}, {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""})
    command = submission(campaign_file(), url)
    for job in [start(command, environment | changes, tmp_path) for changes in wrong]:
        done = ended(job)
        assert done.returncode == 2, done.stdout + done.stderr
        assert "cannot reach the Ray cluster" in done.stderr
        assert "RAY_AUTH_TOKEN" in done.stderr
        assert "Traceback" not in done.stderr


def test_no_cluster_there(campaign_file, tmp_path):
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    done = submit(campaign_file(), f"http://127.0.0.1:{free_port()}", environment, tmp_path)
    assert done.returncode == 2
    assert "cannot reach the Ray cluster" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("merges",), "unknown 'merges'. Did you mean 'merge'"),
        (("merge",), "needs a directory to write"),
        (("merge", "out", ["seed=5"]), "--set and --candidates go with a campaign file"),
    ],
)
def test_what_makes_no_sense_is_not_sent(campaign_file, arguments, message):
    what, *others = arguments
    with pytest.raises(SettingsError, match=re.escape(message)):
        prepare(what, str(campaign_file()), *(others or [None]))


def test_a_merge_travels_with_absolute_paths_and_asks_for_a_processor(tiny_campaign, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    members = {name: os.path.relpath(member["checkpoint"]) for name, member in tiny_campaign["members"].items()}
    recipe = {"base": os.path.relpath(tiny_campaign["base"]), "members": members, "method": "average"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    job = prepare("merge", "recipe.yaml", "merged")
    sent = yaml.safe_load(job.text)
    assert sent["base"] == tiny_campaign["base"]
    assert {name: member["checkpoint"] for name, member in sent["members"].items()} == {
        name: member["checkpoint"] for name, member in tiny_campaign["members"].items()
    }
    assert job.cpus == 1
    assert job.entrypoint == f"python -u -m mergequest merge recipe.yaml --out {tmp_path}/merged"

"""Campaigns as jobs of a running Ray head that asks for a token."""

import contextlib
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

from search.ledger import Ledger
from search.objective import best

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
RAY = str(Path(sys.executable).parent / "ray")
ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(url, token):
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    with contextlib.suppress(urllib.error.URLError, ConnectionError):
        return urllib.request.urlopen(request, timeout=2).status == 200
    return False


@pytest.fixture(scope="module")
def head():
    """A head of its own on this machine; yields its dashboard and the environment that knows its token."""
    token, dashboard = secrets.token_hex(32), free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_USAGE_STATS_ENABLED": "0"}
    # jobs run the `python` that the head's shell finds, as in an activated environment
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    options = ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    # ports that are fixed by default, and taken where another Ray runs on this machine
    options += [f"--{port}={free_port()}" for port in ("port", "dashboard-agent-listen-port", "ray-client-server-port")]
    options += ["--num-cpus=2", "--disable-usage-stats"]
    process = subprocess.Popen(
        [RAY, "start", "--head", "--block", *options],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{dashboard}"
    deadline = time.monotonic() + 120
    while not answers(f"{url}/api/version", token) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.5)
    assert process.poll() is None, "the head did not start"
    ready = [RAY, "job", "submit", "--address", url, "--", "true"]
    while run(ready, environment, ROOT).returncode and time.monotonic() < deadline:
        time.sleep(1.0)
    yield url, environment
    os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run(command, environment, cwd):
    return subprocess.run(
        command,
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def submit(file, url, environment, cwd, *arguments):
    command = [sys.executable, "-m", "flows.cli", "submit", str(file), "--address", url, *arguments]
    return run(command, environment | {"PYTHONPATH": str(ROOT)}, cwd)


def test_submit_runs_the_campaign_on_the_cluster(head, campaign_file, tmp_path):
    url, environment = head
    done = submit(campaign_file(search={"candidates": 8}, directory="out"), url, environment, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "winner" in done.stdout
    assert re.search(r"Ray \S+:\d+: 1 node, 2 CPUs", done.stdout), f"the job joins no cluster: {done.stdout}"
    rows = Ledger(str(tmp_path / "out" / "ledger")).rows()
    assert len([row for row in rows if row.origin in ("anchor", "search")]) == 8
    assert best(rows)
    assert (tmp_path / "out" / "report.html").exists()


def test_plain_ray_job_submit_with_the_working_directory(head, campaign_file, tmp_path):
    url, environment = head
    working = tmp_path / "working"
    working.mkdir()
    for name in ("flows", "merging", "ray_tasks", "search"):
        (working / name).symlink_to(ROOT / name)
    settings = yaml.safe_load(campaign_file(search={"candidates": 6}).read_text())
    (working / "my.yaml").write_text(yaml.safe_dump(settings))
    command = [RAY, "job", "submit", "--address", url, "--working-dir", ".", "--"]
    command += ["python", "-m", "flows.cli", "campaign", "run", "my.yaml"]
    refused = run(command, environment, working)
    assert refused.returncode == 1
    assert "temporary working directory" in refused.stdout
    done = run([*command, "--out", str(tmp_path / "out")], environment, working)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(Ledger(str(tmp_path / "out" / "ledger")).rows()) > 6


def test_a_failing_job_is_an_exit_code(head, campaign_file, tmp_path):
    url, environment = head
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("x")
    done = submit(campaign_file(), url, environment, tmp_path, "--out", str(tmp_path / "thesis"))
    assert done.returncode == 1
    assert "is not empty and holds no campaign" in done.stdout


def test_without_the_token_nothing_is_submitted(head, campaign_file, tmp_path):
    url, environment = head
    for wrong in ({"RAY_AUTH_TOKEN": secrets.token_hex(32)}, {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""}):
        done = submit(campaign_file(), url, environment | wrong, tmp_path)
        assert done.returncode == 2, done.stdout + done.stderr
        assert "cannot reach the Ray cluster" in done.stderr
        assert "RAY_AUTH_TOKEN" in done.stderr
        assert "Traceback" not in done.stderr


def test_no_cluster_there(campaign_file, tmp_path):
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    done = submit(campaign_file(), f"http://127.0.0.1:{free_port()}", environment, tmp_path)
    assert done.returncode == 2
    assert "cannot reach the Ray cluster" in done.stderr

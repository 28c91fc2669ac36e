"""The image, built and run: containers as the cluster's nodes."""

import contextlib
import os
import subprocess
from pathlib import Path

import pytest

from search.ledger.ledger import Ledger

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def engine():
    """A container engine that has the image's base: nothing is pulled for a test."""
    for command in filter(None, (os.environ.get("ENGINE"), "docker", "podman")):
        with contextlib.suppress(OSError):
            requested = [*command.split(), "image", "inspect", "docker.io/library/python:3.11-slim"]
            if subprocess.run(requested, capture_output=True, timeout=60).returncode == 0:
                return command
    pytest.skip("no docker or podman here that has python:3.11-slim")


@pytest.mark.slow
@pytest.mark.endurance
@pytest.mark.timeout(3600)
def test_a_campaign_runs_on_containers_of_the_image(engine, campaign_file, tmp_path_factory, tmp_path):
    shared, run = tmp_path_factory.getbasetemp(), tmp_path / "run"
    methods = {"average": {}, "ties": {}, "fisher": {}}  # weights alone, the compiled loops, and statistics
    file = campaign_file(search={"candidates": 4, "methods": methods}, test={"top": 1})
    subprocess.run(["chmod", "-R", "a+rwX", shared], check=True)
    command = [ROOT / "infra" / "try_image.sh", "mergequest", "submit", file, "--out", run]
    environment = os.environ | {"ENGINE": engine}
    done = subprocess.run(command, cwd=shared, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = Ledger(str(run / "ledger")).rows()
    tried = [row for row in rows if row.origin in ("anchor", "search")]
    assert len(tried) >= 4
    assert {row.status for row in rows} == {"complete"}
    assert (run / "exports" / "best" / "model.safetensors").stat().st_uid == 1000

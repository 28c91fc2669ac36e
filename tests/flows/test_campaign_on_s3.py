"""A campaign with everything on S3, over a connection that fails, is the campaign that it is here."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from transformers import AutoModel

from flows.cli.status import read_status
from merging.io import addresses, atomic, documents, storage
from merging.io.prefetch import download
from merging.io.s3 import PatientS3
from search.ledger.ledger import Ledger

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
SCRIPT = """
import sys
import ray_tasks
from flows.campaign.run import run
from flows.config.campaign_file import load_campaign
from flows.directory.progress import Display
from ray_tasks.connect import connect

with connect():
    for file in sys.argv[1:]:
        print(run(load_campaign(file), Display()))
"""


def drive(*files):
    """Runs campaigns in a process of their own, with a Ray that has this process's environment."""
    scratch = tempfile.mkdtemp(prefix="mq", dir="/tmp")  # a short path: Ray makes sockets there
    try:
        environment = os.environ | {"RAY_TMPDIR": scratch}
        command = [sys.executable, "-c", SCRIPT, *files]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1100)
        written = [done.stdout, done.stderr]
        written += [file.read_text(errors="replace") for file in Path(scratch).rglob("*.*") if file.is_file()]
        return done, "\n".join(written)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@pytest.fixture
def files(tiny_campaign, tmp_path, upload):
    """Writes the same campaign twice, the second with everything at `root`: `files(root)`."""

    def write(root):
        settings = copy.deepcopy(tiny_campaign) | {"directory": str(tmp_path / "here")}
        settings["resources"] = {"evaluators": 1}
        settings["selection"] = {"mode": "all"}
        methods = ["average", "task_arithmetic", "regmean"]
        settings["search"] = {"candidates": 6, "methods": methods, "pruning": "none"}
        (tmp_path / "campaign.yaml").write_text(yaml.safe_dump(settings))
        remote = copy.deepcopy(settings) | {"directory": addresses.join(root, "there")}
        for place, name in [(remote, "base"), *((member, "checkpoint") for member in remote["members"].values())]:
            directory = Path(place[name])
            place[name] = addresses.join(root, "models", directory.name)
            upload(directory, place[name])
        for task, values in remote["tasks"].items():
            for split, file in values["data"].items():
                values["data"][split] = addresses.join(root, "data", task, f"{split}.parquet")
                atomic.write_bytes(values["data"][split], Path(file).read_bytes())
        atomic.write_text(addresses.join(root, "campaign.yaml"), yaml.safe_dump(remote))
        return str(tmp_path / "campaign.yaml"), addresses.join(root, "campaign.yaml")

    return write


def outcome(directory):
    """What two runs of one campaign agree on."""
    return {
        (row.candidate, row.split): (
            row.origin,
            row.trial,
            row.status,
            row.members,
            row.scores,
            row.objective,
            row.data,
        )
        for row in Ledger(addresses.join(directory, "ledger")).rows()
    }


def everything(root):
    """All objects of a bucket."""
    system, inner = addresses.file_system(root)
    return {path: system.cat_file(path) for path in system.find(inner)}


@pytest.mark.endurance
def test_everything_on_s3_over_a_connection_that_fails(files, unreliable, s3_at, s3_server, tmp_path):
    root = s3_at(unreliable.url)
    here, there = files(root)
    unreliable.reset(rate=0.05, seed=7)
    done, written = drive(here, there)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sum(count for fault, count in unreliable.faults.items() if fault) > 10
    unreliable.reset()

    local, remote = str(tmp_path / "here"), addresses.join(root, "there")
    assert outcome(remote) == outcome(local)
    assert len(outcome(local)) > 10
    left, names = storage.list_dir(remote), sorted(path.name for path in Path(local).iterdir())
    assert left == [name for name in names if name != ".lock"]
    assert not [path for path in everything(root) if ".tmp" in path or ".probe" in path]
    assert documents.read_json(addresses.join(remote, "pool.json")) == json.loads(
        (tmp_path / "here/pool.json").read_text()
    )

    for name in storage.list_dir(addresses.join(remote, "exports", "best")):
        if not storage.is_dir(addresses.join(remote, "exports", "best", name)):
            (tmp_path / "best").mkdir(exist_ok=True)
            download(addresses.join(remote, "exports", "best", name), tmp_path / "best" / name)
    mine = AutoModel.from_pretrained(tmp_path / "best").state_dict()
    theirs = AutoModel.from_pretrained(Path(local) / "exports" / "best").state_dict()
    assert all(mine[name].equal(theirs[name]) for name in theirs)

    assert read_status(remote) is not None
    mine, theirs = (Ledger(addresses.join(place, "ledger")).rows() for place in (remote, local))
    finished = {row.trial: row.objectives for row in mine if row.trial is not None}
    assert finished == {row.trial: row.objectives for row in theirs if row.trial is not None}
    assert len(finished) >= 6
    secret = s3_server.SECRET
    assert secret not in written
    assert not [path for path, data in everything(root).items() if secret.encode() in data]


def kill_at(rows, file, directory):
    """Runs a campaign in a process that is killed once its ledger has so many rows."""
    scratch = tempfile.mkdtemp(prefix="mq", dir="/tmp")
    environment = os.environ | {"RAY_TMPDIR": scratch}
    command = [sys.executable, "-c", SCRIPT, file]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        while len(outcome(directory)) < rows:
            assert process.poll() is None
            time.sleep(0.1)
        process.kill()
    shutil.rmtree(scratch, ignore_errors=True)


@pytest.mark.endurance
@pytest.mark.parametrize("store", ["gcs_bucket", "azure_container"])
def test_everything_on_another_store(files, store, request, tmp_path, monkeypatch):
    """Google's and Azure's, by clients that keep listings in memory unless that is switched off; a driver is killed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = f"{request.getfixturevalue(store)}/{tmp_path.name}"
    here, there = files(root)
    remote, local = addresses.join(root, "there"), tmp_path / "here"
    kill_at(5, there, remote)
    killed = outcome(remote)
    done, written = drive(here, there)
    assert done.returncode == 0, done.stderr[-3000:]
    assert killed.items() <= outcome(remote).items()
    assert outcome(remote) == outcome(str(local))
    assert len(outcome(remote)) > 10
    rows = Ledger(addresses.join(remote, "ledger")).rows()
    assert len(rows) == len({(row.candidate, row.split) for row in rows})
    names = sorted(path.name for path in local.iterdir())
    assert storage.list_dir(remote) == [name for name in names if name != ".lock"]
    assert (tmp_path / "cache" / "mergequest" / "copies").is_dir()  # evaluators read the pool once
    if secret := re.search(r"AccountKey=([^;]+)", os.environ.get("AZURE_STORAGE_CONNECTION_STRING", "")):
        assert secret[1] not in written
        assert not [path for path, data in everything(root).items() if secret[1].encode() in data]


def test_a_server_that_checks_signatures(files, rclone_endpoint, s3_at):
    root = s3_at(rclone_endpoint)
    _, there = files(root)
    done, _ = drive(there)
    assert done.returncode == 0, done.stderr[-3000:]
    before = outcome(addresses.join(root, "there"))
    assert {row[2] for row in before.values()} == {"complete"}

    wrong = "marked-wrong-secret"
    s3_at(rclone_endpoint, secret=wrong, bucket=False)
    command = [sys.executable, "-m", "mergequest", "run", there]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "denied" in done.stderr
    assert "AWS_SECRET_ACCESS_KEY" in done.stderr
    assert "Traceback" not in done.stderr
    assert wrong not in done.stderr + done.stdout
    PatientS3.clear_instance_cache()

"""A campaign on real raylets whose evaluators, nodes and drivers die is the campaign that nothing happens to."""

import contextlib
import io
import os
import random
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from flows.campaign.open_campaign import open_campaign
from flows.config.campaign_file import load_campaign
from flows.directory.progress import Display
from merging.evaluation.live_models import LiveModels
from merging.io import addresses, storage
from search.ledger.ledger import from_table

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
CANDIDATES = 36
DRIVERS = 20
SECONDS = 0.4
SCORES = f"""
import hashlib, os, time

def norm(model, checkpoint, split, limit, notes):
    time.sleep({SECONDS})
    digest = hashlib.sha256(b"".join(value.detach().numpy().tobytes() for value in model.parameters())).hexdigest()
    with open(notes, "a") as file:
        file.write(f"{{split}} {{digest}}\\n")
    return float(sum(value.detach().double().norm() for value in model.parameters()))
"""


@pytest.fixture
def campaign(tiny_pool, tmp_path):
    """Writes a campaign whose proposals depend on nothing but their number: `campaign(name, root="s3://…")`."""
    (tmp_path / "my_norm.py").write_text(SCORES)

    def write(
        name, methods=("average", "task_arithmetic", "lines"), candidates=CANDIDATES, root=None, pool=None, **changes
    ):
        directory, pool = addresses.join(root or str(tmp_path), name), pool or tiny_pool
        settings = {
            "name": name,
            "directory": directory,
            "base": str(pool["base"]),
            "members": {member: str(pool[member]) for member in ("one", "two", "three")},
            "tasks": {
                "norm": {
                    "kind": "custom",
                    "evaluator": "my_norm:norm",
                    "model_class": "AutoModelForSequenceClassification",
                    "arguments": {"notes": str(tmp_path / f"{name}.txt")},
                    "examples": {"validation": 1},
                }
            },
            "task_heads": {"norm": "two"},
            "selection": {"mode": "all"},
            "search": {
                "candidates": candidates,
                "sampler": "random",
                "patience": None,
                "methods": {method: {} for method in methods},
            },
            **changes,
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings))
        return tmp_path / f"{name}.yaml", directory

    return write


class Driver:
    """`mergequest run` in a process group of its own, as a terminal starts it."""

    def __init__(self, file, directory, environment):
        self.directory = directory
        command = [sys.executable, "-m", "mergequest", "run", str(file)]
        self.log = file.with_suffix(".log")
        self.process = subprocess.Popen(
            command,
            env=environment | {"PYTHONPATH": f"{ROOT}:{file.parent}", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=self.log.open("a"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def until(self, rows, seconds=300):
        """Waits for that many files of rows, or the end."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            if len(rows_of(self.directory)) >= rows:
                return
            time.sleep(0.1)
        assert self.process.poll() is None, self.log.read_text()
        raise AssertionError(f"no {rows} rows within {seconds} s: {self.log.read_text()}")

    def end(self, number, whole_group=False):
        """Sends a signal; gives the exit code and the seconds that it took."""
        started = time.monotonic()
        (os.killpg if whole_group else os.kill)(self.process.pid, number)
        return self.process.wait(60), time.monotonic() - started

    def finish(self):
        assert self.process.wait(300) == 0, self.log.read_text()


def rows_of(directory):
    """What the ledger's files hold, as they stand."""
    place = addresses.join(directory, "ledger")
    files = [addresses.join(place, name) for name in storage.list_dir(place) if not name.startswith(".")]
    return [row for file in files for row in from_table(pq.read_table(io.BytesIO(storage.read_bytes(file))))]


def scores_of(directory, candidates=CANDIDATES):
    """(candidate, split) → score; every one there once."""
    rows = rows_of(directory)
    scores = {(row.candidate, row.split): dict(row.scores) for row in rows}
    assert len(scores) == len(rows)
    assert {row.status for row in rows} == {"complete"}, [row.error for row in rows if row.error]
    assert sum(row.origin in ("anchor", "search") for row in rows) == candidates
    return scores


def plain_environment():
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


@pytest.fixture
def scratch():
    with tempfile.TemporaryDirectory(prefix="mq", dir="/tmp", ignore_cleanup_errors=True) as path:  # short: for sockets
        yield path


@pytest.fixture
def raylets(scratch, tmp_path):
    """Three of them; yields a function that says `lose` or `add`, the environment of drivers, and the processes."""
    environment = plain_environment() | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray's name for "other than loopback"
    keeper = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("raylets.py"), scratch, "3"],
        env=environment | {"PYTHONPATH": str(tmp_path)},  # where the workers find the task
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )

    def say(word):
        keeper.stdin.write(f"{word}\n")
        keeper.stdin.flush()
        assert keeper.stdout.readline() == "done\n"

    address = keeper.stdout.readline().strip()
    assert address
    processes = psutil.Process(keeper.pid)
    yield say, environment | {"RAY_ADDRESS": address}, processes
    children = processes.children(recursive=True)
    keeper.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        keeper.wait(30)
    for process in [processes, *children]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def evaluators(processes):
    """Processes of evaluators below these."""
    named = []
    for process in processes.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[:1] and "Evaluator" in process.cmdline()[0]:
                named.append(process)
    return named


class Reader(threading.Thread):
    """Opens a ledger all the time; what it saw once must stay."""

    def __init__(self, directory):
        super().__init__(daemon=True)
        self.directory, self.times, self.failures, self.done = directory, 0, [], threading.Event()

    def run(self):
        seen = set()
        while not self.done.wait(0.05 if addresses.is_local(self.directory) else 0.5):
            try:
                rows = rows_of(self.directory)
            except Exception as error:
                self.failures.append(repr(error))
                continue
            now = {(row.candidate, row.split) for row in rows}
            if len(now) < len(rows):
                self.failures.append(f"repeated: {len(rows) - len(now)}")
            if seen - now:
                self.failures.append(f"vanished: {seen - now}")
            seen, self.times = now, self.times + 1


@pytest.mark.endurance
def test_nothing_is_lost_or_repeated_whatever_dies(campaign, raylets, scratch, tmp_path):
    say, environment, processes = raylets
    file, directory = campaign("broken")
    reader, chance = Reader(directory), random.Random(11)
    reader.start()
    lost = 0
    driver = Driver(file, directory, environment)
    for rows, deed in ((7, "evaluator"), (12, "driver"), (17, "evaluator"), (21, "node"), (24, "driver")):
        driver.until(rows)
        time.sleep(chance.uniform(0.0, SECONDS))
        if deed == "evaluator":
            chance.choice(sorted(evaluators(processes), key=lambda process: process.pid)).kill()
            lost += 1
        elif deed == "node":
            say("lose")
            lost += 1
        else:
            assert driver.end(signal.SIGKILL)[0] == -signal.SIGKILL
            lost += 3
            driver = Driver(file, directory, environment)
    say("add")
    driver.finish()
    reader.done.set()
    reader.join()
    assert not reader.failures
    assert reader.times > 10
    scores = scores_of(directory)
    file, calm = campaign("calm")
    Driver(file, calm, environment).finish()
    assert scores == scores_of(calm)
    measured = (tmp_path / "broken.txt").read_text().split("\n")[:-1]
    assert len(scores) <= len(measured) <= len(scores) + lost
    assert sum(count - 1 for count in Counter(measured).values()) <= lost


@pytest.fixture
def bucket(unreliable, s3_at):
    """An S3 address behind the proxy, known to whatever is started after this."""
    return s3_at(unreliable.url)


@pytest.mark.endurance
@pytest.mark.timeout(3000)
def test_twenty_drivers_killed_on_a_faulty_s3_lose_and_repeat_nothing(
    campaign, bucket, unreliable, raylets, scratch, tiny_pool, upload, tmp_path
):
    say, environment, processes = raylets
    for name in tiny_pool:
        upload(tiny_pool[name], addresses.join(bucket, name))
    pool = {name: addresses.join(bucket, name) for name in tiny_pool}
    resources = {"evaluators": 1}  # starting one takes longer than all that it measures
    changes = {"resources": resources, "candidates": 4 * DRIVERS}
    file, directory = campaign("broken", root=bucket, pool=pool, **changes)
    unreliable.reset(rate=0.05, seed=7)
    reader, chance = Reader(directory), random.Random(23)
    reader.start()
    killed = Counter()
    for number in range(DRIVERS):
        driver = Driver(file, directory, environment)
        if number % 4 == 3:  # while it starts: looks at the pool, joins the cluster, waits for evaluators
            time.sleep(chance.uniform(0.5, 10.0))
        else:
            driver.until(len(rows_of(directory)) + 1)
            if number % 4 == 1 and (working := evaluators(processes)):
                chance.choice(sorted(working, key=lambda process: process.pid)).kill()
                killed["evaluators"] += 1
            time.sleep(chance.uniform(0.0, 2 * SECONDS))
        if number == DRIVERS // 2:
            say("lose")
        assert driver.end(signal.SIGKILL)[0] == -signal.SIGKILL, driver.log.read_text()
    say("add")
    assert len(rows_of(directory)) < 4 * DRIVERS + 4  # there was something left to do, at every kill
    driver = Driver(file, directory, environment)
    driver.finish()
    reader.done.set()
    reader.join()
    faults, requests = sum(count for fault, count in unreliable.faults.items() if fault), len(unreliable.requests)
    unreliable.reset()
    assert not reader.failures
    scores = scores_of(directory, 4 * DRIVERS)
    file, calm = campaign("calm", **changes)
    Driver(file, calm, plain_environment() | {"RAY_TMPDIR": scratch}).finish()
    assert scores == scores_of(calm, 4 * DRIVERS)
    measured = (tmp_path / "broken.txt").read_text().split("\n")[:-1]
    figures = {
        "drivers killed": DRIVERS,
        "evaluators killed": killed["evaluators"],
        "requests": requests,
        "faults": faults,
        "ledger read": reader.times,
        "rows": len(scores),
        "measured": len(measured),
    }
    print(figures)  # with -rP
    assert killed["evaluators"] >= 2
    assert faults > 0.03 * requests
    assert reader.times > 50


@pytest.mark.endurance
def test_ctrl_c_and_sigterm_end_within_seconds_and_it_resumes(campaign, scratch):
    environment = plain_environment() | {"RAY_TMPDIR": scratch}
    file, directory = campaign("interrupted")
    for rows, number, group in ((6, signal.SIGINT, True), (9, signal.SIGTERM, False)):
        driver = Driver(file, directory, environment)
        driver.until(rows)
        code, seconds = driver.end(number, group)
        assert code == 130, driver.log.read_text()
        assert seconds < 15
        assert driver.log.read_text().endswith("the same command goes on from there\n")
        assert not [p for p in psutil.process_iter(["environ"]) if scratch in str(p.info["environ"])]
    driver = Driver(file, directory, environment)
    driver.finish()
    assert scores_of(directory)


def test_shards_that_a_node_takes_along_are_read_again_elsewhere(campaign, raylets, tmp_path, monkeypatch):
    say, environment, _ = raylets
    changes = {"candidates": 20, "resources": {"regime": "sharded", "evaluators": 2}}
    file, directory = campaign("sharded", ("task_arithmetic", "ties"), **changes)
    driver = Driver(file, directory, environment)
    driver.until(9)
    say("lose")
    driver.finish()
    reported = driver.log.read_text()
    assert "sharded: 3 shards on 3 nodes" in reported
    assert re.search(r"a node was lost, and shard \d with it", reported)
    assert re.search(r"shard \d found room on", reported)

    assert len(scores_of(directory, candidates=20)) == 20 + 4
    monkeypatch.syspath_prepend(tmp_path)
    opened = open_campaign(load_campaign(str(file)), Display())
    live = LiveModels(opened.setup({}).material(), list(opened.tasks.values()), {"norm": "two"}, torch.device("cpu"))
    rows = sorted(rows_of(directory), key=lambda row: row.finished)
    for row in {row.method: row for row in rows}.values():  # the last of each, merged after the loss
        assert live.measure(row.recipe, "validation").scores["norm"].value == row.scores["norm"]

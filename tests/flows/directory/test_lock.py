"""Who may drive a campaign on an object store."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from flows.directory import lock as leases
from flows.directory.lock import lease
from merging.errors import LedgerError
from merging.io import addresses, atomic, documents, storage
from merging.io.process import this_process


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(leases, "BEAT", 0.1)
    monkeypatch.setattr(leases, "SILENCE", 0.5)
    monkeypatch.setattr(leases, "SETTLE", 0.05)


@pytest.fixture(params=["memory", "moto"])
def path(request, tmp_path):
    if request.param == "memory":
        return f"memory://{tmp_path}/.lease.json"
    root = request.getfixturevalue("s3_at")(request.getfixturevalue("moto_endpoint"))
    return addresses.join(root, ".lease.json")


def left_behind(path, **changes):
    """A lease whose holder is silent."""
    result = {"owner": "another", "host": "elsewhere", "pid": 1, "born": 1.0, "beat": 3} | changes
    atomic.write_bytes(path, json.dumps(result).encode())


def be_taken_for_dead(path):
    left_behind(path)
    time.sleep(10)


def test_one_at_a_time(path):
    with lease(path, "this campaign"):
        message = rf"is running this campaign: process {os.getpid()} on .*stop it there"
        with pytest.raises(LedgerError, match=message), lease(path, "this campaign"):
            pytest.fail("two at once")
        assert storage.exists(path)
    assert not storage.exists(path)
    with lease(path, "this campaign"):
        assert storage.exists(path)


def test_a_holder_that_was_killed_on_this_machine_is_followed_at_once(path, monkeypatch):
    monkeypatch.setattr(leases, "SILENCE", 60.0)
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    left_behind(path, **this_process() | {"pid": int(gone.stdout)})
    started = time.monotonic()
    with lease(path, "it"):
        assert time.monotonic() - started < 5


@pytest.mark.parametrize("other", [{"boot": "another"}, {"namespace": "pid:[1]"}, {"host": "another"}])
def test_a_holder_in_another_container_of_the_same_name_is_watched_first(path, other):
    """Its number means another process here, or none: that says nothing of it."""
    left_behind(path, **this_process() | {"pid": 2**22 - 1} | other)
    started = time.monotonic()
    with lease(path, "it"):
        assert time.monotonic() - started >= 0.5


@pytest.mark.parametrize(
    "wrong", [{"pid": "x"}, {"pid": None}, {"pid": 10**30}, {"pid": -1}, {"born": "x"}, {"host": 3}]
)
def test_a_lease_that_holds_nonsense_runs_out_like_any_other(path, wrong):
    left_behind(path, **this_process() | wrong)
    with lease(path, "it"):
        assert documents.read_json(path)["pid"] == os.getpid()


class OwnError(Exception):
    """What a store's client raises, which is no OSError."""


def test_a_store_that_is_away_for_a_while_takes_no_lease(monkeypatch, tmp_path):
    path = f"memory://{tmp_path}/.lease.json"
    cat = MemoryFileSystem.cat_file

    def away(*args, **kwargs):
        if threading.current_thread().name == "mergequest-lease" and time.monotonic() - started < 0.5:
            raise OwnError("token expired")
        return cat(*args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", away)
    started = time.monotonic()
    with lease(path, "it"):
        first = documents.read_json(path)["beat"]
        time.sleep(1.0)
        assert documents.read_json(path)["beat"] > first


def test_a_holder_elsewhere_is_followed_after_its_silence(path):
    left_behind(path)
    started = time.monotonic()
    with lease(path, "it"):
        assert time.monotonic() - started >= 0.5


def test_a_holder_elsewhere_that_lives_is_left_alone(path):
    done = threading.Event()

    def live():
        for beat in range(1000):
            left_behind(path, beat=beat)
            if done.wait(0.05):
                return

    left_behind(path)
    other = threading.Thread(target=live)
    other.start()
    try:
        with pytest.raises(LedgerError, match="process 1 on elsewhere"), lease(path, "it"):
            pytest.fail("two at once")
    finally:
        done.set()
        other.join()


def test_who_was_taken_for_dead_stops(path):
    started = time.monotonic()
    with pytest.raises(LedgerError, match="another mergequest took over it"), lease(path, "it"):
        be_taken_for_dead(path)
    assert time.monotonic() - started < 9, "it was stopped in its sleep"
    assert documents.read_json(path)["owner"] == "another"

"""A store whose client raises errors of its own that are no OSError, as those of Google's and Azure's stores do."""

import random
import time

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import save

from flows.config.campaign_file import load_campaign
from flows.directory.campaign_directory import Directory
from flows.directory.heartbeat import Pulse, heartbeat
from flows.directory.steering import DirectorySteering, request_stop
from merging.checkpoints.checkpoint import Checkpoint
from merging.errors import MergequestError, StorageError
from merging.io import atomic, storage
from search.ledger.ledger import Ledger
from search.ledger.row import Row


class GoneError(Exception):
    """A client's own."""


class GoneOSError(ConnectionError):
    """One that is an `OSError`, which many clients' `exists` and `isdir` take for an absence."""


class Faulty(MemoryFileSystem):
    """Memory behind a client that fails now and then, before the call or after it was carried out."""

    protocol = "faulty"
    share = 0.0
    chance = random.Random(0)
    error: type[Exception] = GoneError

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("faulty://", "memory://"))


def _failing(name):
    method = getattr(MemoryFileSystem, name)

    def call(self, *arguments, **settings):
        if Faulty.chance.random() < Faulty.share / 2:
            raise self.error("401 for https://store/x?token=hunter2secret")
        result = method(self, *arguments, **settings)
        if Faulty.chance.random() < Faulty.share / 2:
            raise self.error("reset by peer")
        return result

    return call


for name in ("ls", "find", "info", "cat_file", "put_file", "pipe_file", "rm_file", "mv", "_open"):
    setattr(Faulty, name, _failing(name))
fsspec.register_implementation("faulty", Faulty, clobber=True)


@pytest.fixture
def store(tmp_path):
    """Sets the share of calls that fail; none until then."""
    Faulty.share, Faulty.chance, Faulty.error = 0.0, random.Random(str(tmp_path.name)), GoneError

    def fail(share):
        Faulty.share = share

    yield f"faulty://{tmp_path}", fail
    Faulty.share = 0.0


CALLS = {
    "exists": lambda place: storage.exists(f"{place}/a"),
    "is_dir": lambda place: storage.is_dir(place),
    "list_dir": lambda place: storage.list_dir(place),
    "list_files": lambda place: storage.list_files(place),
    "read_bytes": lambda place: storage.read_bytes(f"{place}/a"),
    "size": lambda place: storage.size(f"{place}/a"),
    "write_bytes": lambda place: atomic.write_bytes(f"{place}/a", b"new"),
    "create": lambda place: atomic.create(f"{place}/b", b"new"),
    "remove": lambda place: storage.remove(f"{place}/a"),
    "ledger": lambda place: Ledger(f"{place}/ledger", "demo"),
    "checkpoint": lambda place: Checkpoint.open(place),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", [GoneError, GoneOSError])
def test_every_call_that_fails_is_one_error_that_names_the_place_and_no_secret(store, call, kind):
    place, fail = store
    atomic.write_bytes(f"{place}/a", b"old")
    Faulty.error = kind
    fail(2.0)  # every one
    with pytest.raises(MergequestError) as error:
        CALLS[call](place)
    assert "401 for https://store/x" in str(error.value)
    assert "faulty://" in str(error.value)
    assert "hunter2" not in str(error.value)


def test_a_ledger_loses_and_doubles_nothing(store):
    """What failed is appended again until it is told to be there, as a resumed search does."""
    place, fail = store
    rows = [
        Row("demo", f"c{number}", "validation", "search", "complete", "ties", objective=0.5) for number in range(30)
    ]
    fail(0.08)
    failures = 0
    ledger = None
    for row in rows:
        while True:
            try:
                ledger = ledger or Ledger(f"{place}/ledger", "demo")
                ledger.append(row)
                break
            except StorageError:
                failures += 1
                ledger = None  # a new driver
    fail(0.0)
    actual = Ledger(f"{place}/ledger", "demo").rows()
    assert sorted(row.candidate for row in actual) == sorted(row.candidate for row in rows)
    assert failures > 2


def test_a_driver_beats_and_listens_through_faults(store, campaign_file):
    place, fail = store
    campaign = load_campaign(str(campaign_file(directory=f"{place}/out")))
    directory = Directory(campaign.directory)
    directory.claim(campaign, {})
    steering = DirectorySteering(directory.path, ["average"], ["one"], "bert", [])
    pulse = Pulse(steering=steering, look=steering.look)
    fail(0.6)
    with heartbeat(directory.path, pulse, "tiny", every=0.01):
        for _ in range(1000):
            try:
                request_stop(directory.path)
                break
            except StorageError:
                continue
        for _ in range(1000):
            if steering.stopping():
                break
            time.sleep(0.01)
    fail(0.0)
    assert steering.stopping()


def test_a_checkpoint_is_read_where_the_store_answers(store):
    place, fail = store
    atomic.write_bytes(f"{place}/model/model.safetensors", save({"weight": torch.arange(6.0).reshape(2, 3)}))
    atomic.write_bytes(f"{place}/model/config.json", b'{"model_type": "bert", "architectures": ["BertModel"]}')
    fail(0.2)
    for _ in range(200):
        try:
            checkpoint = Checkpoint.open(f"{place}/model")
            assert torch.equal(checkpoint.read("weight"), torch.arange(6.0).reshape(2, 3))
            break
        except MergequestError:
            continue
    else:
        raise AssertionError("never read")

"""Remote tensors: what is asked of the server, and that it is the same tensors."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.pool import Pool
from merging.checkpoints.validation import check_weights
from merging.errors import StorageError
from merging.io import addresses, atomic, prefetch
from merging.io.prefetch import Window, download

DATA = random.Random(0).randbytes(100_000)


@pytest.fixture
def path(unreliable, s3_at, monkeypatch):
    monkeypatch.setattr(prefetch, "REQUEST", 8_000)
    monkeypatch.setattr(prefetch, "GAP", 64)
    monkeypatch.setattr(prefetch, "AHEAD", 32_000)
    path = addresses.join(s3_at(unreliable.url), "file")
    atomic.write_bytes(path, DATA)
    unreliable.reset()
    return path


def test_neighbours_come_in_one_request(path, unreliable):
    spans = [(start, start + 990) for start in range(0, 40_000, 1000)]
    window = Window(path)
    window.prefetch(spans)
    assert [bytes(window.take(*span)) for span in spans] == [DATA[start:stop] for start, stop in spans]
    assert len(unreliable.requests) == 5


def test_a_long_span_comes_in_pieces(path, unreliable):
    window = Window(path)
    assert window.take(100, 50_100) == DATA[100:50_100]
    assert len(unreliable.requests) == 7


def test_only_so_much_is_read_ahead(path, unreliable):
    window = Window(path)
    spans = [(start, start + 8_000) for start in range(0, 96_000, 8_000)]
    window.prefetch(spans)
    window.take(*spans[0])
    for span in spans[1:]:
        requested = sum(1 for _, _, requested in unreliable.requests if requested)
        assert requested <= spans.index(span) + 4
        assert window.take(*span) == DATA[slice(*span)]
    assert len(unreliable.requests) == len(spans)


def test_any_order_any_thread_and_twice(path, unreliable):
    spans = [(start, start + 700) for start in range(0, 99_000, 700)]
    window = Window(path)
    window.prefetch(spans)
    window.prefetch(spans)
    shuffled = random.Random(1).sample(spans, len(spans)) + spans[:5]
    unreliable.rate = 0.05
    with ThreadPoolExecutor(8) as threads:
        result = list(threads.map(lambda span: bytes(window.take(*span)), shuffled))
    assert result == [DATA[slice(*span)] for span in shuffled]
    good = len(unreliable.requests) - sum(n for fault, n in unreliable.faults.items() if fault)
    assert good <= -(-99_000 // 7_700) + 5


def test_a_file_that_ends_early(path):
    with pytest.raises(StorageError, match=r"file ends before byte 100,001|cannot read"):
        Window(path).take(99_000, 100_001)


def test_a_copy(path, tmp_path):
    download(path, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == DATA


def test_a_remote_pool_is_the_local_one(tiny_pool, upload, unreliable, s3_at):
    root = s3_at(unreliable.url)
    members = ("one", "two", "three")
    for name in ("base", *members):
        upload(tiny_pool[name], addresses.join(root, name))
    here = Pool.open(str(tiny_pool["base"]), {name: str(tiny_pool[name]) for name in members})
    unreliable.reset()
    there = Pool.open(addresses.join(root, "base"), {name: addresses.join(root, name) for name in members})
    assert check_weights(there) == check_weights(here)
    reads = [path for method, path, span in unreliable.requests if method == "GET" and span and "-" in span]
    assert len(reads) <= 5 * 4  # of each of four: configuration, header's length, header, and the weights in one or two
    assert there.fingerprints() == here.fingerprints()
    for name in here.weights:
        assert torch.equal(there.member_weight("two", name), here.member_weight("two", name))


def test_the_fingerprint_of_a_remote_checkpoint_is_found_once(tiny_pool, upload, unreliable, s3_at):
    path = addresses.join(s3_at(unreliable.url), "one")
    upload(tiny_pool["one"], path)
    assert Checkpoint.open(path).fingerprint == Checkpoint.open(str(tiny_pool["one"])).fingerprint
    again = Checkpoint.open(path)
    unreliable.reset()
    again.fingerprint  # noqa: B018
    assert {method for method, _, _ in unreliable.requests} == {"HEAD"}
    upload(tiny_pool["two"], path)
    assert Checkpoint.open(path).fingerprint == Checkpoint.open(str(tiny_pool["two"])).fingerprint

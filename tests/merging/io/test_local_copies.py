"""Copies of remote files: made once, read instead, and gone with what they are copies of."""

import atexit
import errno
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from merging.checkpoints.checkpoint import Checkpoint
from merging.io import addresses, atomic, local_copies


@pytest.fixture
def one(tiny_pool, upload, unreliable, s3_at):
    """A checkpoint on S3."""
    path = addresses.join(s3_at(unreliable.url), "one")
    upload(tiny_pool["one"], path)
    unreliable.reset()
    return path


def disk(*, total, free):
    """Gives the machine a disk of so many bytes."""
    usage = SimpleNamespace(total=total, free=free)
    return lambda patch: patch.setattr(local_copies.shutil, "disk_usage", lambda path: usage)


def weights(path):
    return addresses.join(path, "model.safetensors")


def test_of_many_that_ask_at_once_one_makes_it(one, unreliable, tiny_pool):
    with ThreadPoolExecutor(6) as threads:
        (copy,) = set(threads.map(local_copies.made, [weights(one)] * 6))
    assert copy.read_bytes() == (tiny_pool["one"] / "model.safetensors").read_bytes()
    assert [method for method, _, _ in unreliable.requests].count("GET") == 1
    assert local_copies.copy_of(weights(one)) == copy


def test_a_copy_is_read_instead_until_the_file_changes(one, unreliable, tiny_pool, upload):
    checkpoint = Checkpoint.open(one)
    checkpoint.copy_here()
    later = Checkpoint.open(one)
    unreliable.reset()
    expected = Checkpoint.open(str(tiny_pool["one"]))
    for opened in (checkpoint, later):
        opened.prefetch(opened.tensors)
        assert all(torch.equal(opened.read(name), expected.read(name)) for name in expected.tensors)
    assert "GET" not in {method for method, _, _ in unreliable.requests}
    assert later.fingerprint == expected.fingerprint

    upload(tiny_pool["two"], one)
    changed, other = Checkpoint.open(one), Checkpoint.open(str(tiny_pool["two"]))
    assert all(torch.equal(changed.read(name), other.read(name)) for name in other.tensors)


def test_a_copy_that_another_process_made_is_found_when_it_is_looked_for(one, unreliable, tiny_pool):
    checkpoint, expected = Checkpoint.open(one), Checkpoint.open(str(tiny_pool["one"]))
    assert torch.equal(checkpoint.read("classifier.bias"), expected.read("classifier.bias"))  # there was none
    checkpoint.prefetch(["classifier.weight"])
    Checkpoint.open(one).copy_here()
    checkpoint.find_copy()
    unreliable.reset()
    assert all(torch.equal(checkpoint.read(name), expected.read(name)) for name in expected.tensors)
    assert "GET" not in {method for method, _, _ in unreliable.requests}


def test_without_room_or_wish_all_is_read_from_afar(one, tiny_pool, monkeypatch):
    expected = Checkpoint.open(str(tiny_pool["one"]))
    for spoil in (
        disk(total=10e9, free=1e9),
        disk(total=1e12, free=8e9),
        lambda patch: patch.setenv(local_copies.SWITCH, "0"),
    ):
        with monkeypatch.context() as patch:
            spoil(patch)
            checkpoint = Checkpoint.open(one)
            checkpoint.copy_here()
            assert local_copies.copy_of(weights(one)) is None
            assert torch.equal(checkpoint.read("classifier.bias"), expected.read("classifier.bias"))


def test_a_disk_that_fills_up_keeps_nothing(one, monkeypatch):
    def fill(path, target):
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(local_copies, "download", fill)
    assert local_copies.made(weights(one)) is None
    assert [file.suffix for file in local_copies.cache_directory().rglob("copies/*")] == [".lock"]


def test_what_nobody_opened_for_long_goes(one, tmp_path):
    copy = local_copies.made(weights(one))
    os.utime(copy, (0, 0))
    assert local_copies.copy_of(weights(one)) == copy  # opened
    old = copy.with_name("old")
    old.write_bytes(b"x")
    os.utime(old, (0, 0))
    atomic.write_bytes(addresses.join(one, "other"), b"12345")
    assert local_copies.made(addresses.join(one, "other")).read_bytes() == b"12345"
    assert copy.exists()
    assert not old.exists()


def test_a_directory_of_one_s_own_goes_with_its_process_even_if_that_is_killed(tmp_path, monkeypatch):
    code = "import sys; from merging.io import local_copies; print(local_copies.own_directory(), flush=True); sys.stdin.read()"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    killed, ended, living = (Path(process.stdout.readline().strip()) for process in processes)
    try:
        assert {killed, ended, living} == set(tmp_path.iterdir())
        processes[0].kill()
        processes[0].wait()
        processes[1].communicate()
        assert {killed, living} == set(tmp_path.iterdir())
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        monkeypatch.setattr(atexit, "register", lambda *_, **__: None)  # pytest removes it
        assert {living, local_copies.own_directory()} == set(tmp_path.iterdir())
    finally:
        for process in processes:
            process.kill()
            process.communicate()

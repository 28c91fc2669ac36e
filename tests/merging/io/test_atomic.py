import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from merging.errors import StorageError
from merging.io import addresses, atomic, s3, storage


def test_what_is_written_is_read(root):
    path = addresses.join(root, "deep", "file.bin")
    atomic.write_bytes(path, b"0123456789")
    assert storage.exists(path)
    assert storage.read_bytes(path) == b"0123456789"
    assert storage.read_bytes(path, 3, 6) == b"345"
    assert storage.size(path) == 10
    assert storage.list_dir(addresses.join(root, "deep")) == ["file.bin"]
    atomic.write_bytes(path, b"new")
    assert storage.read_bytes(path) == b"new"
    storage.remove(path)
    storage.remove(path)
    assert not storage.exists(path)
    assert storage.list_dir(addresses.join(root, "nothing")) == []


def test_a_new_file_appears_whole_at_the_end(root, monkeypatch):
    monkeypatch.setattr(s3, "PART", 5 << 20)
    path = addresses.join(root, "large.bin")
    atomic.write_bytes(path, b"old")
    block = bytes(range(256)) * 4096
    with atomic.open_new(path) as file:
        for _ in range(11):
            file.write(block)
        assert file.tell() == 11 << 20
        assert storage.read_bytes(path) == b"old"
    assert storage.size(path) == 11 << 20
    assert storage.read_bytes(path, (5 << 20) - 2, (5 << 20) + 2) == b"\xfe\xff\x00\x01"
    assert storage.list_dir(root) == ["large.bin"]
    with atomic.open_new(path):
        pass
    assert storage.read_bytes(path) == b""


@pytest.mark.parametrize("written", [10, 12 << 20])
def test_a_broken_off_file_leaves_nothing(root, monkeypatch, written):
    monkeypatch.setattr(s3, "PART", 5 << 20)
    path = addresses.join(root, "half.bin")
    with pytest.raises(KeyboardInterrupt), atomic.open_new(path) as file:
        break_off(file, written)
    assert not storage.exists(path)
    assert storage.list_dir(root) == []
    assert not parts_left(root)


def parts_left(root):
    if not root.startswith("s3://"):
        return []
    system, bucket = addresses.file_system(root)
    try:
        return system.call_s3("list_multipart_uploads", Bucket=bucket).get("Uploads", [])
    except FileNotFoundError:  # rclone's word for none
        return []


def break_off(file, written):
    file.write(bytes(written))
    raise KeyboardInterrupt


def test_what_is_created_stays(root):
    path = addresses.join(root, "below", "once.json")
    assert atomic.create(path, b"first")
    assert not atomic.create(path, b"second")
    assert atomic.create(path, b"first")
    assert storage.read_bytes(path) == b"first"
    assert storage.list_dir(addresses.join(root, "below")) == ["once.json"]


@pytest.mark.parametrize("root", ["local", "moto", "gcs"], indirect=True)
def test_of_many_at_once_one_creates(root):
    path = addresses.join(root, "raced")
    with ThreadPoolExecutor(16) as racers:
        won = list(racers.map(lambda number: atomic.create(path, b"%d" % number), range(16)))
    assert sum(won) == 1
    assert storage.read_bytes(path) == b"%d" % won.index(True)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    atomic.write_text(str(path), "old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"cannot write .*file\.txt: No space left on device"):
        atomic.write_text(str(path), "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_in_a_directory_s_place(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot write"):
        atomic.write_text(str(tmp_path / "file" / "below"), "y")


def test_a_new_directory_replaces_the_old_one_as_a_whole(tmp_path):
    path = tmp_path / "out"
    for content in ("first", "second"):
        with atomic.new_dir(str(path)) as directory:
            (directory / content).write_text(content)
            assert not (path / content).exists()
    assert [entry.name for entry in path.iterdir()] == ["second"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_broken_off_directory_leaves_the_old_one(tmp_path):
    path = tmp_path / "out"
    with atomic.new_dir(str(path)) as directory:
        (directory / "kept").write_text("x")
    with pytest.raises(KeyboardInterrupt), atomic.new_dir(str(path)) as directory:
        interrupt(directory)
    assert [entry.name for entry in path.iterdir()] == ["kept"]
    assert list(tmp_path.iterdir()) == [path]


def interrupt(directory):
    (directory / "half").write_text("x")
    raise KeyboardInterrupt

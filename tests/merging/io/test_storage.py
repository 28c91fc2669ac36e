import base64
import os
import re
import sys

import fsspec
import pytest

from merging.errors import StorageError
from merging.io import addresses, atomic, documents, hashing, storage


def test_missing_files_are_named(root):
    path = addresses.join(root, "nowhere.txt")
    for read in (storage.read_text, documents.read_json, storage.size, hashing.file_fingerprint):
        with pytest.raises(StorageError, match=r"cannot read .*nowhere\.txt: it does not exist"):
            read(path)


@pytest.mark.parametrize("root", ["memory", "moto", "gcs", "azure"], indirect=True)
def test_what_another_process_writes_is_seen(root):
    place = addresses.join(root, "below")
    first, second, third = (addresses.join(place, name) for name in ("a", "b", "deep/c"))
    atomic.write_bytes(first, b"1")
    assert (storage.list_dir(place), storage.list_files(place)) == (["a"], {"a": 1})
    system, _ = addresses.file_system(root)
    another = type(system)(skip_instance_cache=True)
    for path, content in ((first, b"123"), (second, b"12"), (third, b"1")):
        another.pipe_file(addresses.file_system(path)[1], content)
    assert (storage.size(first), storage.size(second), storage.size(third)) == (3, 2, 1)
    assert storage.exists(second)
    assert storage.is_dir(addresses.join(place, "deep"))
    another.rm_file(addresses.file_system(second)[1])
    assert not storage.exists(second)
    assert storage.list_files(place) == {"a": 3, "deep/c": 1}


def test_nothing_lies_below_a_file(root):
    path = addresses.join(root, "file")
    atomic.write_bytes(path, b"1")
    assert (storage.list_files(path), storage.list_dir(path), storage.is_dir(path)) == ({}, [], False)
    assert (storage.list_files(root), storage.list_dir(root), storage.is_dir(root)) == ({"file": 1}, ["file"], True)


@pytest.mark.parametrize("root", ["moto", "rclone", "gcs", "azure"], indirect=True)
def test_another_content_has_another_checksum(root):
    path = addresses.join(root, "file")
    atomic.write_bytes(path, b"1")
    before = storage.checksum(path)
    assert before == storage.checksum(path) != ""
    atomic.write_bytes(path, b"2")
    assert storage.checksum(path) not in (before, "")


@pytest.mark.parametrize("path", ["nonsense://x", "simplecache::nonsense://x"])
def test_an_unknown_protocol_is_named(path):
    with pytest.raises(StorageError, match=f"{path}: there is no protocol 'nonsense'"):
        storage.read_bytes(path)


def test_a_client_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "adlfs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "az", raising=False)
    with pytest.raises(StorageError, match=r"Install adlfs .*: pip install 'mergequest\[azure\]'"):
        storage.read_bytes("az://container/x")
    with pytest.raises(StorageError, match="Install ossfs"):
        storage.read_bytes("oss://bucket/x")


def test_where_credentials_come_from_is_said_where_there_are_none(monkeypatch):
    for name in [name for name in os.environ if name.startswith("AZURE_STORAGE_")]:
        monkeypatch.delenv(name)
    fsspec.get_filesystem_class("az").clear_instance_cache()
    with pytest.raises(StorageError, match=r"cannot open abfs://container/x: .*AZURE_STORAGE_ACCOUNT_NAME"):
        storage.read_bytes("abfs://container/x")


def test_where_credentials_come_from_is_said_where_they_are_wrong(azure_container, monkeypatch):
    account = os.environ["AZURE_STORAGE_CONNECTION_STRING"]
    key = re.search("AccountKey=([^;]+)", account)[1]
    wrong = base64.b64encode(b"marked-wrong-secret").decode()
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", account.replace(key, wrong))
    fsspec.get_filesystem_class("az").clear_instance_cache()
    with pytest.raises(StorageError, match=r"cannot read az://.*AZURE_STORAGE_CONNECTION_STRING") as error:
        storage.read_bytes(f"{azure_container}/x")
    assert wrong not in str(error.value)
    fsspec.get_filesystem_class("az").clear_instance_cache()

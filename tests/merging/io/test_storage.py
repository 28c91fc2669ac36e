import pytest

from merging.errors import StorageError
from merging.io import addresses, atomic, documents, hashing, storage


def test_missing_files_are_named(root):
    path = addresses.join(root, "nowhere.txt")
    for read in (storage.read_text, documents.read_json, storage.size, hashing.file_fingerprint):
        with pytest.raises(StorageError, match=r"cannot read .*nowhere\.txt: it does not exist"):
            read(path)


@pytest.mark.parametrize("root", ["memory", "moto", "gcs"], indirect=True)
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


def test_an_unknown_protocol_is_named():
    with pytest.raises(StorageError, match="nonsense://x"):
        storage.read_bytes("nonsense://x")

import pytest

from merging.errors import StorageError
from merging.io import addresses, documents, hashing, storage


def test_missing_files_are_named(root):
    path = addresses.join(root, "nowhere.txt")
    for read in (storage.read_text, documents.read_json, storage.size, hashing.file_fingerprint):
        with pytest.raises(StorageError, match=r"cannot read .*nowhere\.txt: it does not exist"):
            read(path)


def test_an_unknown_protocol_is_named():
    with pytest.raises(StorageError, match="nonsense://x"):
        storage.read_bytes("nonsense://x")

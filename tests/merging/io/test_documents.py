import pytest

from merging.errors import StorageError
from merging.io import addresses, atomic, documents


def test_json(root):
    path = addresses.join(root, "x.json")
    atomic.write_json(path, {"b": [1, None]})
    assert documents.read_json(path) == {"b": [1, None]}
    atomic.write_text(path, "{")
    with pytest.raises(StorageError, match=r"x\.json is not valid JSON"):
        documents.read_json(path)

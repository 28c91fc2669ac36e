import json

from merging.io import hashing


def test_fingerprints_are_of_content():
    assert hashing.fingerprint({"a": 1, "b": 2}) == hashing.fingerprint(json.loads('{"b": 2, "a": 1}'))
    assert hashing.fingerprint([1, 2]) != hashing.fingerprint([2, 1])

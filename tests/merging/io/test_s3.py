"""What the network and its servers do to storage."""

import time

import pytest

from merging.errors import StorageError
from merging.io import addresses, atomic, hashing, s3, storage


@pytest.fixture
def root(unreliable, s3_at):
    return s3_at(unreliable.url)


@pytest.mark.parametrize("fault", ["503", "500", "reset", "lost"])
def test_a_request_that_fails_in_passing_is_made_again(root, unreliable, fault):
    path = addresses.join(root, "x")
    unreliable.plan = [fault]
    atomic.write_bytes(path, b"0123456789")
    unreliable.plan = [fault, fault]
    assert storage.read_bytes(path, 2, 4) == b"23"
    unreliable.plan = [fault]
    assert storage.list_dir(root) == ["x"]
    unreliable.plan = [fault]
    assert storage.exists(path)


def test_a_first_write_whose_answer_is_lost_is_still_the_first(root, unreliable):
    path = addresses.join(root, "once")
    unreliable.plan = [None, None, "lost"]  # two looks whether it is there, then the put
    assert atomic.create(path, b"mine")
    assert unreliable.faults["lost"] == 1
    assert not atomic.create(path, b"other")
    assert storage.read_bytes(path) == b"mine"


@pytest.mark.parametrize("lost", range(1, 5))
def test_a_multipart_upload_survives_lost_answers(root, unreliable, monkeypatch, lost):
    monkeypatch.setattr(s3, "PART", 5 << 20)
    path = addresses.join(root, "large")
    with atomic.open_new(path) as file:
        unreliable.plan = [None] * (lost - 1) + ["lost"]  # create, parts, complete
        file.write(b"a" * (5 << 20))
        file.write(b"b" * (3 << 20))
    assert unreliable.faults["lost"] == 1
    assert storage.size(path) == 8 << 20
    assert storage.read_bytes(path, (5 << 20) - 1, (5 << 20) + 1) == b"ab"


def test_patience_has_an_end(root, unreliable, monkeypatch):
    monkeypatch.setattr(s3, "PATIENCE", 1.0)
    unreliable.rate = 1.0
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"cannot read s3://.*/x: .*tries in \d s: check AWS_ENDPOINT_URL"):
        storage.read_bytes(addresses.join(root, "x"))
    assert time.monotonic() - started < 5
    assert len([path for _, path, _ in unreliable.requests if path.endswith("/x")]) >= 3


def test_nobody_there(s3_server, s3_at, monkeypatch):
    monkeypatch.setattr(s3, "PATIENCE_UNREACHED", 0.3)
    root = s3_at(f"http://127.0.0.1:{s3_server.free_port()}", bucket=False)
    with pytest.raises(StorageError, match=r"cannot look for s3://.*is not to be reached"):
        storage.exists(addresses.join(root, "x"))


@pytest.mark.parametrize("do", [storage.read_bytes, storage.exists, storage.list_dir, storage.is_dir, storage.size])
def test_a_missing_bucket_is_named(do, moto_endpoint, s3_at):
    s3_at(moto_endpoint, bucket=False)
    with pytest.raises(StorageError, match="there is no bucket 'nobodys-bucket'"):
        do("s3://nobodys-bucket/dir/x")


def test_a_wrong_secret_is_one_clear_error(rclone_endpoint, s3_at, s3_server):
    root = s3_at(rclone_endpoint)
    atomic.write_bytes(addresses.join(root, "x"), b"1")
    wrong = "marked-wrong-secret"
    s3_at(rclone_endpoint, secret=wrong, bucket=False)
    path = addresses.join(root, "x")
    started = time.monotonic()
    for do in (storage.read_bytes, storage.exists, storage.list_dir, storage.size, hashing.file_fingerprint):
        with pytest.raises(StorageError, match=r"access to bucket '.*' is denied .*AWS_SECRET_ACCESS_KEY") as caught:
            do(path)
        error = caught.value
        while error is not None:
            assert wrong not in repr(error)
            error = error.__cause__
    with pytest.raises(StorageError, match="is denied"):
        atomic.write_bytes(path, b"2")
    with pytest.raises(StorageError, match="is denied"), atomic.open_new(path) as file:
        file.write(b"2")
    assert time.monotonic() - started < 5  # none of them was tried again


def test_no_credentials_at_all(moto_endpoint, s3_at):
    s3_at(moto_endpoint, secret="", bucket=False)
    with pytest.raises(StorageError, match="there are no usable credentials"):
        storage.exists("s3://any-bucket/x")


@pytest.mark.parametrize("address", ["ftp://me:hidden@host/x", "https://host/x?X-Amz-Signature=hidden"])
def test_an_address_holds_no_secret(address):
    with pytest.raises(StorageError, match="holds a password or signature") as caught:
        storage.read_bytes(address)
    assert "hidden" not in str(caught.value)

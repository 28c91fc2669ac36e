"""Every byte of a pool is read once, and not again as long as no file changes."""

import os

import pytest
from safetensors.torch import load_file, save_file

from merging.checkpoints import validation
from merging.checkpoints.pool import Pool
from merging.checkpoints.validation import check_weights
from merging.errors import PoolError
from merging.io import addresses, fact_cache, storage

MEMBERS = ("one", "two", "three")


@pytest.fixture
def remote(tiny_pool, upload, unreliable, s3_at):
    """Opens the tiny pool on S3, anew at every call."""
    root = s3_at(unreliable.url)
    for name in ("base", *MEMBERS):
        upload(tiny_pool[name], addresses.join(root, name))
    unreliable.reset()
    return lambda: Pool.open(addresses.join(root, "base"), {name: addresses.join(root, name) for name in MEMBERS})


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """Forgets what this machine knows: `elsewhere(number)`."""

    def move(number):
        monkeypatch.setattr(fact_cache, "_facts", {})
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"machine-{number}"))

    return move


def file_bytes(pool):
    return sum(
        storage.size(path) for who in (pool.base, *(m.checkpoint for m in pool.members.values())) for path in who._files
    )


def test_one_reading_gives_distances_and_fingerprints(remote, unreliable, tiny_pool):
    pool = remote()
    local = Pool.open(str(tiny_pool["base"]), {name: str(tiny_pool[name]) for name in MEMBERS})
    unreliable.reset()
    result = validation.examine(pool, MEMBERS)
    assert validation.distances(pool, result) == check_weights(local)
    assert pool.fingerprints() == local.fingerprints()
    assert unreliable.sent <= file_bytes(pool)


def test_what_was_found_is_known_here_and_where_it_is_told(remote, unreliable, elsewhere, upload, tiny_pool):
    pool = remote()
    result = validation.examine(pool, MEMBERS)
    validation.keep(pool, result)
    reported = fact_cache.known([validation.key(pool, member) for member in MEMBERS])
    unreliable.reset()
    assert validation.recall(remote()) == result
    elsewhere(1)
    assert validation.recall(remote()) == {}
    fact_cache.learn(reported)
    assert validation.recall(remote()) == result
    upload(tiny_pool["three"], pool.members["two"].checkpoint.path)
    assert set(validation.recall(remote())) == {"one", "three"}


def test_a_local_file_that_is_written_again_is_another(tiny_pool, save_member, tmp_path, monkeypatch):
    save_member(tmp_path / "x", tiny_pool["base"], 5)
    file = tmp_path / "x" / "model.safetensors"
    assert storage.checksum(str(file)) == ""  # it may be written again within the same tick
    monkeypatch.setattr(storage, "SETTLED", -60.0)
    pool = Pool.open(str(tiny_pool["base"]), {"x": str(tmp_path / "x")})
    result = validation.examine(pool, ["x"])
    validation.keep(pool, result)
    assert validation.recall(Pool.open(str(tiny_pool["base"]), {"x": str(tmp_path / "x")})) == result
    before, times = pool.members["x"].checkpoint.fingerprint, file.stat()
    tensors = load_file(file)
    tensors["classifier.bias"] += 1.0
    save_file(tensors, file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a careful copy does
    again = Pool.open(str(tiny_pool["base"]), {"x": str(tmp_path / "x")})
    assert validation.recall(again) == {}
    assert again.members["x"].checkpoint.fingerprint != before


def test_what_is_bad_is_named_and_looked_at_again(tiny_pool, save_member, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "SETTLED", -60.0)
    save_member(tmp_path / "x", tiny_pool["base"], 6)
    tensors = load_file(tmp_path / "x" / "model.safetensors")
    name = next(name for name in tensors if name.endswith("query.weight"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, tmp_path / "x" / "model.safetensors", metadata={"format": "pt"})
    pool = Pool.open(str(tiny_pool["base"]), {"x": str(tmp_path / "x"), "one": str(tiny_pool["one"])})
    result = validation.examine(pool, ["x", "one"])
    validation.keep(pool, result)
    with pytest.raises(PoolError, match=r"unusable weights \(1 tensors\):\n  - x: '.*query.weight' holds NaN or Inf"):
        validation.distances(pool, result)
    assert set(validation.recall(pool)) == {"one"}


@pytest.mark.parametrize(
    ("members", "parts", "sizes"), [(3, 1, [3]), (17, 1, [5, 6, 6]), (5, 3, [1, 2, 2]), (2, 9, [1, 1])]
)
def test_slices_are_small_and_as_many_as_asked_for(members, parts, sizes):
    result = list(validation.slices([str(number) for number in range(members)], parts))
    assert [len(part) for part in result] == sizes
    assert [name for part in result for name in part] == [str(number) for number in range(members)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_head_that_is_not_finite_is_named(tiny_pool, save_member, tmp_path, value):
    bad = save_member(tmp_path / "bad", tiny_pool["base"], seed=5)
    tensors = load_file(bad / "model.safetensors")
    tensors["classifier.weight"][1, 2] = value
    save_file(tensors, bad / "model.safetensors", {"format": "pt"})
    pool = Pool.open(str(tiny_pool["base"]), {"one": str(tiny_pool["one"]), "bad": str(bad)})
    with pytest.raises(PoolError, match=r"bad: 'classifier\.weight' of its head holds NaN or Inf"):
        check_weights(pool)

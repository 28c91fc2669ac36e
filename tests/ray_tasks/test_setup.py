"""What an evaluator reads before it measures anything, where the pool lies far away."""

import pytest
import torch

from merging.checkpoints.pool import Pool
from merging.io import addresses, fact_cache
from merging.statistics.statistic import Partial
from merging.statistics.statistics_file import save_tensors
from ray_tasks.evaluators.evaluator import Setup

MEMBERS = ("one", "two")


@pytest.fixture
def setup(tiny_pool, upload, unreliable, s3_at, monkeypatch, tmp_path):
    """A pool on S3 with a statistic, as a driver describes it that knows the fingerprints, to a machine that does not."""
    root = s3_at(unreliable.url)
    for name in ("base", *MEMBERS):
        upload(tiny_pool[name], addresses.join(root, name))
    members = {name: addresses.join(root, name) for name in MEMBERS}
    pool = Pool.open(addresses.join(root, "base"), members)
    one = pool.members["one"]
    path = addresses.join(root, "one.fisher.safetensors")
    tensors = {one.names[name]: torch.ones(info.shape) for name, info in pool.weights.items()}
    save_tensors(
        path, "fisher", {}, tensors, Partial({}, {"examples": 8}), checkpoint=one.checkpoint.fingerprint, data=""
    )
    facts = fact_cache.known([one.checkpoint.identity])
    monkeypatch.setattr(fact_cache, "_facts", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    unreliable.reset()
    return Setup(pool.base.path, members, (), {"one": (path,)}, {}, {}, {}, facts=facts)


def weights_read(unreliable):
    """Requests for weights: neither a file's first bytes nor its header."""
    spans = [span for method, path, span in unreliable.requests if method == "GET" and path.endswith(".safetensors")]
    return [span for span in spans if not span.startswith(("bytes=0-7", "bytes=8-"))]


def test_statistics_are_checked_without_reading_the_pool(setup, unreliable):
    material = setup.material()
    assert set(material.statistics["fisher"]) == {"one"}
    assert weights_read(unreliable) == []


def test_who_is_resident_reads_every_file_once_for_the_machine(setup, unreliable):
    for _ in range(2):
        material = setup.material(resident=True)
    whole = {path for method, path, _ in unreliable.requests if method == "GET" and path.endswith(".safetensors")}
    assert len(whole) == 4
    unreliable.reset()
    for weight in material.weights(material.pool.weights, ["fisher"], torch.device("cpu")):
        assert set(weight.members) == set(MEMBERS)
        assert bool((weight.statistics["fisher"]["one"] == 1).all())
    assert weights_read(unreliable) == []
    assert unreliable.sent == 0
